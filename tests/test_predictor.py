"""The predictor between protocol and engine: keys, errors, and what follows when the engine breaks."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
from kserve.protocol.infer_type import InferRequest, InferResponse
from prometheus_client import REGISTRY, generate_latest

from florence2_kserve import errors, predictor
from florence2_kserve.engine import interface
from florence2_kserve.engine.interface import Engine, EngineStopped, GenerationRequest, GenerationResult
from florence2_kserve.engine.metrics import EngineMetrics
from florence2_kserve.local import LocalService
from florence2_kserve.model_files import locate_model
from florence2_kserve.predictor import Florence2Predictor, image_key
from florence2_kserve.processor import Processor
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.internal import GenerateCall
from florence2_kserve.protocol.public import GenerationOptions
from florence2_kserve.server import TruthfulDataPlane
from florence2_kserve.settings import Settings

from . import breaking_predictor

PROCESSOR = Processor.load(locate_model("embedded", with_weights=False))
HEIGHT, WIDTH = PROCESSOR.image.height, PROCESSOR.image.width
RESULT = GenerationResult(np.array([2, 0, 9, 2]), -0.5, np.zeros(4, np.float32), "stop", 0.25, 0.5)

Answer = Callable[[GenerationRequest], GenerationResult | BaseException | None]


class ScriptedEngine(Engine):
    """Answers each request after its warm-up with what `answer` returns or raises; None leaves it waiting."""

    def __init__(self, answer: Answer, on_fatal: Callable[[BaseException], None]) -> None:
        self.answer: Answer = lambda request: RESULT
        self.after_warm_up = answer
        self.on_fatal = on_fatal
        self.metrics = EngineMetrics()
        self.requests: list[GenerationRequest] = []
        self.futures: list[Future[GenerationResult]] = []
        self.healthy, self.closed = True, False

    def submit(self, requests: list[GenerationRequest]) -> list[Future[GenerationResult]]:
        futures: list[Future[GenerationResult]] = [Future() for _ in requests]
        self.requests, self.futures = requests, futures
        for request, future in zip(requests, futures, strict=True):
            answer = self.answer(request)
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            elif answer is not None:
                future.set_result(answer)
        self.answer = self.after_warm_up
        return futures

    @property
    def is_healthy(self) -> bool:
        return self.healthy

    def close(self) -> None:
        self.closed, self.healthy = True, False


class Running:
    """A predictor on a ScriptedEngine, started in the running event loop."""

    def __init__(self, answer: Answer = lambda request: RESULT, **settings: Any) -> None:
        self._answer = answer
        self.predictor = Florence2Predictor(Settings(**settings), self._build)

    def _build(self, settings: Settings, on_fatal: Callable[[BaseException], None]) -> tuple[Engine, Processor]:
        self.engine = ScriptedEngine(self._answer, on_fatal)
        return self.engine, PROCESSOR

    async def __aenter__(self) -> Running:
        self.task = asyncio.create_task(self.predictor.start_engine())
        while not await self.predictor.healthy():
            await asyncio.wait({self.task}, timeout=0.01)
            assert not self.task.done()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await asyncio.to_thread(self.predictor.stop)

    async def ask(self, call: GenerateCall) -> InferResponse:
        message = wire.infer_request("florence2", call.to_tensors(), parameters=call.to_parameters())
        parsed = ModelInferRequest.FromString(message.SerializeToString())
        return await self.predictor.predict(InferRequest.from_grpc(parsed))


def call(
    images: np.ndarray[Any, Any] | None = None,
    *,
    rows: int = 1,
    keys: list[bytes] | None = None,
    max_new_tokens: int = 10,
    timeout_ms: int | None = None,
    partial: bool = False,
) -> GenerateCall:
    pixels = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8) if images is None else images
    return GenerateCall(
        pixel_values=pixels,
        image_keys=keys or [b"key"] * len(pixels),
        input_ids=[np.array([0, 5, 2])] * rows,
        image_index=[row % len(pixels) for row in range(rows)],
        max_new_tokens=[max_new_tokens + row for row in range(rows)],
        options=GenerationOptions(timeout_ms=timeout_ms, partial=partial),
    )


def test_the_key_is_of_shape_and_pixels():
    pixels = np.arange(2 * 6 * 3, dtype=np.uint8).reshape(2, 6, 3)
    changed = pixels.copy()
    changed[1, 5, 2] += 1
    keys = [image_key(image) for image in (pixels, pixels.reshape(6, 2, 3), pixels[::-1], changed)]
    assert len(set(keys)) == 4
    assert image_key(np.asfortranarray(pixels)) == keys[0]


def test_keys_come_from_pixels_whatever_the_caller_says(monkeypatch):
    images = np.zeros((3, HEIGHT, WIDTH, 3), np.uint8)
    images[1] = 1
    threads: list[threading.Thread] = []

    def note(pixel_values):
        threads.append(threading.current_thread())
        return image_key(pixel_values)

    async def ask() -> list[bytes]:
        async with Running() as running:
            monkeypatch.setattr(predictor, "image_key", note)
            await running.ask(call(images, rows=6, keys=[b"same", b"same", b"other"]))
            return [request.image_key for request in running.engine.requests]

    keys = asyncio.run(ask())
    assert keys == [image_key(images[0]), image_key(images[1]), image_key(images[0])] * 2
    assert keys[0] != keys[1]
    assert len(threads) == 3, "an image was hashed more than once"
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (interface.OutOfMemory("no room for it"), errors.Unavailable, "row 1: no room for it"),
        (interface.NonFiniteOutput("the model gave NaN"), errors.RowFailed, "row 1: the model gave NaN"),
        (ZeroDivisionError("secret"), errors.RowFailed, "row 1: internal error: ZeroDivisionError"),
        (TimeoutError("secret"), errors.RowFailed, "row 1: internal error: TimeoutError"),
        (interface.DeadlineExceeded("late"), errors.DeadlineExceeded, "no answer within 600 s"),
        (EngineStopped("the engine is closed"), errors.Unavailable, "the engine is closed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_rows_error_is_reported_and_drops_the_requests_other_rows(error, expected, says):
    async def ask() -> list[bool]:
        async with Running(lambda request: error if request.max_new_tokens == 11 else None) as running:
            with pytest.raises(errors.ServiceError) as caught:
                await running.ask(call(rows=3))
            assert type(caught.value) is expected
            assert str(caught.value) == says
            # At once, and not only as the event loop ends.
            return [future.cancelled() for future in running.engine.futures]

    assert asyncio.run(ask()) == [True, False, True]


def outputs(response: InferResponse) -> dict[str, list[Any]]:
    return {output.name: output.data.tolist() for output in response.outputs}


def test_rows_of_a_partial_call_fail_alone():
    """Of four rows one has no room, one gives NaN, one takes too long, and one is answered all the same."""
    by_limit = {
        10: interface.OutOfMemory("no room for it"),
        11: interface.NonFiniteOutput("the model gave NaN"),
        12: None,
        13: RESULT,
        14: ZeroDivisionError("secret"),
        15: interface.DeadlineExceeded("late"),
    }

    async def ask() -> tuple[InferResponse, list[bool]]:
        async with Running(lambda request: by_limit[request.max_new_tokens]) as running:
            response = await running.ask(call(rows=len(by_limit), partial=True, timeout_ms=200))
            return response, [future.cancelled() for future in running.engine.futures]

    response, cancelled = asyncio.run(ask())
    columns = outputs(response)
    assert columns["error"] == [
        b"UNAVAILABLE no room for it",
        b"INTERNAL the model gave NaN",
        b"DEADLINE_EXCEEDED no answer within 0.2 s",
        b"",
        b"INTERNAL internal error: ZeroDivisionError",
        b"DEADLINE_EXCEEDED no answer within 0.2 s",
    ]
    assert columns["finish_reason"] == [b"error"] * 3 + [b"stop"] + [b"error"] * 2
    assert columns["sequences"][3] == RESULT.sequence.tolist()
    assert cancelled == [False, False, True, False, False, False]
    assert response.parameters == {"queue_us": 250_000, "generate_us": 500_000}


def test_a_partial_call_whose_engine_ends_fails_whole_so_that_another_predictor_is_asked():
    async def ask() -> None:
        stopped = EngineStopped("the engine is closed")
        async with Running(lambda request: stopped if request.max_new_tokens == 11 else RESULT) as running:
            with pytest.raises(errors.Unavailable, match="the engine is closed"):
                await running.ask(call(rows=2, partial=True))

    asyncio.run(ask())


def test_a_partial_call_without_a_failure_is_answered_as_any():
    async def ask(partial: bool) -> InferResponse:
        async with Running() as running:
            return await running.ask(call(rows=2, partial=partial))

    assert outputs(asyncio.run(ask(True))) == outputs(asyncio.run(ask(False)))


def test_a_partial_call_may_fail_in_all_its_rows():
    async def ask() -> InferResponse:
        async with Running(lambda request: interface.OutOfMemory("no room")) as running:
            return await running.ask(call(rows=2, partial=True))

    columns = outputs(asyncio.run(ask()))
    assert columns["error"] == [b"UNAVAILABLE no room"] * 2
    assert columns["sequences"] == [[], []]


def test_what_a_row_may_say_has_the_right_status():
    assert (errors.RowFailed(1, "x").http_status, errors.RowFailed(1, "x").status_code) == (
        500,
        grpc.StatusCode.INTERNAL,
    )
    assert errors.Unavailable("x").headers == {"Retry-After": "1"}


def test_one_requests_bad_row_is_no_other_requests_business():
    async def ask() -> list[Any]:
        bad = interface.NonFiniteOutput("the model gave NaN")
        async with Running(lambda request: bad if request.max_new_tokens == 11 else RESULT) as running:
            asked = [running.ask(call(rows=2)), running.ask(call(max_new_tokens=50)), running.ask(call(rows=2))]
            return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert isinstance(first, errors.RowFailed)
    assert isinstance(second, InferResponse)
    assert isinstance(third, errors.RowFailed)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (interface.InvalidRequest("input_ids", "too long"), errors.BadTensor),
        (interface.QueueFull("9 rows wait"), errors.QueueFull),
        (EngineStopped("closed"), errors.Unavailable),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_engine_refuses_is_reported(error, expected):
    def refuse(request: GenerationRequest) -> None:
        raise error

    async def ask() -> None:
        async with Running(refuse) as running:
            with pytest.raises(errors.ServiceError) as caught:
                await running.ask(call())
            assert type(caught.value) is expected
            assert str(error) in str(caught.value)

    asyncio.run(ask())


def test_a_request_whose_time_is_over_is_dropped():
    async def ask() -> ScriptedEngine:
        async with Running(lambda request: None) as running:
            with pytest.raises(errors.DeadlineExceeded, match=r"0\.05 s"):
                await running.ask(call(rows=2, timeout_ms=50))
            return running.engine

    engine = asyncio.run(ask())
    assert all(future.cancelled() for future in engine.futures)
    assert all(request.deadline is not None and request.deadline < time.monotonic() for request in engine.requests)


def test_a_request_whose_caller_goes_is_dropped():
    async def ask() -> ScriptedEngine:
        async with Running(lambda request: None) as running:
            task = asyncio.create_task(running.ask(call(rows=2)))
            while len(running.engine.futures) != 2:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            return running.engine

    assert all(future.cancelled() for future in asyncio.run(ask()).futures)


async def health(plane: TruthfulDataPlane) -> dict[str, bool]:
    return {
        "live": await plane.live() == {"status": "alive"},
        "ready": await plane.ready(),
        "model": await plane.model_ready("florence2"),
    }


def plane_of(running: Running) -> TruthfulDataPlane:
    from kserve import ModelRepository

    registry = ModelRepository()
    registry.update(running.predictor)
    return TruthfulDataPlane(model_registry=registry)


def test_a_fatal_error_ends_health_at_once_and_the_server_soon(monkeypatch, caplog):
    monkeypatch.setattr(predictor, "_LAST_WORDS_S", 0.05)
    monkeypatch.setattr(predictor.logger, "propagate", True)

    async def run() -> ScriptedEngine:
        async with Running() as running:
            plane = plane_of(running)
            assert set((await health(plane)).values()) == {True}
            error = RuntimeError("CUDA error: device-side assert triggered\n  second line\n")
            # No turn of the event loop lies between the error and what is asked next.
            thread = threading.Thread(target=running.engine.on_fatal, args=(error,))
            thread.start()
            thread.join()
            assert set((await health(plane)).values()) == {False}
            reason = "the engine is beyond repair: RuntimeError: CUDA error: device-side assert triggered second line"
            assert plane.failure == reason
            with pytest.raises(EngineStopped, match="beyond repair: RuntimeError: CUDA error"):
                await asyncio.wait_for(running.task, 30)
            return running.engine

    with caplog.at_level(logging.CRITICAL, logger=predictor.logger.name):
        engine = asyncio.run(run())
    assert not engine.closed, "closing waits for a thread that may hang in the driver"
    critical = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(critical) == 1
    assert "device-side assert triggered second line" in critical[0]


def test_requests_after_a_fatal_error_are_told_why():
    def stopped(request: GenerationRequest) -> GenerationResult:
        raise EngineStopped("the engine is stopped")

    async def run() -> None:
        async with Running(stopped) as running:
            running.engine.on_fatal(RuntimeError("CUDA error"))
            with pytest.raises(errors.Unavailable, match="beyond repair: RuntimeError: CUDA error"):
                await running.ask(call())

    asyncio.run(run())


def test_a_fatal_error_while_warming_up_is_what_the_server_ends_with():
    class Dying(ScriptedEngine):
        def submit(self, requests):
            self.on_fatal(RuntimeError("CUDA error"))
            raise EngineStopped("the engine was stopped")

        def close(self):
            raise AssertionError("a broken engine was closed")

    model = Florence2Predictor(Settings(), lambda settings, on_fatal: (Dying(lambda _: RESULT, on_fatal), PROCESSOR))
    with pytest.raises(EngineStopped):
        asyncio.run(model.start_engine())
    assert model.failure == "the engine is beyond repair: RuntimeError: CUDA error"


def test_an_engine_that_fails_its_warm_up_is_closed():
    engines: list[ScriptedEngine] = []

    def build(settings, on_fatal):
        engines.append(ScriptedEngine(lambda request: RESULT, on_fatal))
        engines[0].answer = lambda request: interface.OutOfMemory("no room")
        return engines[0], PROCESSOR

    model = Florence2Predictor(Settings(), build)
    with pytest.raises(interface.OutOfMemory):
        asyncio.run(model.start_engine())
    assert engines[0].closed
    assert not asyncio.run(model.healthy())


def test_an_engine_that_ended_by_itself_is_not_alive_but_one_that_was_stopped_is():
    async def run() -> None:
        async with Running() as running:
            plane = plane_of(running)
            running.engine.healthy = False
            assert await health(plane) == {"live": False, "ready": False, "model": False}
            assert plane.failure == "the engine has ended"
            running.engine.healthy = True
            running.predictor.stop()
            assert running.engine.closed
            assert await health(plane) == {"live": True, "ready": False, "model": False}

    asyncio.run(run())


def scraped(name: str) -> str | None:
    lines = generate_latest(REGISTRY).decode().splitlines()
    return next((line.split()[1] for line in lines if line.startswith(f"{name} ")), None)


def test_the_engines_metrics_are_served_while_it_runs():
    async def run(steps: int) -> None:
        async with Running() as running:
            running.engine.metrics.decode_steps.add(steps)
            assert scraped("florence2_engine_decode_steps_total") == f"{steps}.0"

    for steps in (3, 5):
        asyncio.run(run(steps))
        assert scraped("florence2_engine_decode_steps_total") is None


def test_the_engine_gets_what_the_settings_say(monkeypatch):
    seen: dict[str, Any] = {}
    monkeypatch.setitem(
        sys.modules,
        "florence2_kserve.engine.engine",
        SimpleNamespace(InflightEngine=lambda *positional, **named: seen.update(named, positional=positional)),
    )
    settings = Settings(
        max_batch_size=5,
        max_decode_rows=17,
        max_decode_tokens=99,
        max_queue_size=77,
        admission_delay_us=150,
        vision_batch_size=3,
        vision_backend="timm",
        compile_vision=True,
        decode_capture="compile",
        feature_cache_mib=2,
    )
    on_fatal = print
    _, processor = predictor.build_engine(settings, on_fatal)
    loaded, image = seen.pop("positional")
    assert (loaded.reference, image) == ("embedded", processor.image)
    assert seen == {
        "max_batch_size": 5,
        "max_rows": 17,
        "max_tokens": 99,
        "max_queue_size": 77,
        "admission_delay": 150e-6,
        "vision_batch_size": 3,
        "vision_backend": "timm",
        "compile_vision": True,
        "decode_capture": "compile",
        "feature_cache_bytes": 2 * 2**20,
        "on_fatal": on_fatal,
    }
    monkeypatch.undo()
    from florence2_kserve.engine.engine import InflightEngine

    inspect.signature(InflightEngine).bind(loaded, image, **seen)


@pytest.fixture
def breaking():
    """The real ``florence2 predictor`` as a process, on an engine that breaks on demand."""
    python = (sys.executable, "-m", breaking_predictor.__name__)
    with LocalService("predictor", python=python, grace_period=5) as running:
        yield running


def rest_body(call: GenerateCall) -> dict[str, Any]:
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
            "data": [value.decode() if isinstance(value, bytes) else value for value in tensor.data.ravel().tolist()],
        }
        for tensor in call.to_tensors()
    ]
    return {"inputs": inputs, "parameters": call.to_parameters()}


def test_a_broken_device_ends_the_process_and_resets_no_request(breaking):
    url = f"{breaking.rest_url}/v2/models/florence2/infer"

    def rest(max_new_tokens: int) -> int:
        response = requests.post(url, json=rest_body(call(max_new_tokens=max_new_tokens)), timeout=60)
        if response.status_code == 503:
            assert response.headers["Retry-After"]
        return response.status_code

    def get(path: str) -> int:
        return requests.get(breaking.rest_url + path, timeout=60).status_code

    with grpc.insecure_channel(breaking.grpc_url) as channel, ThreadPoolExecutor(16) as pool:

        def over_grpc(max_new_tokens: int) -> str:
            message = wire.infer_request("florence2", call(max_new_tokens=max_new_tokens).to_tensors())
            try:
                wire.rpc(channel, "ModelInfer")(message, timeout=60)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

        def grpc_health() -> list[bool]:
            health_stub = health_pb2_grpc.HealthStub(channel)
            statuses = [
                health_stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60).status
                for name in ("liveness", "", "florence2", "inference.GRPCInferenceService")
            ]
            parameters = {"ServerLive": {}, "ServerReady": {}, "ModelReady": {"name": "florence2"}}
            answers = [
                wire.rpc(channel, method)(wire.MESSAGES[f"{method}Request"](**fields), timeout=60)
                for method, fields in parameters.items()
            ]
            serving = [status == health_pb2.HealthCheckResponse.SERVING for status in statuses]
            return [*serving, answers[0].live, answers[1].ready, answers[2].ready]

        paths = ["/v2/health/live", "/v2/health/ready", "/v2/models/florence2/ready"]
        assert [get(path) for path in paths] == [200] * 3
        assert grpc_health() == [True] * 7
        assert (rest(10), over_grpc(10)) == (200, "OK")

        waiting = [pool.submit(ask, breaking_predictor.HOLD) for ask in (rest, over_grpc) * 4]
        end = time.monotonic() + 60
        while (
            "florence2_engine_requests_running 8.0"
            not in requests.get(f"{breaking.rest_url}/metrics", timeout=60).text.splitlines()
        ):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not any(future.done() for future in waiting)

        assert rest(breaking_predictor.BREAK) == 503
        assert [get(path) for path in paths] == [503] * 3
        assert grpc_health() == [False] * 7
        assert [future.result() for future in waiting] == [503, "UNAVAILABLE"] * 4
        assert (rest(10), over_grpc(10)) == (503, "UNAVAILABLE")
        assert breaking.process.poll() is None, "it ended before anyone could hear why"

        # Those who go on asking are refused or find nobody, but none is cut off.
        heard = []
        while breaking.process.poll() is None:
            assert time.monotonic() < end
            try:
                heard.append(str(rest(10)))
            except requests.ConnectionError as error:
                heard.append("refused" if "Connection refused" in str(error) else str(error))
    assert set(heard) <= {"503", "refused"}
    assert breaking.process.returncode == 1
    critical = [line for line in breaking.log_tail(lines=1000).splitlines() if "CRITICAL" in line]
    assert len(critical) == 1
    assert "RuntimeError: CUDA error: device-side assert triggered" in critical[0]


def test_the_programs_last_words_fit_what_it_stands_for():
    """The program waits longer than the predictor does; all else in it is the predictor's own."""
    assert Path(breaking_predictor.__file__).read_text().count("_LAST_WORDS_S =") == 1
    assert 1 <= predictor._LAST_WORDS_S <= 2 < breaking_predictor.LAST_WORDS_S
