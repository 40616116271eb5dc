"""Small servers on loopback that speak the service's protocol, and fail or wait as a test tells them.

What they answer tells jobs apart: an image ``b"7"`` has the caption "7".
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from florence2_kserve.protocol import wire
from florence2_kserve.protocol.tensors import Tensor, bytes_array, unpack


@dataclass(frozen=True)
class Fault:
    """How one request fails: with a status, or without one by a connection that is reset.

    Attributes:
        http: HTTP status.
        grpc: gRPC status.
        headers: Of the answer; over gRPC its trailing metadata.
    """

    http: int | None = None
    grpc: grpc.StatusCode | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


FULL = Fault(429, grpc.StatusCode.RESOURCE_EXHAUSTED)
LOADING = Fault(503, grpc.StatusCode.UNAVAILABLE)
BAD_GATEWAY = Fault(502, grpc.StatusCode.UNAVAILABLE)
RESET = Fault()
WRONG = Fault(400, grpc.StatusCode.INVALID_ARGUMENT)


class Behaviour:
    """What a server does, and what it saw.

    Attributes:
        faults: What the first requests meet, one each.
        seconds: How long each answer takes.
        arrivals: ``time.monotonic()`` of each request.
        images: The images in the order in which they came.
        most_in_flight: The most requests that were there at once.
        in_flight: How many are there now.
        connections: How many connections were made (HTTP).
        held: By image: what its answer waits for.
    """

    def __init__(self, faults: Sequence[Fault] = (), seconds: float = 0.0) -> None:
        self.faults, self.seconds = list(faults), seconds
        self.arrivals: list[float] = []
        self.images: list[bytes] = []
        self.most_in_flight = self.in_flight = self.connections = 0
        self.held: dict[bytes, threading.Event] = {}
        self._lock = threading.Lock()

    def hold(self, image: bytes) -> threading.Event:
        """Holds answers about `image` back until the returned event is set."""
        return self.held.setdefault(image, threading.Event())

    def meet(self, image: bytes) -> Fault | None:
        """Takes a request; returns what it meets."""
        with self._lock:
            self.arrivals.append(time.monotonic())
            self.images.append(image)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            fault = self.faults.pop(0) if self.faults else None
        if image in self.held:
            self.held[image].wait(20)
        time.sleep(self.seconds)
        return fault

    def leave(self) -> None:
        """Ends a request."""
        with self._lock:
            self.in_flight -= 1

    def connected(self) -> None:
        """Counts a connection."""
        with self._lock:
            self.connections += 1


def answers(image: bytes, tasks: Sequence[bytes], outputs: Sequence[str]) -> dict[str, list[str]]:
    """Returns captions as the service does, whatever the tasks are."""
    caption = image.decode()
    columns = {
        "PARSED_JSON": lambda task: json.dumps({task: caption}),
        "SCORES": lambda task: json.dumps({task: {"sequence": -0.5, "text": 0.25}}),
        "FINISH_REASON": lambda task: "stop",
    }
    return {name: [columns[name](task.decode()) for task in tasks] for name in outputs}


@contextmanager
def http_server(behaviour: Behaviour) -> Iterator[str]:
    """Serves over HTTP; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            behaviour.connected()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            length = int(self.headers["Inference-Header-Content-Length"])
            content, offset, tensors = json.loads(body[:length]), length, {}
            for tensor in content["inputs"]:
                size = tensor["parameters"]["binary_data_size"]
                tensors[tensor["name"]] = unpack("", "BYTES", tensor["shape"], body[offset : offset + size])
                offset += size
            (image,), tasks = tensors["INPUT_IMAGE"].flat, tensors["TASK_PROMPT"]
            try:
                fault = behaviour.meet(image)
                if fault is None:
                    outputs = answers(image, list(tasks.flat), [output["name"] for output in content["outputs"]])
                    self._reply(
                        200,
                        {
                            "outputs": [
                                {"name": name, "datatype": "BYTES", "shape": list(tasks.shape), "data": data}
                                for name, data in outputs.items()
                            ]
                        },
                    )
                elif fault.http is None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()
                    self.close_connection = True
                else:
                    self._reply(fault.http, {"error": f"fault {fault.http}"}, fault.headers)
            finally:
                behaviour.leave()

        def _reply(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
            body = json.dumps(content).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # who asked has gone
                self.close_connection = True

        def log_message(self, *parts: Any) -> None: ...

        def finish(self) -> None:
            with suppress(OSError, ValueError):  # a connection that was reset
                super().finish()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        for event in behaviour.held.values():
            event.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def grpc_server(behaviour: Behaviour) -> Iterator[str]:
    """Serves over gRPC; yields its URL."""

    def infer(request: Any, context: grpc.ServicerContext) -> Any:
        tensors = {
            tensor.name: unpack("", "BYTES", tensor.shape, raw)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        (image,), tasks = tensors["INPUT_IMAGE"].flat, tensors["TASK_PROMPT"]
        try:
            if (fault := behaviour.meet(image)) and fault.grpc:
                context.set_trailing_metadata([(name.lower(), value) for name, value in fault.headers.items()])
                context.abort(fault.grpc, f"fault {fault.grpc.name}")
            answer = wire.MESSAGES["ModelInferResponse"]()
            for name, data in answers(image, list(tasks.flat), [output.name for output in request.outputs]).items():
                array = bytes_array([value.encode() for value in data])
                tensor = Tensor(name, array.reshape(tasks.shape))
                answer.outputs.add(name=name, datatype="BYTES", shape=tensor.shape)
                answer.raw_output_contents.append(b"".join(len(v).to_bytes(4, "little") + v for v in array))
            return answer
        finally:
            behaviour.leave()

    handler = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=wire.MESSAGES["ModelInferRequest"].FromString,
        response_serializer=wire.MESSAGES["ModelInferResponse"].SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(32))
    service = wire.SERVICE.strip("/")
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"ModelInfer": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        for event in behaviour.held.values():
            event.set()
        server.stop(5).wait()


SERVERS = {"rest": http_server, "grpc": grpc_server}
