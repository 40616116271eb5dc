"""A server that answers every inference request at once with the same words: what `loadtest ceiling` asks.

``python -m florence2_loadtest.canned_server rest|grpc`` prints its address, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import Any

import orjson

from florence2_kserve.protocol import wire
from florence2_kserve.protocol.public import PARSED_JSON

HOST = "127.0.0.1"
_WORDS = '{"<CAPTION>": "a red circle"}'
_ANSWER = orjson.dumps(
    {
        "id": "0",
        "model_name": "florence2",
        "outputs": [{"name": PARSED_JSON, "datatype": "BYTES", "shape": [1, 1], "data": [_WORDS]}],
    }
)
_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"connection:\s*close", re.IGNORECASE)


class CannedHttp(asyncio.Protocol):
    """As much of HTTP/1.1 as the generator speaks: requests with a length, one after the other."""

    def __init__(self) -> None:
        self._head = b""
        self._left: int | None = None  # of the body, while there is one
        self._closes = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._head += data
            head, end, data = self._head.partition(_END)
            if not end:
                return
            length = _LENGTH.search(head)
            self._left, self._closes, self._head = int(length[1]) if length else 0, bool(_CLOSE.search(head)), b""
        self._left -= len(data)
        if self._left <= 0:
            self._left = None
            self._answer()

    def _answer(self) -> None:
        assert self._transport is not None
        lines = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(_ANSWER)}".encode()
        self._transport.write(lines + (b"\r\nConnection: close" if self._closes else b"") + _END + _ANSWER)
        if self._closes:
            self._transport.close()


async def serve_rest() -> None:
    """Serves HTTP until standard input ends."""
    server = await asyncio.get_running_loop().create_server(CannedHttp, HOST, 0, backlog=1024)
    await _stay(server.sockets[0].getsockname()[1])


async def serve_grpc() -> None:
    """Serves gRPC until standard input ends."""
    import grpc
    import grpc.aio

    answer = wire.MESSAGES["ModelInferResponse"](model_name="florence2")
    answer.outputs.add(name=PARSED_JSON, datatype="BYTES", shape=[1, 1])
    answer.raw_output_contents.append(len(_WORDS).to_bytes(4, "little") + _WORDS.encode())
    content = answer.SerializeToString()

    async def infer(request: bytes, context: Any) -> bytes:
        return content

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.unary_unary_rpc_method_handler(infer)
    service = wire.SERVICE.strip("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"ModelInfer": handler}),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    await _stay(port)
    await server.stop(0)


async def _stay(port: int) -> None:
    print(f"{HOST}:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve_rest() if sys.argv[1] == "rest" else serve_grpc())
