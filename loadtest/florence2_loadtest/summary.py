"""A level's figures, from its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from florence2_loadtest.generator import Measured, known
from florence2_loadtest.histogram import measure_times
from florence2_loadtest.results import Level, Record, ServerSide, TaskResult
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.slo import Slo, parse_slo

_NEVER_S = 3600.0  # what who got no answer has waited, as an SLO sees it


def slos_of(scenario: Scenario) -> dict[str, str]:
    """Returns the SLO of each task that has one.

    Raises:
        ValueError: If a task has two that differ: its answers are judged together.
    """
    slos: dict[str, str] = {}
    for item in scenario.mix:
        if item.slo is not None and slos.setdefault(item.task, item.slo) != item.slo:
            raise ValueError(f"{item.task} has two SLOs, {slos[item.task]} and {item.slo}: give it one")
    return slos


def summarise(
    name: str, measured: Measured, slos: Mapping[str, str] | None = None, server: ServerSide | None = None
) -> Level:
    """Returns the level that was measured.

    Args:
        name: Of the level.
        measured: What was measured.
        slos: By task, as ``p95<2s``. Requests without an answer miss theirs, and so do tasks without a request; tasks
            without an SLO count all their answers as good.
        server: What the servers' metrics say.
    """
    slos = slos or {}
    records, seconds = measured.records, max(measured.seconds, 1e-9)
    answered = [record for record in records if record.is_ok]
    sent = [record for record in records if record.sent_s is not None]
    tasks = {
        task: _task([record for record in records if record.task == task], seconds, slos.get(task))
        for task in dict.fromkeys([*(record.task for record in records), *slos])
    }
    any_slo = any(result.slo for result in tasks.values())
    return Level(
        name=name,
        mode=measured.mode,
        concurrency=measured.concurrency,
        rate=measured.rate,
        seconds=measured.seconds,
        stable=measured.stable,
        windows=measured.windows,
        planned=len(records),
        sent=len(sent),
        answered=len(answered),
        failed=len(sent) - len(answered),
        unsent=len(records) - len(sent),
        held_back=measured.held_back,
        retried=sum(record.attempts > 1 for record in records),
        throughput=len(answered) / seconds,
        goodput=sum(_goodput(result) for result in tasks.values()) if any_slo else None,
        latency=measure_times(known(record.latency_s for record in answered)),
        service=measure_times(known(record.service_s for record in answered)),
        slip=measure_times(known(record.slip_s for record in sent)),
        send_s=_mean([record.send_s for record in answered]),
        receive_s=_mean([record.receive_s for record in answered]),
        statuses=dict(Counter(record.status for record in records).most_common()),
        tasks=tasks,
        per_second=count_by_second(records),
        server=server,
        generator=measured.generator,
    )


def count_by_second(records: Sequence[Record]) -> list[dict[str, int]]:
    """Returns what was planned, sent, answered and failed in each second in which anything was."""
    counts: dict[str, Counter[int]] = {name: Counter() for name in ("planned", "sent", "answered", "failed")}
    for record in records:
        counts["planned"][int(record.planned_s)] += 1
        if record.sent_s is not None:
            counts["sent"][int(record.sent_s)] += 1
        if record.done_s is not None:
            counts["answered" if record.is_ok else "failed"][int(record.done_s)] += 1
    seconds = sorted(set().union(*counts.values()))
    return [{"second": second, **{name: count[second] for name, count in counts.items()}} for second in seconds]


def _task(records: Sequence[Record], seconds: float, slo_text: str | None) -> TaskResult:
    latencies = known(record.latency_s for record in records if record.is_ok)
    slo = None if slo_text is None else parse_slo(slo_text)
    return TaskResult(
        answered=len(latencies),
        failed=sum(record.sent_s is not None and not record.is_ok for record in records),
        throughput=len(latencies) / seconds,
        goodput=None if slo is None else sum(map(slo.meets, latencies)) / seconds,
        slo=slo_text,
        slo_met=None if slo is None else _is_met(slo, latencies, len(records) - len(latencies)),
        latency=measure_times(latencies),
    )


def _is_met(slo: Slo, latencies: Sequence[float], unanswered: int) -> bool:
    return slo.is_met(measure_times([*latencies, *[_NEVER_S] * unanswered]))


def _goodput(result: TaskResult) -> float:
    return result.throughput if result.goodput is None else result.goodput


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
