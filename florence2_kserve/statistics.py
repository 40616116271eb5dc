"""Counts and times of requests, for Prometheus and for Triton's statistics extension, which tell the same."""

from __future__ import annotations

import time
from typing import Any

from kserve import Model
from kserve.protocol.infer_type import InferRequest, InferResponse
from prometheus_client import Counter, Gauge

SUCCESS, FAIL = "success", "fail"
# Phase as Triton calls it → the response parameter that tells its time.
PHASES = {
    "queue": "queue_us",
    "compute_input": "preprocess_us",
    "compute_infer": "generate_us",
    "compute_output": "postprocess_us",
}

REQUESTS = Counter("florence2_requests", "Requests answered and failed.", ["model", "outcome"])
REQUEST_SECONDS = Counter("florence2_request_seconds", "Time of requests, in seconds.", ["model", "outcome"])
PHASE_SECONDS = Counter(
    "florence2_request_phase_seconds",
    "Time of answered requests by phase, in seconds; the rest of their time went into the way to the predictor.",
    ["model", "phase"],
)
IMAGES = Counter("florence2_request_images", "Images of answered requests.", ["model"])
LAST = Gauge("florence2_last_request_timestamp_seconds", "When a request was last answered, in Unix time.", ["model"])


class CountedModel(Model):
    """A model whose requests are counted and timed, whichever protocol they come by.

    Attributes:
        image_input: Name of the input whose first axis counts images.
    """

    image_input: str

    async def __call__(self, body: Any, headers: dict[str, str] | None = None, *arguments: Any) -> Any:
        """Answers as the SDK's model does."""
        started = time.perf_counter()
        outcome = FAIL
        try:
            answer = await super().__call__(body, headers, *arguments)
            outcome = SUCCESS
        finally:  # a cancelled request has failed too
            REQUESTS.labels(self.name, outcome).inc()
            REQUEST_SECONDS.labels(self.name, outcome).inc(time.perf_counter() - started)
        self._count(body, answer[0])
        return answer

    def _count(self, request: InferRequest, response: InferResponse) -> None:
        parameters = response.parameters or {}
        for phase, parameter in PHASES.items():
            PHASE_SECONDS.labels(self.name, phase).inc(int(parameters.get(parameter, 0)) / 1e6)
        IMAGES.labels(self.name).inc(sum(i.shape[0] for i in request.inputs if i.name == self.image_input))
        LAST.labels(self.name).set_to_current_time()


def model_statistics(model_name: str, version: str) -> dict[str, Any]:
    """Returns what Triton's statistics extension tells of a model: counts, and times in nanoseconds.

    Batches form anew at every decode step, so there are no statistics by batch size, and an execution is a request;
    the predictor's own metrics tell of its batches.
    """
    requests, seconds = _values(REQUESTS, model_name), _values(REQUEST_SECONDS, model_name)
    phases = _values(PHASE_SECONDS, model_name)
    answered = int(requests.get(SUCCESS, 0))
    statistics = {
        outcome: _duration(requests.get(outcome, 0), seconds.get(outcome, 0)) for outcome in (SUCCESS, FAIL)
    } | {phase: _duration(answered, phases.get(phase, 0)) for phase in PHASES}
    return {
        "name": model_name,
        "version": version,
        "last_inference": int(_values(LAST, model_name).get("", 0) * 1000),
        "inference_count": int(_values(IMAGES, model_name).get("", 0)),
        "execution_count": answered,
        "inference_stats": statistics | {"cache_hit": _duration(0, 0), "cache_miss": _duration(0, 0)},
        "batch_stats": [],
    }


def _values(metric: Counter | Gauge, model_name: str) -> dict[str, float]:
    """Returns a metric's values for one model, by its other label ("" where it has none)."""
    return {
        next((value for label, value in sample.labels.items() if label != "model"), ""): sample.value
        for family in metric.collect()
        for sample in family.samples
        if sample.labels.get("model") == model_name and not sample.name.endswith("_created")
    }


def _duration(count: float, seconds: float) -> dict[str, int]:
    return {"count": int(count), "ns": round(seconds * 1e9)}
