"""gRPC: calls as protobuf messages, and the two ways to send them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import grpc

from florence2_kserve.client.core import Array, Call, Query, Question, is_loopback
from florence2_kserve.client.errors import (
    ClientError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
    read_retry_after,
    reading_an_answer,
)
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.tensors import Tensor

_BY_STATUS: Mapping[grpc.StatusCode, type[ClientError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
        grpc.StatusCode.NOT_FOUND: NotFoundError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    }
)
_TOO_LARGE = "message larger than max"  # gRPC itself says this, of either side's limit, with RESOURCE_EXHAUSTED


@dataclass(frozen=True, slots=True)
class _Exchange:
    method: str
    message: Any
    read: Callable[[Any], Any]


class _Grpc:
    """What both transports do alike."""

    def __init__(self, target: str, model_name: str, headers: Mapping[str, str], max_message_bytes: int) -> None:
        self._target, self._model_name = target, model_name
        lower = {key.lower(): value for key, value in headers.items()}
        self._options: list[tuple[str, Any]] = [
            *wire.LASTING_CHANNEL,
            *((f"grpc.max_{way}_message_length", max_message_bytes) for way in ("send", "receive")),
        ]
        if host := lower.pop("host", None):
            self._options.append(("grpc.default_authority", host))
        self._metadata = tuple(lower.items())
        if is_loopback(target.rpartition(":")[0].strip("[]")):
            self._options.append(("grpc.enable_http_proxy", 0))

    def _exchange(self, call: Call) -> _Exchange:
        match call:
            case Question():
                message = wire.infer_request(
                    self._model_name,
                    [Tensor(name, array) for name, array in call.inputs.items()],
                    request_id=uuid4().hex,
                    parameters=call.parameters,
                    outputs=call.outputs,
                )
                return _Exchange("ModelInfer", message, _outputs)
            case Query.READY:
                message = wire.MESSAGES["ModelReadyRequest"](name=self._model_name)
                return _Exchange("ModelReady", message, lambda answer: answer.ready)
            case Query.LIVE:
                return _Exchange("ServerLive", wire.MESSAGES["ServerLiveRequest"](), lambda answer: answer.live)
            case Query.METADATA:
                message = wire.MESSAGES["ModelMetadataRequest"](name=self._model_name)
                return _Exchange("ModelMetadata", message, _model_metadata)


class GrpcTransport(_Grpc):
    """Sends calls over blocking gRPC.

    Args:
        target: ``host:port``.
        model_name: Model's name.
        headers: Metadata of every call; ``Host`` becomes the authority.
        max_message_bytes: Largest message, either way.
    """

    def __init__(self, target: str, model_name: str, headers: Mapping[str, str], max_message_bytes: int) -> None:
        super().__init__(target, model_name, headers, max_message_bytes)
        self._channel = grpc.insecure_channel(target, options=self._options)

    def send(self, call: Call, timeout: float) -> Any:
        """Sends `call` once and returns what came back.

        Raises:
            ClientError: One of its kinds.
        """
        exchange = self._exchange(call)
        rpc = wire.rpc(self._channel, exchange.method)
        try:
            answer = rpc(exchange.message, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _failure(error) from None
        with reading_an_answer():
            return exchange.read(answer)

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


class AsyncGrpcTransport(_Grpc):
    """Sends calls over asyncio's gRPC; as `GrpcTransport`."""

    def __init__(self, target: str, model_name: str, headers: Mapping[str, str], max_message_bytes: int) -> None:
        super().__init__(target, model_name, headers, max_message_bytes)
        self._channel: grpc.aio.Channel | None = None

    async def send(self, call: Call, timeout: float) -> Any:
        """As `GrpcTransport.send`."""
        if self._channel is None:  # made on first use, since it belongs to the event loop that runs then
            self._channel = grpc.aio.insecure_channel(self._target, options=self._options)
        exchange = self._exchange(call)
        rpc = wire.rpc(self._channel, exchange.method)
        try:
            answer = await rpc(exchange.message, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _failure(error) from None
        with reading_an_answer():
            return exchange.read(answer)

    async def close(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close()


def _failure(error: grpc.RpcError) -> ClientError:
    """Returns what it means that a call ended with an error."""
    code = error.code()
    details = error.details() or f"{code.name} without a word, perhaps of a proxy"
    kind = _BY_STATUS.get(code, ServerError)
    if wire.is_unanswered(code, details):
        kind = UnavailableError
    elif kind is OverloadedError and _TOO_LARGE in details:
        kind = InvalidRequestError
    return kind(details, code.name, read_retry_after(dict(error.trailing_metadata() or ()).get("retry-after")))


def _outputs(answer: Any) -> dict[str, Array]:
    return {name: tensor.data for name, tensor in wire.response_tensors(answer).items()}


def _model_metadata(answer: Any) -> dict[str, Any]:
    return {
        "name": answer.name,
        "versions": list(answer.versions),
        "platform": answer.platform,
        "properties": dict(answer.properties),
        **{
            side: [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in getattr(answer, side)]
            for side in ("inputs", "outputs")
        },
    }
