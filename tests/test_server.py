"""The servers as processes: what happens on their way up, down, and when something breaks."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from florence2_kserve.client import Florence2Client, UnavailableError
from florence2_kserve.local import LocalService, free_port

BASE_PYTHON = Path(__file__).parents[1] / ".venv-base" / "bin" / "python"
NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
RUN_CLI = "from florence2_kserve.cli import main; main()"


def picture(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, "PNG")
    return buffer.getvalue()


def body(image: bytes | str | None = None, task: str = "<CAPTION>", **parameters: Any) -> dict[str, Any]:
    image = picture() if image is None else image
    text = base64.b64encode(image).decode() if isinstance(image, bytes) else image
    tensors = {"INPUT_IMAGE": text, "TASK_PROMPT": task}
    inputs = [{"name": n, "shape": [1, 1], "datatype": "BYTES", "data": [v]} for n, v in tensors.items()]
    return {"id": "1", "inputs": inputs, "parameters": parameters}


def infer_url(service: LocalService) -> str:
    return f"{service.rest_url}/v2/models/florence2/infer"


def test_an_error_leaves_the_keep_alive_connection_usable(service):
    connection = http.client.HTTPConnection("127.0.0.1", service.http_port, timeout=60)
    path = "/v2/models/florence2/infer"
    connection.request("POST", path, json.dumps(body()))
    assert connection.getresponse().read()
    used = connection.sock
    for bad in ["{", json.dumps(body("%%%")), json.dumps(body(task="<NONE>")), json.dumps({"inputs": []})] * 3:
        connection.request("POST", path, bad)
        response = connection.getresponse()
        assert response.status == 400
        assert json.loads(response.read())["error"]
        connection.request("POST", path, json.dumps(body()))
        response = connection.getresponse()
        assert response.status == 200
        response.read()
        assert connection.sock is used, "the server closed the connection"
    connection.close()


def test_a_body_over_the_limit_is_refused_with_413_and_the_connection_lives():
    flags = {"predictor_host": "127.0.0.1:1", "max_body_mib": 0.1}
    with LocalService("transformer", wait=False, **flags) as small, requests.Session() as session:
        for data in (b"x" * 150_000, iter([b"x" * 60_000] * 3)):
            response = session.post(infer_url(small), data=data, timeout=20)
            assert (response.status_code, "over the limit of 104857 bytes" in response.text) == (413, True)
        assert session.get(f"{small.rest_url}/v2/health/live", timeout=20).status_code == 200


def test_an_image_over_the_limits_is_refused_with_413():
    flags = {"predictor_host": "127.0.0.1:1", "max_image_megapixels": 0.01, "max_image_mib": 0.01}
    with LocalService("transformer", wait=False, **flags) as small:
        for image in (picture((200, 200)), os.urandom(20_000)):
            response = requests.post(infer_url(small), json=body(image), timeout=20)
            assert response.status_code == 413, response.text
            assert "INPUT_IMAGE, row 0" in response.json()["error"]


def test_clients_may_not_unload_the_model(service):
    for verb in ("load", "unload"):
        response = requests.post(f"{service.rest_url}/v2/repository/models/florence2/{verb}", timeout=20)
        assert (response.status_code, "open_model_repository" in response.json()["error"]) == (403, True)
    assert requests.get(f"{service.rest_url}/v2/models/florence2/ready", timeout=20).status_code == 200


def test_a_transformer_without_predictor_is_ready_and_answers_503_with_retry_after():
    with LocalService("transformer", predictor_host=f"127.0.0.1:{free_port()}", predictor_request_retries=1) as alone:
        response = requests.post(infer_url(alone), json=body(), timeout=30)
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert "predictor" in response.json()["error"]
        with Florence2Client(f"grpc://{alone.grpc_url}", retries=0) as client:
            with pytest.raises(UnavailableError) as caught:
                client.infer(picture(), "<CAPTION>")
            assert caught.value.retry_after_s == 1


def test_probes_that_go_well_are_not_logged():
    with LocalService("transformer", predictor_host="127.0.0.1:1", predictor_request_retries=0) as alone:
        for path in (
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/florence2/ready",
            "/metrics",
            "/v2/models/florence2",
        ):
            assert requests.get(f"{alone.rest_url}{path}", timeout=20).status_code == 200
        assert requests.get(f"{alone.rest_url}/v2/models/other/ready", timeout=20).status_code == 404
        assert requests.post(infer_url(alone), json=body(), timeout=20).status_code == 503
        asked = [line.split('"')[1].split()[1] for line in alone.log_tail(1000).splitlines() if "HTTP/1.1" in line]
    assert asked == ["/v2/models/florence2", "/v2/models/other/ready", "/v2/models/florence2/infer"]


def test_a_predictor_lives_but_is_not_ready_before_its_weights_are_loaded():
    with LocalService("predictor", wait=False) as predictor:
        seen = {"live": set(), "ready": set(), "grpc": set()}
        with Florence2Client(f"grpc://{predictor.grpc_url}") as client:
            end = time.monotonic() + 120
            while not seen["ready"] or not max(seen["ready"]):
                assert time.monotonic() < end
                seen["live"].add(requests.get(f"{predictor.rest_url}/v2/health/live", timeout=10).status_code)
                ready = requests.get(f"{predictor.rest_url}/v2/models/florence2/ready", timeout=10).status_code
                seen["ready"].add(ready == 200)
                if ready != 200:
                    assert ready == 503
                    seen["grpc"].add(client.is_ready())
                time.sleep(0.02)
            assert seen["live"] == {200}
            assert seen["ready"] == {True, False}, "it was ready at once: nothing was seen of the loading"
            assert client.is_ready()


def test_health_over_grpc(service):
    with grpc.insecure_channel(service.grpc_url) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "liveness", "florence2", "inference.GRPCInferenceService"):
            status = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        first = next(iter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)))
        assert first.status == health_pb2.HealthCheckResponse.SERVING


def test_a_request_in_flight_at_sigterm_is_answered_and_readiness_falls_first():
    with LocalService(drain_seconds=2) as service:
        answers: list[requests.Response] = []
        # A long answer on a busy machine: many beams, and enough of them queued to outlast the signal.
        request = body(task="<MORE_DETAILED_CAPTION>", num_beams=8)
        threads = [
            threading.Thread(
                target=lambda: answers.append(requests.post(infer_url(service), json=request, timeout=60))
            )
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        drained = requests.get(f"{service.rest_url}/v2/health/ready", timeout=10)
        assert drained.status_code == 503
        assert drained.json() == {"error": "draining"}
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 12
        assert service.process.wait(60) == 0


def test_a_client_that_goes_away_does_not_harm_others(service):
    data = json.dumps(body(num_beams=8)).encode()
    head = f"POST /v2/models/florence2/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    for sent in (head + data, head + data[: len(data) // 2]):
        with socket.create_connection(("127.0.0.1", service.http_port), timeout=10) as connection:
            connection.sendall(sent)
    assert requests.post(infer_url(service), json=body(), timeout=60).status_code == 200


@pytest.mark.slow  # starts servers
def test_serve_ends_when_its_predictor_does():
    with LocalService() as service:
        assert service.process is not None
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children}
        predictor = next(pid for pid, words in commands.items() if b"predictor" in words)
        os.kill(predictor, signal.SIGKILL)
        assert service.process.wait(60) != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in commands), "a child was left running"


def test_a_killed_serve_leaves_no_child():
    with LocalService() as service:
        assert service.process is not None
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
        assert len(children) == 2
        service.process.kill()
        service.process.wait()
        end = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            assert time.monotonic() < end, "a child was left running"
            time.sleep(0.1)


def test_a_full_queue_is_429_with_retry_after_and_others_are_answered():
    with LocalService(max_queue_size=1, max_rows=1, max_batch_size=1) as service:
        answers: list[requests.Response] = []
        request = body(task="<MORE_DETAILED_CAPTION>", num_beams=8)

        def ask() -> None:
            answers.append(requests.post(infer_url(service), json=request, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert all("queue is full" in answer.json()["error"] for answer in refused)
        assert {answer.status_code for answer in answers} == {200, 429}


@pytest.mark.parametrize(
    "path", ["/v1/models/florence2:predict", "/v1/models/florence2:explain", "/v2/models/florence2/versions/1/explain"]
)
def test_other_protocols_are_refused_unread(service, path):
    response = requests.post(service.rest_url + path, data=b"{", timeout=20)
    assert response.status_code == 404
    assert "/v2/models/<model>/infer" in response.json()["error"]


def test_headers_that_grpc_cannot_carry_do_no_harm(service):
    headers = {"x-request-id": "caf\u00e9".encode("latin-1"), "traceparent": "00-ab-cd-01"}
    assert requests.post(infer_url(service), json=body(), headers=headers, timeout=60).status_code == 200


def test_images_that_make_too_large_a_message_are_refused_with_413():
    flags = {"predictor_host": "127.0.0.1:1", "grpc_max_send_message_length": 50_000}
    with LocalService("transformer", wait=False, **flags) as small:
        response = requests.post(infer_url(small), json=body(), timeout=20)
        assert response.status_code == 413
        assert "send fewer at once" in response.json()["error"]


@pytest.mark.slow  # starts servers
@pytest.mark.parametrize("flags", [{"model": "/no/such/folder"}, {"device": "cuda:7"}])
def test_a_predictor_that_cannot_load_ends_with_the_reason(flags):
    if flags.get("device") == "cuda:7":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("here is a GPU")
    predictor = LocalService("predictor", **flags)
    with pytest.raises(RuntimeError, match=r"ended while starting") as caught, predictor:
        pass
    assert next(iter(flags.values())) in str(caught.value)
    assert predictor.process is not None
    assert predictor.process.returncode == 1


@pytest.mark.slow  # starts servers
@pytest.mark.parametrize("command", ["transformer", "predictor"])
def test_an_empty_volume_ends_a_server_with_one_line_that_says_so(command, tmp_path):
    host = {"predictor_host": "127.0.0.1:1"} if command == "transformer" else {}
    server = LocalService(command, model=tmp_path, **host)
    with pytest.raises(RuntimeError, match=r"ended while starting") as caught, server:
        pass
    says = f"error: model '{tmp_path}' lacks config.json; {tmp_path} holds nothing"
    assert str(caught.value).splitlines()[-1] == says
    assert server.process is not None
    assert server.process.returncode == 1


@pytest.mark.parametrize(
    "python",
    [
        pytest.param((sys.executable, "-c", NO_TORCH + RUN_CLI), id="torch-blocked", marks=pytest.mark.slow),
        pytest.param(
            (str(BASE_PYTHON), "-c", RUN_CLI),
            id="base-install",
            marks=pytest.mark.skipif(not BASE_PYTHON.exists(), reason="make setup installs .venv-base"),
        ),
    ],
)
def test_the_transformer_starts_and_answers_without_torch(python):
    with LocalService("predictor") as predictor:
        if python[0] == str(BASE_PYTHON):
            import subprocess

            has_torch = subprocess.run([python[0], "-c", "import torch"], capture_output=True, check=False)
            assert has_torch.returncode != 0, "the base install holds torch"
        with LocalService("transformer", python=python, predictor_host=predictor.grpc_url) as transformer:
            answer = requests.post(infer_url(transformer), json=body(), timeout=60).json()
            assert json.loads(answer["outputs"][0]["data"][0]).keys() == {"<CAPTION>"}
