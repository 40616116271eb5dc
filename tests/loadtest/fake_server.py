"""A small server over HTTP or gRPC on loopback that takes as long as a test tells it, and knows how long it took."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from aiohttp import web

from florence2_kserve.protocol import wire

WORDS = '{"<CAPTION>": "a red circle"}'
OUTPUT = {"name": "PARSED_JSON", "datatype": "BYTES", "shape": [1, 1], "data": [WORDS]}
ANSWER = json.dumps({"outputs": [OUTPUT]})


@dataclass(frozen=True)
class Reply:
    """What a request meets.

    Attributes:
        status: Of HTTP.
        body: Of the HTTP answer.
        code: Of gRPC; None for an answer.
        details: Of a gRPC status.
        headers: Of the answer; over gRPC its trailing metadata.
        cut: Whether the HTTP connection is closed in the middle of the body.
        reset: Whether it is closed without an answer.
        empty: Whether the gRPC answer has no outputs.
    """

    status: int = 200
    body: str = ANSWER
    code: grpc.StatusCode | None = None
    details: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    reset: bool = False
    empty: bool = False


class FakeServer:
    """What the server does, and what it saw.

    Args:
        seconds: How long the answer to a request takes, by its number.
        replies: What the first requests meet; the others are answered.
        stall_at: Number of the request at whose arrival the server stalls: it and all others are answered
            when the stall is over.
        stall_s: Length of the stall.

    Attributes:
        took: How long each answered request was in the server's hands, in the order of their ends.
        arrivals: ``time.monotonic()`` of each request.
        bodies: Of each request.
        headers: Of each request, names in lower case.
        peers: The address from which each request came.
        most_in_flight: The most requests that were there at once.
        ready_at: When it begins to say that it is ready, by ``time.monotonic()``; may be set.
    """

    def __init__(
        self,
        seconds: Callable[[int], float] = lambda number: 0.0,
        replies: tuple[Reply, ...] = (),
        *,
        stall_at: int | None = None,
        stall_s: float = 1.0,
    ) -> None:
        self._seconds, self._replies = seconds, list(replies)
        self._stall_at, self._stall_s, self._stalled_until = stall_at, stall_s, 0.0
        self._numbers = itertools.count()
        self._in_flight = 0
        self.took: list[float] = []
        self.arrivals: list[float] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.peers: list[Any] = []
        self.most_in_flight = 0
        self.ready_at = 0.0

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Serves over HTTP in a thread of its own; yields the URL."""
        loop = asyncio.new_event_loop()
        port, ended = loop.run_until_complete(self._start()), asyncio.Event()
        thread = threading.Thread(target=loop.run_until_complete, args=(self._run(ended),))
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            loop.call_soon_threadsafe(ended.set)
            thread.join()
            loop.close()

    @contextmanager
    def serve_grpc(self) -> Iterator[str]:
        """Serves over gRPC; yields the URL."""
        handler = grpc.unary_unary_rpc_method_handler(self._infer)
        server = grpc.server(ThreadPoolExecutor(16))
        service = wire.SERVICE.strip("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"ModelInfer": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"grpc://127.0.0.1:{port}"
        finally:
            server.stop(1).wait()

    async def _start(self) -> int:
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_post("/v2/models/{name}/infer", self._handle)
        app.router.add_get("/v2/models/{name}/ready", self._tell_ready)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _run(self, ended: asyncio.Event) -> None:
        await ended.wait()
        await self._runner.cleanup()

    async def _tell_ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if time.monotonic() >= self.ready_at else 503)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body, began = await request.read(), time.monotonic()
        assert request.transport is not None
        pause, reply = self._meet(body, request.headers, request.transport.get_extra_info("peername"))
        try:
            await asyncio.sleep(pause)
        finally:
            self._in_flight -= 1
        if reply.reset:
            request.transport.abort()
        if reply.cut:
            response = web.StreamResponse(headers={"Content-Length": str(len(reply.body) + 100)})
            await response.prepare(request)
            await response.write(reply.body.encode())
            with suppress(ConnectionError):
                request.transport.close()
            return response
        self.took.append(time.monotonic() - began)
        return web.Response(
            status=reply.status, text=reply.body, headers=reply.headers, content_type="application/json"
        )

    def _infer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        began = time.monotonic()
        pause, reply = self._meet(request, metadata, context.peer())
        time.sleep(pause)
        self._in_flight -= 1
        if reply.code is not None:
            context.set_trailing_metadata([(name.lower(), value) for name, value in reply.headers.items()])
            context.abort(reply.code, reply.details)
        answer = wire.MESSAGES["ModelInferResponse"]()
        if not reply.empty:
            answer.outputs.add(name="PARSED_JSON", datatype="BYTES", shape=[1, 1])
            answer.raw_output_contents.append(len(WORDS).to_bytes(4, "little") + WORDS.encode())
        self.took.append(time.monotonic() - began)
        return bytes(answer.SerializeToString())

    def _meet(self, body: bytes, headers: Mapping[str, str], peer: Any) -> tuple[float, Reply]:
        """Takes a request; returns how long its answer takes, and what that is."""
        number, now = next(self._numbers), time.monotonic()
        self.arrivals.append(now)
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in headers.items()})
        self.peers.append(peer)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        if number == self._stall_at:
            self._stalled_until = now + self._stall_s
        pause = max(self._seconds(number), self._stalled_until - now)
        return pause, self._replies.pop(0) if self._replies else Reply()
