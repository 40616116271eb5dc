"""The clients that people use: requests, KServe's own, and Triton's, over REST and gRPC."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import kserve
import numpy as np
import pytest
import requests
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from .messages import SHORT, ask
from .pictures import base64_text, png
from .wires import GrpcConnection, Target

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


def _kserve_request(server: Target, image: Any, task: str = TASK) -> Any:
    """Returns a request of KServe's client; an array goes in binary form, a list as typed contents or JSON."""
    inputs = []
    for name, value in (("INPUT_IMAGE", image), ("TASK_PROMPT", task)):
        tensor = kserve.InferInput(name, [1, 1], "BYTES")
        if isinstance(image, bytes):
            element = value if isinstance(value, bytes) else value.encode()
            tensor.set_data_from_numpy(np.array([[element]], dtype=np.object_), binary_data=True)
        else:
            tensor.data = [value]
        inputs.append(tensor)
    return kserve.InferRequest(server.model, inputs, request_id="r-1", parameters=dict(SHORT))


def _kserve_rest(server: Target, use: Callable[[Any, dict[str, str]], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        config = kserve.RESTConfig(protocol="v2", timeout=server.timeout)
        async with kserve.InferenceRESTClient(config) as client:
            return await use(client, dict(server.headers))

    return asyncio.run(run())


@pytest.mark.parametrize("image", [base64_text(png()).decode(), png()], ids=["json", "binary"])
def test_kserve_rest_client(server: Target, alone: Alone, image: str | bytes) -> None:
    async def use(client: Any, headers: dict[str, str]) -> Any:
        assert await client.is_server_live(server.rest_url, headers)
        assert await client.is_server_ready(server.rest_url, headers)
        assert await client.is_model_ready(server.rest_url, server.model, headers)
        return await client.infer(server.rest_url, _kserve_request(server, image), server.model, headers)

    response = _kserve_rest(server, use)
    assert (response.id, response.model_name) == ("r-1", server.model)
    (output,) = response.outputs
    assert (output.name, output.shape) == ("PARSED_JSON", [1, 1])
    assert json.loads(output.data[0]) == alone(0, TASK)


def test_kserve_rest_client_sees_the_refusal(server: Target) -> None:
    async def use(client: Any, headers: dict[str, str]) -> Any:
        request = _kserve_request(server, base64_text(png()).decode(), "<DANCE>")
        return await client.infer(server.rest_url, request, server.model, headers)

    with pytest.raises(httpx.HTTPStatusError, match="TASK_PROMPT") as raised:
        _kserve_rest(server, use)
    assert raised.value.response.status_code == 400


def _kserve_grpc(server: Target, use: Callable[[Any], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        options = [("grpc.max_send_message_length", -1), *server.grpc_options()]
        async with kserve.InferenceGRPCClient(server.grpc_url, channel_args=options, timeout=server.timeout) as client:
            return await use(client)

    return asyncio.run(run())


@pytest.mark.usefixtures("grpc_connection")  # skips where there is no gRPC address
@pytest.mark.parametrize("image", [base64_text(png()).decode(), png()], ids=["typed", "raw"])
def test_kserve_grpc_client(server: Target, alone: Alone, image: str | bytes) -> None:
    metadata = server.grpc_metadata()

    async def use(client: Any) -> Any:
        assert await client.is_server_live(headers=metadata)
        assert await client.is_server_ready(headers=metadata)
        assert await client.is_model_ready(server.model, headers=metadata)
        return await client.infer(_kserve_request(server, image), headers=metadata)

    response = _kserve_grpc(server, use)
    assert (response.id, response.model_name) == ("r-1", server.model)
    (output,) = response.outputs
    assert (output.name, list(output.shape)) == ("PARSED_JSON", [1, 1])
    assert json.loads(output.as_numpy()[0, 0]) == alone(0, TASK)


@pytest.mark.usefixtures("grpc_connection")
def test_kserve_grpc_client_sees_the_refusal(server: Target) -> None:
    async def use(client: Any) -> Any:
        return await client.infer(_kserve_request(server, png(), "<DANCE>"), headers=server.grpc_metadata())

    with pytest.raises(grpc.RpcError) as raised:
        _kserve_grpc(server, use)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "TASK_PROMPT" in raised.value.details()


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
    scheme, _, address = server.rest_url.rstrip("/").partition("://")
    with triton.InferenceServerClient(
        address, ssl=scheme == "https", connection_timeout=server.timeout, network_timeout=server.timeout
    ) as client:
        yield client


def test_triton_http_client_health(server: Target, triton_http: Any) -> None:
    headers = dict(server.headers)
    assert triton_http.is_server_live(headers=headers)
    assert triton_http.is_server_ready(headers=headers)
    assert triton_http.is_model_ready(server.model, headers=headers)
    assert not triton_http.is_model_ready("no-such-model", headers=headers)
    assert triton_http.get_server_metadata(headers=headers)["name"]
    assert triton_http.get_model_metadata(server.model, headers=headers)["name"] == server.model


@pytest.mark.parametrize("binary_output", [True, False], ids=["binary output", "json output"])
@pytest.mark.parametrize("binary_input", [True, False], ids=["binary input", "json input"])
def test_triton_http_client(
    server: Target, triton_http: Any, alone: Alone, binary_input: bool, binary_output: bool
) -> None:
    image = png() if binary_input else base64_text(png())
    result = triton_http.infer(
        server.model,
        _triton_inputs(image, TASK, binary=binary_input),
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


def test_triton_http_client_goes_on_after_a_refusal(server: Target, triton_http: Any) -> None:
    extra = {"headers": dict(server.headers), "parameters": dict(SHORT)}
    for _ in range(2):
        with pytest.raises(InferenceServerException, match="TASK_PROMPT"):
            triton_http.infer(server.model, _triton_inputs(png(), "<DANCE>", binary=True), **extra)
        triton_http.infer(server.model, _triton_inputs(png(), TASK, binary=True), **extra)


def test_triton_grpc_client(server: Target, grpc_connection: GrpcConnection, alone: Alone) -> None:
    given = {
        "url": server.grpc_url,
        "model": server.model,
        "timeout": server.timeout,
        "metadata": server.grpc_metadata(),
        "options": server.grpc_options(),
        "picture": base64.b64encode(png()).decode(),
        "task": TASK,
        "parameters": dict(SHORT),
    }
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_grpc_program.py"))],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=30 + 10 * server.timeout,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    status, message = report.pop("refusal")
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "TASK_PROMPT" in message
    answer = alone(0, TASK)
    assert report == {
        "live": True,
        "ready": True,
        "model ready": True,
        "metadata": server.model,
        "raw": answer,
        "base64": answer,
        "chosen outputs": ["GENERATED_TEXT"],
        "id": "r-1",
    }
