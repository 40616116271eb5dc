"""The ways to the server: one keep-alive HTTP connection, one gRPC channel, and the four wires over them."""

from __future__ import annotations

import http.client
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import grpc
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from .messages import Outcome, Output, Request, unpack_bytes_tensor

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"

# One name for what REST and gRPC each have a code for.
REST_STATUS = {200: "ok", 400: "invalid", 404: "not found", 413: "too large", 429: "exhausted", 504: "deadline"}
GRPC_STATUS = {
    "INVALID_ARGUMENT": "invalid",
    "NOT_FOUND": "not found",
    "RESOURCE_EXHAUSTED": "exhausted",
    "DEADLINE_EXCEEDED": "deadline",
}


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is and how to speak to it.

    Attributes:
        rest_url: Base address of REST, e.g. ``http://127.0.0.1:8080``, with or without a path prefix.
        grpc_url: ``host:port`` of gRPC without TLS, or None.
        model: The model's name.
        headers: Headers added to every call (``Host`` becomes gRPC's authority, others its metadata).
        timeout: Seconds that one call may take.
    """

    rest_url: str
    grpc_url: str | None
    model: str
    headers: Mapping[str, str]
    timeout: float

    def path(self, suffix: str = "", model: str | None = None) -> str:
        """Returns the path of the model (or of `model`), with `suffix` appended."""
        return f"/v2/models/{model or self.model}{suffix}"

    def grpc_options(self) -> list[tuple[str, Any]]:
        """Returns the channel options that the headers ask for."""
        return [("grpc.default_authority", value) for key, value in self.headers.items() if key.lower() == "host"]

    def grpc_metadata(self) -> list[tuple[str, str]]:
        """Returns the metadata that the headers ask for."""
        return [(key.lower(), value) for key, value in self.headers.items() if key.lower() != "host"]


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Returns the body parsed as JSON, after asserting that it says it is JSON."""
        kind = self.headers.get("content-type", "")
        assert kind.startswith("application/json"), f"HTTP {self.status}, {kind or 'no type'}: {self.body[:500]!r}"
        return json.loads(self.body)

    def error(self) -> str:
        """Returns the text of a V2 error body, after asserting that it is one."""
        body = self.json()
        assert isinstance(body, dict), f"HTTP {self.status}: {body!r}"
        message = body.get("error")
        assert isinstance(message, str), f"HTTP {self.status}: {body!r}"
        return _assert_message(message)


def _assert_message(message: str) -> str:
    """Returns the text of an error after asserting that it says something, and nothing of the server's insides."""
    assert message, "an error without a message"
    assert "Traceback" not in message, message
    return message


class RestConnection(AbstractContextManager["RestConnection"]):
    """One HTTP/1.1 connection that never reconnects: a server that closes or resets it makes the next call raise."""

    def __init__(self, target: Target) -> None:
        url = urlsplit(target.rest_url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        assert url.hostname, f"no host in {target.rest_url!r}"
        self.target = target
        self._prefix = url.path.rstrip("/")
        self._http = kind(url.hostname, url.port, timeout=target.timeout)
        self._http.auto_open = 0
        self._http.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Sends a request and leaves its response unread (an iterator as body is sent in chunks)."""
        chunked = isinstance(body, Iterator)
        framing = {"Transfer-Encoding": "chunked"} if chunked else {}
        all_headers = {**self.target.headers, **framing, **(headers or {})}
        self._http.request(method, self._prefix + path, body, all_headers, encode_chunked=chunked)

    def receive(self) -> Reply:
        """Reads the response to the request sent last."""
        response = self._http.getresponse()
        body = response.read()
        return Reply(response.status, {key.lower(): value for key, value in response.getheaders()}, body)

    def get(self, path: str) -> Reply:
        """Gets `path`."""
        self.send("GET", path)
        return self.receive()

    def post(self, body: Any, headers: Mapping[str, str] | None = None, *, model: str | None = None) -> Reply:
        """Posts `body` (bytes, an iterator of bytes, or an object to be sent as JSON) to the model's infer address."""
        if not isinstance(body, (bytes, Iterator)):
            body = json.dumps(body).encode()
        if headers is None:
            headers = {"Content-Type": "application/json"}
        self.send("POST", self.target.path("/infer", model), body, headers)
        return self.receive()

    def assert_alive(self) -> None:
        """Asserts that this very connection serves another request."""
        reply = self.get("/v2/health/live")
        assert (reply.status, reply.json()) == (200, {"live": True})


class GrpcConnection:
    """One gRPC channel with the protocol's stub."""

    def __init__(self, target: Target) -> None:
        assert target.grpc_url is not None
        self.target = target
        self.channel = grpc.insecure_channel(target.grpc_url, options=target.grpc_options())
        self._stub = GRPCInferenceServiceStub(self.channel)

    def close(self) -> None:
        """Closes the channel."""
        self.channel.close()

    def call(self, method: str, request: Any) -> Any:
        """Calls the service's `method`, e.g. ``ModelReady``."""
        return getattr(self._stub, method)(request, timeout=self.target.timeout, metadata=self.target.grpc_metadata())

    def infer(self, message: Any) -> Outcome:
        """Calls ``ModelInfer`` with a protobuf `message`; an error status is an outcome, not an exception."""
        try:
            response = self.call("ModelInfer", message)
        except grpc.RpcError as error:
            return grpc_refusal(error.code().name, error.details())
        outputs: dict[str, Output] = {}
        for index, output in enumerate(response.outputs):
            data = (
                unpack_bytes_tensor(response.raw_output_contents[index])
                if response.raw_output_contents
                else tuple(output.contents.bytes_contents)
            )
            outputs[output.name] = read_output(output.datatype, output.shape, data)
        return Outcome("ok", "", response.id, response.model_name, outputs, _plain_parameters(response.parameters))


def _plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in parameters.items()}


class Wire(ABC):
    """One way to put an inference request on the wire.

    Attributes:
        name: The wire's name, as it appears in test ids.
        carries_bytes: Whether any bytes go through, or text alone.
        shows_tensors: Whether outcomes hold the response's shapes, id and parameters, or its answers alone.
        no_fractions: Why parameters may not be fractions, empty where they may.
    """

    name: ClassVar[str]
    carries_bytes: ClassVar[bool] = True
    shows_tensors: ClassVar[bool] = True
    no_fractions: ClassVar[str] = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def over_grpc(cls) -> bool:
        """Whether it speaks gRPC, or REST."""
        return "grpc" in cls.name

    def cannot_send(self, request: Request) -> str:
        """Returns why `request` cannot go this way, or an empty string where it can."""
        if not self.carries_bytes and not request.is_text():
            return "it carries text, not bytes"
        if self.no_fractions and any(isinstance(value, float) for value in request.parameters.values()):
            return self.no_fractions
        return ""

    @abstractmethod
    def infer(self, request: Request) -> Outcome:
        """Sends `request` and returns what came back."""

    @abstractmethod
    def assert_alive(self) -> None:
        """Asserts that the same connection serves another call."""

    @abstractmethod
    def close(self) -> None:
        """Ends the connection, where it is this wire's own."""


class _RestWire(Wire):
    def __init__(self, target: Target) -> None:
        self.connection = RestConnection(target)

    def assert_alive(self) -> None:
        self.connection.assert_alive()

    def close(self) -> None:
        self.connection.close()


class RestJson(_RestWire):
    """JSON both ways: bytes cannot pass, images are base64 text."""

    name = "rest-json"
    carries_bytes = False

    def infer(self, request: Request) -> Outcome:
        return rest_outcome(self.connection.post(request.json_body(), model=request.model))


class RestBinary(_RestWire):
    """The binary extension for all inputs."""

    name = "rest-binary"

    def infer(self, request: Request) -> Outcome:
        body, json_length = request.binary_body()
        headers = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(json_length)}
        return rest_outcome(self.connection.post(body, headers, model=request.model))


class _GrpcWire(Wire):
    raw: ClassVar[bool]
    no_fractions = "the protocol has no fractions over gRPC; they go as strings"

    def __init__(self, connection: GrpcConnection) -> None:
        self.connection = connection

    def infer(self, request: Request) -> Outcome:
        model = request.model or self.connection.target.model
        return self.connection.infer(grpc_message(request, model, raw=self.raw))

    def assert_alive(self) -> None:
        assert self.connection.call("ServerLive", pb.ServerLiveRequest()).live

    def close(self) -> None:
        pass  # the channel is shared


class GrpcContents(_GrpcWire):
    """Typed contents (``bytes_contents``), as KServe's own client sends lists."""

    name, raw = "grpc-contents", False


class GrpcRaw(_GrpcWire):
    """``raw_input_contents``, as Triton's client sends everything."""

    name, raw = "grpc-raw", True


WIRES: tuple[type[Wire], ...] = (RestJson, RestBinary, GrpcContents, GrpcRaw)


def rest_refusal(status: int, message: str) -> Outcome:
    """Returns the outcome of a call that HTTP's `status` ended."""
    return Outcome(REST_STATUS.get(status, f"HTTP {status}"), _assert_message(message))


def grpc_refusal(code: str, message: str) -> Outcome:
    """Returns the outcome of a call that the gRPC status called `code` ended."""
    return Outcome(GRPC_STATUS.get(code, code), _assert_message(message))


def rest_outcome(reply: Reply) -> Outcome:
    """Reads a REST response to an inference request, JSON or with the binary extension."""
    if reply.status != 200:
        return rest_refusal(reply.status, reply.error())
    json_length = reply.headers.get(JSON_LENGTH_HEADER.lower())
    if json_length is None:
        head, tail = reply.json(), b""
    else:
        head, tail = json.loads(reply.body[: int(json_length)]), reply.body[int(json_length) :]
    outputs: dict[str, Output] = {}
    for output in head["outputs"]:
        size = (output.get("parameters") or {}).get("binary_data_size")
        if size is None:
            data: tuple[bytes, ...] = tuple(element.encode() for element in output["data"])
        else:
            data, tail = unpack_bytes_tensor(tail[:size]), tail[size:]
        outputs[output["name"]] = read_output(output["datatype"], output["shape"], data)
    assert not tail, f"{len(tail)} bytes too many"
    return Outcome("ok", "", head["id"], head["model_name"], outputs, head.get("parameters") or {})


def read_output(datatype: str, shape: Iterable[Any], data: Iterable[bytes]) -> Output:
    """Returns an output, its elements decoded."""
    return Output(datatype, tuple(int(size) for size in shape), tuple(element.decode() for element in data))


def grpc_message(request: Request, model: str, *, raw: bool) -> Any:
    """Returns `request` as a ``ModelInferRequest``, its tensors as raw or as typed contents."""
    message = pb.ModelInferRequest(model_name=model, id=request.id or "")
    for tensor in request.tensors:
        proto = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            message.raw_input_contents.append(tensor.raw())
        else:
            contents = proto.contents.int_contents if tensor.datatype == "INT32" else proto.contents.bytes_contents
            contents.extend(tensor.data)
    for name in request.outputs:
        message.outputs.add(name=name)
    for key, value in request.parameters.items():
        parameter = message.parameters[key]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        else:  # the protocol has no fractions over gRPC: they travel as text
            parameter.string_param = str(value)
    return message
