"""A gateway before the service that may answer calls itself, as gateways and other services do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import httpx

from florence2_kserve.local import LOOPBACK

_NOT_PASSED_ON = frozenset({"host", "connection", "transfer-encoding", "content-length", "content-encoding", "date"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call is answered with."""

    status: int
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """A call, and how to have the service answer it."""

    is_question: bool
    body: bytes
    forward: Callable[[], Reply]


def refusal(status: int, message: str) -> Reply:
    """Returns an error as the service words them."""
    return Reply(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json"})


class Front:
    """Listens while it is entered.

    Args:
        target: The service's URL.
        answer: Answers a call, as a rule by ``call.forward()``.

    Attributes:
        url: Its address.
    """

    def __init__(self, target: str, answer: Callable[[Call], Reply]) -> None:
        self._target, self.answer = target, answer
        self._http = httpx.Client(trust_env=False, timeout=60)
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                front._handle(self)

            def do_POST(self) -> None:
                front._handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _NOT_PASSED_ON}

        def forward() -> Reply:
            url = self._target + handler.path
            response = self._http.request(handler.command, url, content=body, headers=headers)
            passed_on = {name: value for name, value in response.headers.items() if name not in _NOT_PASSED_ON}
            return Reply(response.status_code, response.content, passed_on)

        reply = self.answer(Call(handler.path.endswith("/infer"), body, forward))
        handler.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(reply.body)
