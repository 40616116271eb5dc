"""A scaling test's result such as a real cluster leaves."""

from __future__ import annotations

import math
from typing import Any

from florence2_loadtest.results import AutoscaleResult, PodTimes, Sample
from tests.loadtest.example_results import open_level, target


def autoscale_result() -> AutoscaleResult:
    """Returns zero, one request, a step, a spike, and zero again, of two components on Knative."""
    seconds = 200
    rates = [0] * 10 + [2] * 40 + [20] * 50 + [40] * 15 + [0] * (seconds - 115)
    predictors = [_replicas(second, ((22, 1), (72, 2), (85, 3)), 160) for second in range(seconds)]
    transformers = [_replicas(second, ((14, 1), (60, 2)), 150) for second in range(seconds)]
    rows: list[dict[str, int]] = []
    waiting = 0
    for second, rate in enumerate(rates):
        waiting += rate
        answered = min(waiting, 13 * predictors[second])
        waiting -= answered
        rows.append(
            {
                "second": second,
                "planned": rate,
                "sent": rate,
                "answered": answered,
                "failed": 2 * (100 <= second < 103),
            }
        )
    samples = [
        Sample(
            second=float(second),
            components={
                "transformer": _sampled(transformers, second, rates, 30),
                "predictor": _sampled(predictors, second, rates, 13),
            },
        )
        for second in range(seconds)
    ]
    planned = sum(rates)
    return AutoscaleResult(
        name="zero-step-spike-zero",
        target=target(model="embedded", url="http://florence2.default.example.com"),
        deployment_mode="Knative",
        level=open_level(
            rate=planned / 115,
            per_second=rows,
            planned=planned,
            sent=planned,
            answered=planned - 6,
            failed=6,
            unsent=0,
            seconds=115,
            name="steps",
        ),
        samples=samples,
        pods=[
            _pod("florence2-transformer-00001-deployment-7d9f8b5c6-abcde", "transformer", 10.4, 1.2, 172.0),
            _pod("florence2-predictor-00001-deployment-6b8c9d7f5-fghij", "predictor", 10.6, 2.6, 183.0),
            _pod("florence2-transformer-00001-deployment-7d9f8b5c6-klmno", "transformer", 56.0, 1.1, 165.0),
            _pod("florence2-predictor-00001-deployment-6b8c9d7f5-pqrst", "predictor", 60.0, 2.9, 178.0),
            PodTimes(
                name="florence2-predictor-00001-deployment-6b8c9d7f5-never",
                component="predictor",
                created_s=70.0,
                scheduled_s=1.0,
            ),
        ],
        notes=[(10.0, "first request"), (50.0, "step to 20/s"), (100.0, "spike to 40/s"), (115.0, "load ends")],
        statuses_per_second=[
            {"second": second, "component": "ingress", "status": "http 503", "count": 2} for second in (100, 101, 102)
        ],
        findings={
            "sent_share": 1.0,
            "failures": 6,
            "from_zero": ["transformer", "predictor"],
            "first_answer_s": 13.2,
            "first_answer_parts": {"predictor": {"created": 0.6, "scheduled": 1.1, "ready": 11.0}},
            "back_s": 68.0,
            "transformer": _component_findings(2),
            "predictor": _component_findings(4),
        },
        problems=["6 requests failed after retries, 0 expected"],
    )


def _component_findings(most: int) -> dict[str, Any]:
    step = {"second": 40.0, "from": 1.0, "to": float(most), "desired_s": 2.0, "enough_s": 21.0}
    return {"most": most, "steps": [step], "panics": 1, "surplus_share": 0.21, "activator_s": 60.0}


def _replicas(second: int, ups: tuple[tuple[int, int], ...], down: int) -> int:
    return 0 if second >= down + 20 else max([count for at, count in ups if second >= at], default=0)


def _sampled(replicas: list[int], second: int, rates: list[int], each: int) -> dict[str, float | None]:
    desired = max(math.ceil(rates[second] / each), 1 if 10 <= second < 150 else 0)
    ready = replicas[second]
    return {
        "ready": float(ready),
        "desired": float(desired),
        "pending": float(max(0, desired - ready)),
        "terminating": float(ready > 0 and second > 150),
        "activator_in_path": float(ready < 2),
        "panicking": float(52 <= second < 112),
    }


def _pod(name: str, component: str, created: float, pace: float, gone: float) -> PodTimes:
    steps = (pace * after for after in (0.2, 0.7, 1.2, 3.6, 4.0, 4.6))
    return PodTimes(
        name=name,
        component=component,
        created_s=created,
        gone_s=gone - created,
        **dict(
            zip(("scheduled_s", "pulled_s", "started_s", "loaded_s", "ready_s", "first_answer_s"), steps, strict=True)
        ),
    )
