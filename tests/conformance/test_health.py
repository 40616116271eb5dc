"""Health and metadata, over REST and gRPC."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from .contract import INPUTS, OUTPUTS
from .messages import ask
from .pictures import base64_text, png
from .wires import GrpcConnection, RestConnection, Target, Wire, grpc_message

UNKNOWN = "no-such-model"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v2/health/live", {"live": True}), ("/v2/health/ready", {"ready": True})],
    ids=["live", "ready"],
)
def test_rest_health(rest: RestConnection, path: str, body: dict[str, bool]) -> None:
    reply = rest.get(path)
    assert (reply.status, reply.json()) == (200, body)


def test_rest_server_metadata(rest: RestConnection) -> None:
    reply = rest.get("/v2")
    assert reply.status == 200
    metadata = reply.json()
    for key in ("name", "version"):
        assert isinstance(metadata[key], str)
        assert metadata[key]
    assert isinstance(metadata["extensions"], list)
    assert all(isinstance(extension, str) for extension in metadata["extensions"])


def test_rest_model_metadata(rest: RestConnection, server: Target) -> None:
    reply = rest.get(server.path())
    assert reply.status == 200
    metadata = reply.json()
    assert metadata["name"] == server.model
    assert isinstance(metadata["platform"], str)
    _assert_tensors(metadata["inputs"], INPUTS)
    _assert_tensors(metadata["outputs"], OUTPUTS)


def test_rest_model_ready(rest: RestConnection, server: Target) -> None:
    reply = rest.get(server.path("/ready"))
    assert reply.status == 200
    assert reply.json()["ready"] is True


@pytest.mark.parametrize("suffix", ["", "/ready"], ids=["metadata", "ready"])
def test_rest_unknown_model_is_not_found(rest: RestConnection, server: Target, suffix: str) -> None:
    reply = rest.get(server.path(suffix, UNKNOWN))
    assert reply.status == 404
    assert UNKNOWN in reply.error()
    rest.assert_alive()


def test_rest_unknown_model_cannot_infer(rest: RestConnection) -> None:
    reply = rest.post(ask(base64_text(png()), "<CAPTION>").json_body(), model=UNKNOWN)
    assert reply.status == 404
    assert UNKNOWN in reply.error()
    rest.assert_alive()


def test_grpc_health(grpc_connection: GrpcConnection, server: Target) -> None:
    assert grpc_connection.call("ServerLive", pb.ServerLiveRequest()).live
    assert grpc_connection.call("ServerReady", pb.ServerReadyRequest()).ready
    assert grpc_connection.call("ModelReady", pb.ModelReadyRequest(name=server.model)).ready


def test_grpc_server_metadata(grpc_connection: GrpcConnection) -> None:
    metadata = grpc_connection.call("ServerMetadata", pb.ServerMetadataRequest())
    assert metadata.name
    assert metadata.version


def test_grpc_model_metadata(grpc_connection: GrpcConnection, server: Target) -> None:
    metadata = grpc_connection.call("ModelMetadata", pb.ModelMetadataRequest(name=server.model))
    assert metadata.name == server.model
    inputs, outputs = ([_as_dict(tensor) for tensor in tensors] for tensors in (metadata.inputs, metadata.outputs))
    _assert_tensors(inputs, INPUTS)
    _assert_tensors(outputs, OUTPUTS)


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelReady", "ModelInfer"])
def test_grpc_unknown_model_is_not_found(grpc_connection: GrpcConnection, method: str) -> None:
    request = {
        "ModelMetadata": pb.ModelMetadataRequest(name=UNKNOWN),
        "ModelReady": pb.ModelReadyRequest(name=UNKNOWN),
        "ModelInfer": grpc_message(ask(base64_text(png()), "<CAPTION>"), UNKNOWN, raw=True),
    }[method]
    with pytest.raises(grpc.RpcError) as raised:
        grpc_connection.call(method, request)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert UNKNOWN in raised.value.details()


# The health service's two messages are small enough to be written by hand, which spares a dependency:
# HealthCheckRequest{string service = 1}, HealthCheckResponse{enum status = 1}, SERVING = 1.
SERVING = b"\x08\x01"


def test_grpc_health_service_says_serving(grpc_connection: GrpcConnection, server: Target) -> None:
    assert _check_health(grpc_connection, server, b"") == SERVING


def test_grpc_health_service_knows_no_other_service(grpc_connection: GrpcConnection, server: Target) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        _check_health(grpc_connection, server, b"no.such.Service")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_request_without_texts_is_served_on_every_wire(wire: Wire) -> None:
    """Ready means ready: the first inference works, whichever way it comes in."""
    assert wire.infer(ask(base64_text(png()), "<CAPTION>")).status == "ok"


def _check_health(connection: GrpcConnection, server: Target, service: bytes) -> bytes:
    check = connection.channel.unary_unary("/grpc.health.v1.Health/Check")
    request = b"\x0a" + bytes([len(service)]) + service if service else b""
    try:
        response: bytes = check(request, timeout=server.timeout, metadata=server.grpc_metadata())
    except grpc.RpcError as error:
        # An HTTP status comes from no gRPC server, but from a router before it: KServe's pass the V2 service alone.
        if error.code() is grpc.StatusCode.UNIMPLEMENTED and "status: 404" in (error.details() or ""):
            pytest.skip("the ingress has no route to grpc.health.v1")
        raise
    return response


def _as_dict(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _assert_tensors(tensors: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    described = {tensor["name"]: tensor for tensor in tensors}
    assert set(described) == set(names)
    for name in names:
        assert described[name]["datatype"] == "BYTES"
        shape = described[name]["shape"]
        assert shape[:1] == [-1], f"{name}: the number of rows varies, its shape says {shape}"
        assert all(isinstance(size, int) for size in shape)
