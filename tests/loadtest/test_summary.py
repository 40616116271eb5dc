"""A level's figures, from its requests."""

from __future__ import annotations

import numpy as np
import pytest

from florence2_loadtest.generator import Measured
from florence2_loadtest.histogram import measure_times
from florence2_loadtest.results import Generator, Level, Record
from florence2_loadtest.scenario import MixItem, Scenario
from florence2_loadtest.summary import count_by_second, slos_of, summarise


def record(
    index: int, task: str = "<OD>", planned: float = 0.0, slip: float = 0.0, took: float = 1.0, status: str = "ok"
) -> Record:
    sent = planned + slip
    return Record(index, task, planned, sent, sent + took, status, attempts=1, send_s=0.25, receive_s=0.5)


def level(records: list[Record], slos: dict[str, str] | None = None, seconds: float = 10.0) -> Level:
    measured = Measured("open", records, seconds, Generator(bottleneck=None), rate=1.0)
    return summarise("it", measured, slos)


@pytest.mark.parametrize("count", [1, 2, 10, 999, 20_000])
def test_percentiles_are_within_a_thousandth_of_the_values_they_stand_for(count: int) -> None:
    values = np.random.default_rng(count).lognormal(-1.0, 1.0, count)
    times = measure_times(values.tolist())
    ranks = [-(-permille * count // 1000) for permille in (500, 900, 950, 990, 999)]
    exact = [float(np.sort(values)[rank - 1]) for rank in ranks]
    assert [times.p50_s, times.p90_s, times.p95_s, times.p99_s, times.p999_s] == pytest.approx(exact, rel=1.001e-3)
    assert (times.count, times.min_s, times.max_s) == (count, values.min(), values.max())
    assert (times.mean_s, times.stdev_s) == (pytest.approx(values.mean()), pytest.approx(values.std()))


def test_a_curve_ascends_to_the_longest_time_and_says_no_more_than_is_known() -> None:
    times = measure_times(np.random.default_rng(0).exponential(0.1, 500).tolist())
    steps, seconds = zip(*times.curve, strict=True)
    assert list(steps) == sorted(set(steps))
    assert list(seconds) == sorted(seconds)
    assert times.curve[-1] == (100.0, times.max_s)
    assert steps[-2] == 99.8  # of 500 values, the highest step above which there is one
    assert len(times.curve) <= 60


def test_times_from_a_microsecond_to_an_hour_are_told_and_longer_ones_bounded() -> None:
    times = measure_times([2e-6, 1800.0, 9000.0])
    assert times.min_s == 2e-6
    assert times.p50_s == pytest.approx(1800, rel=1e-3)
    assert times.max_s == 9000.0


def test_nothing_has_no_times() -> None:
    assert measure_times([]).count == 0


def test_latency_counts_from_the_intended_start_and_service_from_sending() -> None:
    found = level([record(0, slip=3.0, took=1.0), record(1, slip=0.0, took=2.0)])
    assert found.latency.mean_s == pytest.approx(3.0)
    assert found.service.mean_s == pytest.approx(1.5)
    assert found.slip.mean_s == pytest.approx(1.5)
    assert (found.send_s, found.receive_s) == (0.25, 0.5)


def test_what_failed_or_was_never_sent_is_counted_apart_and_has_no_latency() -> None:
    found = level([record(0), record(1, took=50.0, status="http 503"), Record(2, "<OD>", 1.0)])
    assert (found.planned, found.sent, found.answered, found.failed, found.unsent) == (3, 2, 1, 1, 1)
    assert found.statuses == {"ok": 1, "http 503": 1, "unsent": 1}
    assert found.latency.max_s == 1.0
    assert found.throughput == pytest.approx(0.1)


def test_goodput_counts_the_answers_within_their_tasks_limit() -> None:
    records = [record(i, took=took) for i, took in enumerate([0.5, 1.5, 2.0, 3.0])]
    found = level([*records, record(4, "<OCR>", took=9.0)], {"<OD>": "p95<2s"})
    assert found.tasks["<OD>"].goodput == pytest.approx(0.2)
    assert found.tasks["<OD>"].slo_met is False
    assert found.tasks["<OCR>"].goodput is None
    assert found.goodput == pytest.approx(0.3)  # a task without a limit counts all its answers
    assert level(records).goodput is None


def test_an_slo_is_met_by_the_statistic_that_it_names() -> None:
    records = [record(i, took=1.0) for i in range(96)] + [record(i, took=5.0) for i in range(4)]
    assert level(records, {"<OD>": "p95<2s"}).tasks["<OD>"].slo_met is True
    assert level(records, {"<OD>": "p99<2s"}).tasks["<OD>"].slo_met is False
    assert level(records, {"<OD>": "mean<1.5s"}).tasks["<OD>"].slo_met is True


@pytest.mark.parametrize("lost", [record(0, took=0.01, status="http 429"), Record(0, "<OD>", 0.0)])
def test_refusing_everybody_else_does_not_meet_an_slo(lost: Record) -> None:
    answered = [record(i, took=1.0) for i in range(90)]
    assert level(answered, {"<OD>": "p95<2s"}).tasks["<OD>"].slo_met is True
    assert level(answered + [lost] * 10, {"<OD>": "p95<2s"}).tasks["<OD>"].slo_met is False


def test_a_task_that_nothing_was_asked_of_does_not_meet_its_slo() -> None:
    found = level([record(0)], {"<OD>": "p95<2s", "<OCR>": "p95<2s"})
    assert found.tasks["<OD>"].slo_met is True
    assert (found.tasks["<OCR>"].answered, found.tasks["<OCR>"].slo_met) == (0, False)
    assert found.goodput == pytest.approx(0.1)


def test_a_task_has_one_slo() -> None:
    def mix(*slos: str | None) -> Scenario:
        return Scenario(mix=[MixItem(task="OD", slo=slo) for slo in slos])

    assert slos_of(mix("p95<2s", None, "p95<2s")) == {"<OD>": "p95<2s"}
    with pytest.raises(ValueError, match="<OD> has two SLOs, p95<2s and p50<1s"):
        slos_of(mix("p95<2s", "p50<1s"))


def test_tasks_are_told_apart() -> None:
    found = level([record(0), record(1, "<OCR>", took=2.0), record(2, "<OCR>", status="timeout")])
    assert (found.tasks["<OD>"].answered, found.tasks["<OCR>"].answered, found.tasks["<OCR>"].failed) == (1, 1, 1)
    assert found.tasks["<OCR>"].latency.max_s == 2.0


def test_requests_sent_more_than_once_are_counted() -> None:
    again = record(0)
    again.attempts = 3
    assert level([again, record(1)]).retried == 1


def test_seconds_count_what_was_planned_sent_answered_and_failed_in_them() -> None:
    records = [record(0, planned=0.5, took=1.0), record(1, planned=0.9, slip=0.2, took=5.0, status="timeout")]
    assert count_by_second([*records, Record(2, "<OD>", 3.5)]) == [
        {"second": 0, "planned": 2, "sent": 1, "answered": 0, "failed": 0},
        {"second": 1, "planned": 0, "sent": 1, "answered": 1, "failed": 0},
        {"second": 3, "planned": 1, "sent": 0, "answered": 0, "failed": 0},
        {"second": 6, "planned": 0, "sent": 0, "answered": 0, "failed": 1},
    ]
