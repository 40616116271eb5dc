"""What is particular to the clients that people use; that all of them get the same answers is in ``test_alike.py``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as triton

from .clients import CLIENTS, ClientWire, triton_http_client
from .messages import SHORT, ask
from .pictures import base64_text, png
from .wires import Target

Alone = Callable[..., Any]
TASK = "<OD>"


def test_requests(server: Target, alone: Alone) -> None:
    with requests.Session() as session:
        session.headers.update(server.headers)
        url = server.rest_url.rstrip("/") + server.path("/infer")
        for _ in range(2):
            bad = session.post(url, json=ask(base64_text(png()), "<DANCE>").json_body(), timeout=server.timeout)
            assert bad.status_code == 400
            assert "TASK_PROMPT" in bad.json()["error"]
            good = session.post(url, json=ask(base64_text(png()), TASK).json_body(), timeout=server.timeout)
            assert json.loads(good.json()["outputs"][0]["data"][0]) == alone(0, TASK)


@pytest.mark.parametrize("kind", CLIENTS, ids=lambda kind: kind.name)
def test_a_client_says_that_the_server_is_well(server: Target, kind: type[ClientWire]) -> None:
    if kind.over_grpc() and server.grpc_url is None:
        pytest.skip("no gRPC address: give --grpc-url or FLORENCE2_GRPC_URL")
    with kind(server) as client:
        assert client.health() == {"live": True, "ready": True, "model ready": True, "model": server.model}


def _triton_inputs(image: bytes, task: str, *, binary: bool) -> list[Any]:
    tensors = []
    for name, value in (("INPUT_IMAGE", image), ("TASK_PROMPT", task.encode())):
        tensor = triton.InferInput(name, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[value]], dtype=np.object_), binary_data=binary)
        tensors.append(tensor)
    return tensors


@pytest.fixture
def triton_http(server: Target) -> Any:
    """Triton's REST client."""
    with triton_http_client(server) as client:
        yield client


def test_triton_http_client_knows_no_other_model(server: Target, triton_http: Any) -> None:
    headers = dict(server.headers)
    assert triton_http.get_server_metadata(headers=headers)["name"]
    assert not triton_http.is_model_ready("no-such-model", headers=headers)


@pytest.mark.parametrize("binary_output", [True, False], ids=["binary output", "json output"])
@pytest.mark.parametrize("binary_input", [True, False], ids=["binary input", "json input"])
@pytest.mark.parametrize("version", ["", "1"], ids=["no version", "version 1"])
def test_triton_http_client(
    server: Target, triton_http: Any, alone: Alone, binary_input: bool, binary_output: bool, version: str
) -> None:
    image = png() if binary_input else base64_text(png())
    result = triton_http.infer(
        server.model,
        _triton_inputs(image, TASK, binary=binary_input),
        model_version=version,
        outputs=[triton.InferRequestedOutput("PARSED_JSON", binary_data=binary_output)],
        request_id="r-1",
        headers=dict(server.headers),
        parameters=dict(SHORT),
    )
    assert result.get_response()["id"] == "r-1"
    assert json.loads(result.as_numpy("PARSED_JSON")[0, 0]) == alone(0, TASK)


def test_triton_http_client_as_it_comes(server: Target, triton_http: Any) -> None:
    """Nothing but inputs: the client then asks for binary outputs itself."""
    headers = dict(server.headers)
    result = triton_http.infer(server.model, _triton_inputs(png(), TASK, binary=True), headers=headers)
    assert TASK in json.loads(result.as_numpy("PARSED_JSON")[0, 0])


@pytest.mark.parametrize("version", ["", "1"], ids=["no version", "version 1"])
def test_triton_http_client_reads_configuration_and_statistics(server: Target, triton_http: Any, version: str) -> None:
    named: dict[str, Any] = {"model_version": version, "headers": dict(server.headers)}
    assert triton_http.is_model_ready(server.model, **named)
    assert triton_http.get_model_metadata(server.model, **named)["name"] == server.model
    assert triton_http.get_model_config(server.model, **named)["name"] == server.model
    (statistics,) = triton_http.get_inference_statistics(server.model, **named)["model_stats"]
    assert statistics["name"] == server.model
