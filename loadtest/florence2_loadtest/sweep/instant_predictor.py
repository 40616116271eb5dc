"""A predictor that answers at once, always the same: what is measured before it is the transformer alone.

A process of its own, so that the answers cost the load generator nothing; it ends with whom it was started by.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from florence2_kserve.local import LOOPBACK
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import Processor
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.tensors import Tensor, bytes_array, pack

DEFAULT_TOKENS = 40
# Reads as a label with two boxes, as a word with a quadrangle, and as a plain text.
_REPEATED = "red circle<loc_100><loc_200><loc_300><loc_200><loc_300><loc_400><loc_100><loc_400>"
_MAX_BYTES = 512 * 1024 * 1024
_HEALTH = ("ServerLive", "ServerReady", "ModelReady")


class InstantPredictor:
    """The process, as a context manager.

    Args:
        model: Checkpoint whose tokens the answer is made of.
        tokens: Its length.
        revision: Of a hub id.

    Attributes:
        address: ``127.0.0.1:port``, once it is entered.
    """

    def __init__(self, model: str = "embedded", tokens: int = DEFAULT_TOKENS, revision: str | None = None) -> None:
        self._command = [sys.executable, "-m", __name__, model, str(tokens), revision or ""]
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def __enter__(self) -> Self:
        # It ends when its standard input does, which the kernel sees to however this process ends.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        try:
            self.address = self._process.stdout.readline().decode().strip()
            if not self.address:
                raise RuntimeError("the instant predictor ended while starting; see above")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()  # there is nothing that it could lose
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()


def canned_sequence(processor: Processor, tokens: int) -> np.ndarray[Any, Any]:
    """Returns the answer that is always given.

    Args:
        processor: Of the checkpoint.
        tokens: Its length, start and end included; 3 at least.

    Returns:
        INT64 [tokens].
    """
    words = processor.tokenizer.encode(_REPEATED, add_special_tokens=False).ids
    inside = np.resize(np.array(words, dtype=np.int64), tokens - 3)
    start, end = [processor.eos_token_id, processor.bos_token_id], [processor.eos_token_id]
    return np.concatenate([start, inside, end]).astype(np.int64)


class Answers:
    """Answers of the internal protocol, as a gRPC handler; requests are read only as far as their rows are counted.

    Args:
        sequence: The token sequence that every row gets, INT64 [T].
    """

    def __init__(self, sequence: np.ndarray[Any, Any]) -> None:
        self._sequence = sequence
        self._by_rows: dict[int, Any] = {}

    def generate(self, message: Any) -> Any:
        """Returns a ModelInferResponse for a ModelInferRequest."""
        (rows,) = (tensor.shape[0] for tensor in message.inputs if tensor.name == "input_ids")
        if rows not in self._by_rows:
            self._by_rows[rows] = self._make(rows)
        return self._by_rows[rows]

    def _make(self, rows: int) -> Any:
        message = wire.MESSAGES["ModelInferResponse"]()
        logprobs = np.full_like(self._sequence, -0.1, dtype=np.float32)
        for tensor in (
            Tensor("sequences", np.tile(self._sequence, (rows, 1))),
            Tensor("sequences_scores", np.full(rows, -0.1, dtype=np.float32)),
            Tensor("token_logprobs", np.tile(logprobs, (rows, 1))),
            Tensor("finish_reason", bytes_array([b"stop"] * rows)),
        ):
            message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            message.raw_output_contents.append(pack(tensor.data))
        for name in ("queue_us", "generate_us"):
            message.parameters[name].int64_param = 0
        return message


async def serve(model: str, tokens: int, revision: str | None) -> None:
    """Serves until standard input ends; writes the address to standard output once it can be called."""
    processor = Processor.load(locate_model(model, revision=revision, with_weights=False))
    answers = Answers(canned_sequence(processor, tokens))

    async def infer(message: Any, context: Any) -> Any:
        return answers.generate(message)

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", _MAX_BYTES)])
    handlers = {"ModelInfer": _handler("ModelInfer", infer)}
    for method in _HEALTH:
        handlers[method] = _handler(method, _healthy(method))
    service = wire.SERVICE.strip("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    await server.start()
    print(f"{LOOPBACK}:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def _healthy(method: str) -> Any:
    response = wire.MESSAGES[f"{method}Response"]
    answer = response(live=True) if method == "ServerLive" else response(ready=True)

    async def health(message: Any, context: Any) -> Any:
        return answer

    return health


def _handler(method: str, function: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        function,
        request_deserializer=wire.MESSAGES[f"{method}Request"].FromString,
        response_serializer=wire.MESSAGES[f"{method}Response"].SerializeToString,
    )


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3] or None))
