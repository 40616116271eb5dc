"""Results of all kinds such as real load tests leave, made by a small model of a service rather than by one."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from florence2_loadtest.reference import REPLACED
from florence2_loadtest.results import (
    Generator,
    Level,
    PeersResult,
    RunResult,
    ServerSide,
    SweepResult,
    Target,
    TaskResult,
    Times,
    Trial,
    Window,
)

MIX = ("<CAPTION>", "<OD>", "<OCR_WITH_REGION>")
PERCENTILES = (0, 10, 25, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 96, 97, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99, 100)


def times(mean_s: float, spread: float = 0.35, count: int = 4000, seed: int = 0) -> Times:
    """Returns the distribution of `count` log-normal times."""
    return _times(mean_s, spread, count, seed).model_copy()


@cache
def _times(mean_s: float, spread: float, count: int, seed: int) -> Times:
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.lognormal(math.log(max(mean_s, 1e-6)), spread, count))
    at = dict(zip(PERCENTILES, np.percentile(drawn, PERCENTILES), strict=True))
    return Times(
        count=count,
        mean_s=float(drawn.mean()),
        stdev_s=float(drawn.std()),
        min_s=float(drawn[0]),
        p50_s=float(at[50]),
        p90_s=float(at[90]),
        p95_s=float(at[95]),
        p99_s=float(at[99]),
        p999_s=float(at[99.9]),
        max_s=float(drawn[-1]),
        curve=[(p, float(value)) for p, value in at.items()],
    )


def server_side(mean_s: float, batch_rows: float = 80.0) -> ServerSide:
    """Returns what the servers would say of requests that took `mean_s`."""
    return ServerSide(
        sources=["http://127.0.0.1:8080/metrics", "http://127.0.0.1:8082/metrics"],
        requests=900,
        failures=0,
        request_s=0.96 * mean_s,
        preprocess_s=0.03 * mean_s,
        queue_s=0.30 * mean_s,
        generate_s=0.55 * mean_s,
        postprocess_s=0.01 * mean_s,
        vision_batch_s=0.012,
        vision_batch_images=4.2,
        prefill_s=0.004,
        decode_step_s=0.009,
        batch_rows=batch_rows,
        useful_rows_share=0.81,
        cache_hits_share=0.25,
        images_encoded=675,
        tokens=41_000,
        tokens_per_s=1366.0,
        vision_busy_share=0.22,
        prefill_busy_share=0.08,
        decode_busy_share=0.66,
    )


def closed_level(concurrency: int, capacity: float = 24.0, tasks: tuple[str, ...] = MIX, **changes: Any) -> Level:
    """Returns a closed-loop level of a service that saturates at `capacity` answers a second."""
    throughput = capacity * (1 - math.exp(-concurrency / 18))
    latency = times(concurrency / throughput, 0.25 + concurrency / 400, seed=concurrency)
    answered = round(30 * throughput)
    given: dict[str, Any] = {
        "name": f"concurrency {concurrency}",
        "mode": "closed",
        "concurrency": concurrency,
        "seconds": 30.0,
        "stable": True,
        "windows": [Window(seconds=10, throughput=throughput, latency_s=latency.mean_s) for _ in range(3)],
        "planned": answered,
        "sent": answered,
        "answered": answered,
        "throughput": throughput,
        "goodput": 0.93 * throughput,
        "latency": latency,
        "service": latency,
        "send_s": 0.004,
        "receive_s": 0.001,
        "statuses": {"ok": answered},
        "tasks": {
            task: TaskResult(
                answered=answered // len(tasks),
                throughput=throughput / len(tasks),
                goodput=0.93 * throughput / len(tasks),
                slo="p95<2s",
                slo_met=latency.p95_s * (0.6 + 0.3 * index) < 2,
                latency=times(latency.mean_s * (0.6 + 0.3 * index), seed=index),
            )
            for index, task in enumerate(tasks)
        },
        "server": server_side(latency.mean_s, min(108.0, 2.8 * concurrency)),
        "generator": Generator(cpu_share=0.12, loop_lag_p99_s=0.002),
    }
    return Level(**given | changes)


def open_level(rate: float = 20.0, seconds: int = 90, stall: bool = True, **changes: Any) -> Level:
    """Returns an open-loop level; with a `stall`, the service stood still for ten seconds in its middle."""
    rng = np.random.default_rng(1)
    rows, waiting, answered_all = [], 0, 0
    for second in range(seconds + 5):
        planned = int(rng.poisson(rate)) if second < seconds else 0
        able = 0 if stall and 40 <= second < 50 else round(1.4 * rate)
        waiting += planned
        answered = min(waiting, able)
        waiting -= answered
        answered_all += answered
        rows.append(
            {"second": second, "planned": planned, "sent": planned, "answered": answered, "failed": int(second == 49)}
        )
    planned_all = sum(row["planned"] for row in rows)
    service = times(0.45, 0.3)
    latency = times(0.9 if stall else 0.5, 0.9 if stall else 0.3, seed=3)
    given: dict[str, Any] = {
        "name": f"poisson:{rate:g}/s,{seconds}s",
        "mode": "open",
        "rate": rate,
        "seconds": float(seconds),
        "planned": planned_all,
        "sent": planned_all - 2,
        "answered": answered_all - 3,
        "failed": 1,
        "unsent": 2,
        "retried": 4,
        "throughput": answered_all / seconds,
        "latency": latency,
        "service": service,
        "slip": times(0.02, 1.2, seed=4),
        "send_s": 0.004,
        "receive_s": 0.001,
        "statuses": {"ok": answered_all - 3, "http 503": 1, "unsent": 2},
        "tasks": {"<CAPTION>": TaskResult(answered=answered_all - 3, failed=3, throughput=rate, latency=latency)},
        "per_second": rows,
        "server": server_side(service.mean_s),
        "generator": Generator(cpu_share=0.2, loop_lag_p99_s=0.004, slip_p99_s=0.01),
    }
    return Level(**given | changes)


def target(**changes: Any) -> Target:
    """Returns a target that is no toy."""
    given: dict[str, Any] = {
        "url": "http://127.0.0.1:8080",
        "model": "florence-community/Florence-2-large-ft",
        "revision": "0123abcd",
        "settings": {"max_batch_size": 36, "device": "cuda", "dtype": "bfloat16"},
    }
    return Target(**given | changes)


def run_result(**changes: Any) -> RunResult:
    """Returns concurrencies 12, 24, … 60 of a mix."""
    given: dict[str, Any] = {
        "name": "mixed",
        "target": target(),
        "levels": [closed_level(concurrency) for concurrency in range(12, 61, 12)],
        "scenario": {
            "mix": [{"task": task, "weight": 1.0, "slo": "p95<2s"} for task in MIX],
            "load": {"concurrency": "12:60:12", "window_s": 5.0},
            "protocol": "rest",
        },
    }
    return RunResult(**given | changes)


def nine_tasks_result() -> RunResult:
    """Returns the nine tasks that the replaced deployment was measured with, one after the other."""
    levels = [
        closed_level(36, 3.2 * row.throughput, (task,), name=f"{task}, concurrency 36")
        for task, row in REPLACED.items()
    ]
    return run_result(name="nine tasks", levels=levels, scenario={"separately": True})


def open_result() -> RunResult:
    """Returns a schedule in which the service stalled, and one that it kept up with."""
    return run_result(
        name="poisson", levels=[open_level(), open_level(rate=5, stall=False)], scenario={"load": {"schedule": "…"}}
    )


def sweep_result() -> SweepResult:
    """Returns the replaced deployment's batch sizes, two more settings, a default and two failures."""
    return _sweep().model_copy(deep=True)


@cache
def _sweep() -> SweepResult:
    space: dict[str, list[Any]] = {
        "max_batch_size": [6, 12, 24, 36],
        "vision_batch_size": [1, 4, 8],
        "vision_backend": ["transformers", "timm"],
    }
    trials = [Trial(number=0, settings={}, levels=_sweep_levels(20.0), score=_best(20.0), admissible=True, seconds=61)]
    for number, values in enumerate(product(*space.values()), 1):
        settings = dict(zip(space, values, strict=True))
        batch, images, backend = values
        capacity = 14 + 2.4 * math.log2(batch / 3) + 0.9 * math.log2(images) + (1.5 if backend == "timm" else 0)
        if batch == 36 and images == 8:
            trials.append(
                Trial(
                    number=number,
                    settings=settings,
                    state="failed",
                    error="the service ended while starting: CUDA out of memory. Tried to allocate 1.20 GiB",
                )
            )
            continue
        levels = _sweep_levels(capacity, 0.7 + batch / 80 + images / 40)
        admissible = max(level.latency.p95_s for level in levels) < 6
        trials.append(
            Trial(
                number=number,
                settings=settings,
                levels=levels,
                score=_best(capacity),
                admissible=admissible,
                seconds=60.0,
            )
        )
    best = max((t for t in trials if t.admissible and t.score), key=lambda trial: trial.score or 0)
    for share in (0.99, 1.01):  # measured again
        for trial in (trials[0], best):
            again = {"number": len(trials), "confirms": trial.number, "score": share * (trial.score or 0)}
            trials.append(trial.model_copy(update=again))
    return SweepResult(
        name="engine",
        target="predictor",
        objective="throughput",
        constraint="p95<6s",
        space=space,
        trials=trials,
        best=best.number,
        scenario={"load": {"concurrency": "12:60:12"}},
    )


def _sweep_levels(capacity: float, slow: float = 1.0) -> list[Level]:
    levels = [closed_level(c, capacity, ("<CAPTION>",)) for c in range(12, 61, 12)]
    for level in levels:
        level.latency = times(slow * level.latency.mean_s, seed=level.concurrency or 0)
    return levels


def _best(capacity: float) -> float:
    return max(level.throughput for level in _sweep_levels(capacity))


def peers_result() -> PeersResult:
    """Returns ours and Triton's, by task and mixed."""
    runs = {}
    for name, slower in (("florence2", 1.0), ("triton", 3.4)):
        levels = [
            closed_level(36, 24 / slower * (1.3 if "OD" in task and slower > 1 else 1.0), (task,), name=task)
            for task in (*MIX, "<MORE_DETAILED_CAPTION>")
        ]
        levels.append(closed_level(36, 24 / slower, name="mixed"))
        runs[name] = run_result(name=name, target=target(note=name), levels=levels)
    return PeersResult(name="against Triton", baseline="triton", runs=runs)
