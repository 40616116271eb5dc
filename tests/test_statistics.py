"""What Prometheus and Triton's statistics extension are told of requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kserve.protocol.infer_type import InferInput, InferOutput, InferRequest, InferResponse
from prometheus_client import REGISTRY

from florence2_kserve.errors import BadRequest
from florence2_kserve.statistics import CountedModel, model_statistics

IMAGES = InferInput("pictures", [3], "BYTES", [""] * 3)
REQUEST = InferRequest("counted", [InferInput("other", [7], "BYTES", [""] * 7), IMAGES])
TIMES = {"queue_us": 2, "preprocess_us": 30, "generate_us": 400, "postprocess_us": 5000}


class Scripted(CountedModel):
    """Answers three images with the times above, after doing what it was told to."""

    image_input = "pictures"

    def __init__(self, name: str, do: Any = None) -> None:
        super().__init__(name)
        self._do = do

    def validate(self, payload: Any) -> Any:
        return payload

    async def preprocess(self, payload: Any, headers: dict[str, str] | None = None) -> Any:
        if isinstance(self._do, BaseException):
            raise self._do
        if self._do is not None:
            await asyncio.sleep(self._do)
        return payload

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> Any:
        output = InferOutput("PARSED_JSON", [6, 1], "BYTES", [""] * 6)
        return InferResponse("1", self.name, [output], parameters=dict(TIMES))


def durations(name: str) -> dict[str, tuple[int, int]]:
    stats = model_statistics(name, "1")["inference_stats"]
    return {phase: (value["count"], value["ns"]) for phase, value in stats.items()}


def test_a_model_that_was_never_asked_has_zeros_of_everything():
    stats = model_statistics("never asked", "1")
    assert (stats["name"], stats["version"], stats["last_inference"]) == ("never asked", "1", 0)
    assert (stats["inference_count"], stats["execution_count"], stats["batch_stats"]) == (0, 0, [])
    phases = [
        "success",
        "fail",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
        "cache_hit",
        "cache_miss",
    ]
    assert durations("never asked") == dict.fromkeys(phases, (0, 0))


def test_answers_are_counted_with_their_phases():
    async def ask() -> None:
        for _ in range(2):
            await Scripted("asked")(REQUEST)

    asyncio.run(ask())
    stats = model_statistics("asked", "1")
    assert (stats["inference_count"], stats["execution_count"]) == (6, 2)
    assert stats["last_inference"] > 1_700_000_000_000
    told = durations("asked")
    assert told["success"][0] == 2
    assert told["success"][1] > 0
    assert {phase: told[phase] for phase in ("queue", "compute_input", "compute_infer", "compute_output", "fail")} == {
        "queue": (2, 4_000),
        "compute_input": (2, 60_000),
        "compute_infer": (2, 800_000),
        "compute_output": (2, 10_000_000),
        "fail": (0, 0),
    }
    assert REGISTRY.get_sample_value("florence2_requests_total", {"model": "asked", "outcome": "success"}) == 2


@pytest.mark.parametrize("error", [BadRequest("no"), ZeroDivisionError()], ids=lambda error: type(error).__name__)
def test_refusals_and_faults_count_as_failures(error):
    name = f"fails by {type(error).__name__}"
    with pytest.raises(type(error)):
        asyncio.run(Scripted(name, error)(REQUEST))
    told = durations(name)
    assert (told["fail"][0], told["success"], told["queue"]) == (1, (0, 0), (0, 0))
    assert told["fail"][1] > 0


def test_a_request_whose_client_goes_counts_as_a_failure():
    async def ask() -> None:
        task = asyncio.create_task(Scripted("left", 60)(REQUEST))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(ask())
    assert durations("left")["fail"][0] == 1
