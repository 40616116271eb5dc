"""Versions of the model, and Triton's extensions over REST: its configuration, its statistics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import grpc
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb

from .contract import INPUTS, OUTPUTS, TASK, TEXT
from .messages import BRIEF, ask
from .pictures import base64_text, noise, png
from .wires import GrpcConnection, RestConnection, Target, grpc_message, rest_outcome

Alone = Callable[..., Any]
VERSION = "/versions/1"
DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
GOOD = ask([base64_text(png(0)), base64_text(png(1))], ["<OD>", "<OCR>"], parameters=BRIEF)
BAD = {
    "a bad row": ask(base64_text(noise()), "<OD>"),
    "an unknown task": ask(base64_text(png()), "<DANCE>"),
    "an unknown parameter": ask(base64_text(png()), "<OD>", parameters={"temperature": 1}),
    "no tensors": ask((), ()),
}


def _get(rest: RestConnection, suffix: str) -> Any:
    reply = rest.get(rest.target.path(suffix))
    assert reply.status == 200, reply
    return reply.json()


def _statistics(rest: RestConnection) -> Any:
    (statistics,) = _get(rest, "/stats")["model_stats"]
    return statistics


def _post_to_version(rest: RestConnection, version: str, body: bytes) -> Any:
    path = rest.target.path(f"/versions/{version}/infer")
    rest.send("POST", path, body, {"Content-Type": "application/json"})
    return rest.receive()


def test_the_server_names_the_extensions(rest: RestConnection) -> None:
    extensions = rest.get("/v2").json()["extensions"]
    assert {"binary_tensor_data", "model_configuration", "statistics"} <= set(extensions)


@pytest.mark.parametrize("suffix", ["", "/ready", "/config"], ids=["metadata", "ready", "config"])
def test_a_version_answers_as_the_model_does(rest: RestConnection, suffix: str) -> None:
    assert _get(rest, VERSION + suffix) == _get(rest, suffix)


def test_a_version_has_statistics(rest: RestConnection, server: Target) -> None:
    (statistics,) = _get(rest, VERSION + "/stats")["model_stats"]
    assert (statistics["name"], statistics["version"]) == (server.model, "1")


def test_a_version_infers(rest: RestConnection, alone: Alone) -> None:
    reply = _post_to_version(rest, "1", ask(base64_text(png()), "<OD>").json_bytes())
    assert rest_outcome(reply).answers() == [alone(0, "<OD>")]


def test_the_metadata_names_the_version(rest: RestConnection) -> None:
    assert _get(rest, "")["versions"] == ["1"]


def test_the_grpc_metadata_names_the_version(grpc_connection: GrpcConnection, server: Target) -> None:
    metadata = grpc_connection.call("ModelMetadata", pb.ModelMetadataRequest(name=server.model))
    assert list(metadata.versions) == ["1"]


def _named(method: str, model: str, version: str) -> Any:
    if method == "ModelInfer":
        message = grpc_message(ask(png(), "<OD>"), model, raw=True)
        message.model_version = version
        return message
    return {"ModelReady": pb.ModelReadyRequest, "ModelMetadata": pb.ModelMetadataRequest}[method](
        name=model, version=version
    )


def test_a_version_infers_over_grpc(grpc_connection: GrpcConnection, server: Target, alone: Alone) -> None:
    message = _named("ModelInfer", server.model, "1")
    assert grpc_connection.infer(message).answers() == [alone(0, "<OD>")]


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata"])
def test_a_version_answers_as_the_model_does_over_grpc(
    grpc_connection: GrpcConnection, server: Target, method: str
) -> None:
    answers = [grpc_connection.call(method, _named(method, server.model, version)) for version in ("", "1")]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelInfer"])
def test_there_is_no_other_version_over_grpc(grpc_connection: GrpcConnection, server: Target, method: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        grpc_connection.call(method, _named(method, server.model, "2"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("suffix", ["", "/ready", "/config", "/stats"], ids=["metadata", "ready", "config", "stats"])
def test_there_is_no_other_version(rest: RestConnection, suffix: str) -> None:
    reply = rest.get(rest.target.path("/versions/2" + suffix))
    assert reply.status == 404, reply
    reply.error()
    rest.assert_alive()


def test_another_version_cannot_infer(rest: RestConnection) -> None:
    reply = _post_to_version(rest, "2", GOOD.json_bytes())
    assert reply.status == 404, reply
    reply.error()
    rest.assert_alive()


@pytest.mark.parametrize("suffix", ["/config", "/stats"])
def test_an_unknown_model_has_neither_configuration_nor_statistics(rest: RestConnection, suffix: str) -> None:
    reply = rest.get(rest.target.path(suffix, "no-such-model"))
    assert reply.status == 404, reply
    assert "no-such-model" in reply.error()
    rest.assert_alive()


def test_the_configuration_describes_the_model(rest: RestConnection, server: Target) -> None:
    config = _get(rest, "/config")
    assert config["name"] == server.model
    assert config["platform"] or config["backend"]
    assert config["max_batch_size"] >= 1
    assert isinstance(config["dynamic_batching"], dict)
    inputs = {tensor["name"]: tensor for tensor in config["input"]}
    outputs = {tensor["name"]: tensor for tensor in config["output"]}
    assert (set(inputs), set(outputs)) == (set(INPUTS), set(OUTPUTS))
    for tensor in (*inputs.values(), *outputs.values()):
        assert tensor["data_type"] == "TYPE_STRING"
        assert all(isinstance(size, int) for size in tensor["dims"])
    assert {name for name, tensor in inputs.items() if tensor.get("optional", False)} == {TEXT}


def test_a_batch_of_the_configured_size_is_answered(rest: RestConnection) -> None:
    rows = _get(rest, "/config")["max_batch_size"]
    batch = ask([base64_text(png())] * rows, ["<OCR>"] * rows, parameters={"max_new_tokens": 2})
    assert len(rest_outcome(rest.post(batch.json_body())).answers()) == rows
    more = ask([base64_text(png())] * (rows + 1), ["<OCR>"] * (rows + 1))
    outcome = rest_outcome(rest.post(more.json_body()))
    assert outcome.status == "invalid", outcome
    assert TASK in outcome.message


def test_statistics_have_tritons_form(rest: RestConnection, server: Target) -> None:
    assert rest_outcome(rest.post(GOOD.json_body())).status == "ok"
    statistics = _statistics(rest)
    assert statistics["name"] == server.model
    for name in ("last_inference", "inference_count", "execution_count"):
        assert type(statistics[name]) is int, name
        assert statistics[name] > 0, name
    for name in DURATIONS:
        duration = statistics["inference_stats"][name]
        assert {type(duration["count"]), type(duration["ns"])} == {int}, name
        assert min(duration["count"], duration["ns"]) >= 0, name
    assert isinstance(statistics["batch_stats"], list)
    assert all(batch["batch_size"] >= 1 for batch in statistics["batch_stats"])


def _rise(before: Any, after: Any, name: str) -> tuple[int, int]:
    """Returns by how much the count and the nanoseconds of `name` rose."""
    old, new = before["inference_stats"][name], after["inference_stats"][name]
    return new["count"] - old["count"], new["ns"] - old["ns"]


def test_statistics_rise_by_what_was_answered(rest: RestConnection) -> None:
    """At least by that: others may be asking too."""
    before = _statistics(rest)
    for _ in range(2):
        assert rest_outcome(rest.post(GOOD.json_body())).status == "ok"
    after = _statistics(rest)
    assert after["inference_count"] - before["inference_count"] >= 4, "two requests of two rows"
    assert after["execution_count"] > before["execution_count"]
    assert after["last_inference"] >= before["last_inference"]
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert _rise(before, after, name)[0] >= 2, name
    for name in ("success", "compute_input", "compute_infer"):
        assert _rise(before, after, name)[1] > 0, name


@pytest.mark.parametrize("kind", BAD)
def test_statistics_count_a_refusal_as_a_failure(rest: RestConnection, kind: str) -> None:
    before = _statistics(rest)
    assert rest.post(BAD[kind].json_body()).status == 400
    count, nanoseconds = _rise(before, _statistics(rest), "fail")
    assert count >= 1
    assert nanoseconds >= 0


def test_statistics_count_a_partial_answer_as_a_success(rest: RestConnection) -> None:
    before = _statistics(rest)
    request = ask([base64_text(noise()), base64_text(png())], ["<OD>"] * 2, parameters={**BRIEF, "partial": True})
    assert rest.post(request.json_body()).status == 200
    assert _rise(before, _statistics(rest), "success")[0] >= 1


def test_asking_for_statistics_counts_as_nothing(rest: RestConnection) -> None:
    """Seen as soon as nobody else asks anything between two looks."""
    looks = [_statistics(rest)["inference_stats"] for _ in range(4)]
    assert any(look == following for look, following in pairwise(looks))
