"""Both loops, over real sockets, against a server that knows how long it took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from florence2_kserve.local import free_port
from florence2_loadtest.generator import Measured, run_closed, run_open
from florence2_loadtest.histogram import measure_times
from florence2_loadtest.results import Record, Target
from florence2_loadtest.scenario import ClosedLoad
from florence2_loadtest.schedules import Schedule, parse_schedule
from florence2_loadtest.summary import summarise
from florence2_loadtest.transport import open_transport
from florence2_loadtest.workload import Workload
from tests.loadtest.fake_server import FakeServer, Reply

pytestmark = pytest.mark.slow

FULL = Reply(429, '{"error": "the queue is full"}', headers={"Retry-After": "1"})
AWAY = Reply(503, '{"error": "the predictor can\'t answer now: away"}')


def closed(url: str, workload: Workload, concurrency: int = 1, retries: int = 0, **load: Any) -> Measured:
    """Runs a closed loop."""
    timeout_s, options = load.pop("timeout_s", 20.0), {name: load.pop(name) for name in ("mark",) if name in load}
    asked = ClosedLoad(**{"warmup_s": 0.0, "window_s": 0.2, "max_windows": 2, **load})

    async def run() -> Measured:
        async with open_transport(Target(url=url, model=None), connections=concurrency) as transport:
            return await run_closed(transport, workload, asked, concurrency, timeout_s, retries, **options)

    return asyncio.run(run())


def opened(
    url: str,
    workload: Workload,
    schedule: str | Schedule,
    retries: int = 0,
    timeout_s: float = 20.0,
    grace_s: float = 10.0,
    max_in_flight: int = 500,
    on_record: Callable[[Record], None] | None = None,
) -> Measured:
    """Runs an open loop."""
    planned = parse_schedule(schedule, 0) if isinstance(schedule, str) else schedule

    async def run() -> Measured:
        async with open_transport(Target(url=url, model=None), connections=max_in_flight) as transport:
            return await run_open(
                transport, workload, planned, timeout_s, retries, grace_s, on_record, max_in_flight=max_in_flight
            )

    return asyncio.run(run())


def statuses(measured: Measured) -> list[str]:
    return [record.status for record in measured.records]


def test_percentiles_are_within_a_hundredth_of_what_the_server_took(captions: Workload) -> None:
    """The injected times are lognormal about a second; the sender's own part of a request is a millisecond or two."""
    seconds = np.random.default_rng(0).lognormal(0.0, 0.35, 400).clip(0.3, 4.0)
    server = FakeServer(lambda number: float(seconds[number % 400]))
    with server.serve() as url:
        level = summarise("it", opened(url, captions, "poisson:60/s,6s"))
    assert level.answered == level.planned == len(server.took) > 300
    took = measure_times(server.took)
    for name in ("mean_s", "p50_s", "p90_s", "p95_s", "p99_s"):
        assert getattr(level.service, name) == pytest.approx(getattr(took, name), rel=0.01), name
        assert getattr(level.latency, name) == pytest.approx(getattr(took, name), rel=0.02), name


def test_a_stalled_server_shows_in_open_mode_but_hardly_in_closed_mode(captions: Workload) -> None:
    """Coordinated omission: clients that wait send nothing while the server stalls, and so notice it once each."""
    with FakeServer(lambda number: 0.001, stall_at=100).serve() as url:
        waiting = summarise("closed", closed(url, captions, 2, max_requests=400, window_s=20.0, warmup_s=0.0))
    with FakeServer(lambda number: 0.001, stall_at=100).serve() as url:
        coming = summarise("open", opened(url, captions, "constant:100/s,3s"))
    # Two of 400 were in flight when it stalled: their hundredth slowest never waited for it.
    assert waiting.answered == 400
    assert waiting.latency.max_s >= 1.0
    assert waiting.latency.p99_s < 0.5
    # Of those that came by the clock a third came during the stall.
    assert coming.answered == coming.planned == 300
    assert coming.latency.p99_s > 0.9
    assert coming.latency.p90_s > 0.6


def test_sending_never_waits_for_answers(captions: Workload) -> None:
    server = FakeServer(lambda number: 5.0)
    with server.serve() as url:
        measured = opened(url, captions, "constant:100/s,500ms")
    assert server.most_in_flight == 50
    assert server.arrivals[-1] - server.arrivals[0] < 5.0
    assert statuses(measured) == ["ok"] * 50


def test_latency_counts_from_the_plan_where_as_many_as_allowed_are_in_flight(captions: Workload) -> None:
    """Two at a time of 0.1 s make 20 a second; 40 a second are planned, so that the last is late by half the time."""
    server = FakeServer(lambda number: 0.1)
    with server.serve() as url:
        measured = opened(url, captions, "constant:40/s,1s", max_in_flight=2)
    level = summarise("it", measured)
    assert server.most_in_flight == 2
    assert (level.answered, level.unsent) == (40, 0)
    assert level.slip.max_s > 0.8
    assert level.latency.max_s == pytest.approx(level.slip.max_s + level.service.p50_s, rel=0.2)
    assert level.service.p50_s < level.slip.max_s / 2
    # The service is too slow for what is asked, which is no fault of the generator.
    assert level.held_back > 30
    assert level.generator.slip_p99_s > 0.5
    assert "requests were sent" not in str(level.generator.bottleneck)


def test_what_cannot_be_sent_by_the_end_of_the_grace_stays_unsent(captions: Workload) -> None:
    seen: list[Record] = []
    with FakeServer(lambda number: 0.4).serve() as url:
        measured = opened(url, captions, "constant:20/s,1s", max_in_flight=2, grace_s=0.1, on_record=seen.append)
    level = summarise("it", measured)
    assert level.planned == 20
    assert level.unsent >= 12  # two by two, every 0.4 s until 1.1 s: six
    assert level.sent == level.answered == 20 - level.unsent
    assert {r.status for r in measured.records if r.sent_s is None} == {"unsent"}
    assert sorted(record.index for record in seen) == list(range(20))


def test_one_request_that_hangs_does_not_lower_the_throughput_of_the_others(captions: Workload) -> None:
    with FakeServer(lambda number: 4.0 if number == 5 else 0.01).serve() as url:
        level = summarise("it", opened(url, captions, "constant:20/s,1s", timeout_s=3.0), {"<CAPTION>": "p50<2s"})
    assert level.statuses == {"ok": 19, "timeout": 1}
    assert level.seconds < 3.0
    assert level.throughput == level.goodput == pytest.approx(19 / level.seconds)


def test_late_answers_count_with_the_time_until_they_came(captions: Workload) -> None:
    with FakeServer(lambda number: 1.5 if number == 5 else 0.01).serve() as url:
        level = summarise("it", opened(url, captions, "constant:20/s,1s"))
    assert level.statuses == {"ok": 20}
    assert level.seconds >= 1.7


def test_records_hold_the_plan(captions: Workload) -> None:
    with FakeServer().serve() as url:
        measured = opened(url, captions, "poisson:50/s,500ms")
    starts = parse_schedule("poisson:50/s,500ms", 0).starts
    assert [record.planned_s for record in measured.records] == starts.tolist()
    for record in measured.records:
        assert record.sent_s is not None
        assert record.done_s is not None
        assert record.planned_s <= record.sent_s <= record.done_s
        assert (record.request_bytes, record.attempts) == (captions[record.index].size, 1)
    assert measured.rate == pytest.approx(len(starts) / 0.5)
    assert measured.seconds >= 0.5


def test_a_retry_waits_as_long_as_the_server_says_and_its_time_counts(captions: Workload) -> None:
    server = FakeServer(replies=(FULL,))
    with server.serve() as url:
        measured = opened(url, captions, "constant:1/s,1s", retries=2)
    (record,) = measured.records
    assert (record.status, record.attempts) == ("ok", 2)
    assert server.arrivals[1] - server.arrivals[0] >= 1.0
    assert record.service_s is not None
    assert record.service_s >= 1.0


def test_what_stays_refused_tells_by_whom(captions: Workload) -> None:
    with FakeServer(replies=(AWAY,) * 2).serve() as url:
        measured = opened(url, captions, "constant:1/s,1s", retries=1)
    (record,) = measured.records
    assert (record.status, record.component, record.attempts) == ("http 503", "predictor", 2)


def test_a_wrong_request_is_not_sent_again(captions: Workload) -> None:
    server = FakeServer(replies=(Reply(400, "{}"),))
    with server.serve() as url:
        assert statuses(opened(url, captions, "constant:1/s,1s", retries=3)) == ["http 400"]
    assert len(server.arrivals) == 1


def test_no_retry_is_begun_that_the_timeout_would_end(captions: Workload) -> None:
    server = FakeServer(replies=(Reply(429, "{}", headers={"Retry-After": "30"}),))
    with server.serve() as url:
        began = time.monotonic()
        assert statuses(opened(url, captions, "constant:1/s,1s", retries=3, timeout_s=2.0)) == ["http 429"]
    assert time.monotonic() - began < 20
    assert len(server.arrivals) == 1


def test_a_closed_loop_keeps_its_concurrency(captions: Workload) -> None:
    server = FakeServer(lambda number: 0.05)
    with server.serve() as url:
        measured = closed(url, captions, 6, window_s=0.5)
    assert server.most_in_flight == 6
    assert set(statuses(measured)) == {"ok"}
    assert all(record.slip_s == 0 and record.latency_s == record.service_s for record in measured.records)


def test_a_closed_loop_ends_when_three_windows_agree(captions: Workload) -> None:
    with FakeServer(lambda number: 0.05).serve() as url:
        measured = closed(url, captions, 4, window_s=0.5, max_windows=10, tolerance=0.5)
    assert (len(measured.windows), measured.stable) == (3, True)


def test_a_closed_loop_that_does_not_settle_ends_at_its_bound(captions: Workload) -> None:
    with FakeServer(lambda number: 0.005 * (1 + number % 400)).serve() as url:
        measured = closed(url, captions, 4, window_s=0.2, max_windows=5, tolerance=0.01)
    assert (len(measured.windows), measured.stable) == (5, False)


def test_a_stable_level_is_told_by_the_windows_that_agree(captions: Workload) -> None:
    """The first answers are ten times as slow: they are among the windows, and not in the figures."""
    server = FakeServer(lambda number: 0.5 if number < 12 else 0.05)
    marks: list[int] = []

    async def mark() -> None:
        marks.append(len(server.arrivals))

    with server.serve() as url:
        measured = closed(url, captions, 4, window_s=0.6, max_windows=12, tolerance=0.25, mark=mark)
    level = summarise("it", measured)
    kept = measured.windows[-3:]
    assert measured.stable is True
    assert measured.first_window == len(measured.windows) - 3 > 0
    assert measured.seconds == pytest.approx(sum(window.seconds for window in kept))
    assert level.answered == sum(round(window.throughput * window.seconds) for window in kept)
    assert level.latency.max_s < 0.5 <= max(server.took)
    assert level.windows == measured.windows
    # What the servers tell can be read over the same stretch.
    assert len(marks) == len(measured.windows) + 1
    assert marks[-1] - marks[measured.first_window] == pytest.approx(level.answered, abs=12)
    assert marks[measured.first_window] > marks[0]


def test_a_level_that_its_bound_ends_is_told_whole(captions: Workload) -> None:
    with FakeServer(lambda number: 0.02).serve() as url:
        measured = closed(url, captions, 2, max_requests=60, window_s=0.2, max_windows=50, stable_windows=40)
    assert len(measured.windows) > 1
    assert (len(measured.records), measured.first_window) == (60, 0)


def test_windows_add_up_to_the_measured_requests(captions: Workload) -> None:
    with FakeServer(lambda number: 0.02).serve() as url:
        measured = closed(url, captions, 4, window_s=0.3, max_windows=4, tolerance=0.001)
    answers = [round(window.throughput * window.seconds) for window in measured.windows]
    assert sum(answers) == len(measured.records)
    assert measured.seconds == pytest.approx(sum(window.seconds for window in measured.windows))


def test_the_warm_up_is_not_measured(captions: Workload) -> None:
    """The first answers take long, as a cold server's do; none of them is among those that are measured."""
    server = FakeServer(lambda number: 0.5 if number < 3 else 0.01)
    with server.serve() as url:
        measured = closed(url, captions, 3, warmup_s=0.0, window_s=0.3)
    assert max(server.took) >= 0.5
    assert {record.index for record in measured.records}.isdisjoint({0, 1, 2})
    assert summarise("it", measured).latency.max_s < 0.5


def test_requests_are_bounded_by_number(captions: Workload) -> None:
    server = FakeServer(lambda number: 0.01)
    with server.serve() as url:
        measured = closed(url, captions, 4, max_requests=50, window_s=60.0)
    assert len(measured.records) == 50
    # What was in flight at the end is all that was sent behind them.
    assert len(server.arrivals) <= max(record.index for record in measured.records) + 4
    assert len(measured.windows) == 1
    assert measured.stable is False
    assert measured.seconds < 60


def test_the_rest_of_a_window_belongs_to_the_last_one(captions: Workload) -> None:
    with FakeServer(lambda number: 0.02).serve() as url:
        measured = closed(url, captions, 1, max_requests=30, window_s=0.4, max_windows=50)
    answers = [round(window.throughput * window.seconds) for window in measured.windows]
    assert sum(answers) == len(measured.records) == 30
    assert all(window.seconds >= 0.2 for window in measured.windows)


def test_marks_are_set_when_measuring_begins_between_windows_and_at_the_end(captions: Workload) -> None:
    server, marks = FakeServer(lambda number: 0.02), []

    async def mark() -> None:
        marks.append(len(server.arrivals))

    with server.serve() as url:
        measured = closed(url, captions, 1, mark=mark)
    assert len(marks) == len(measured.windows) + 1 == 3
    assert marks[-1] - marks[0] == pytest.approx(len(measured.records), abs=2)
    assert marks[0] >= 1


def test_nobody_listening_fails_every_request_without_flooding(captions: Workload) -> None:
    measured = closed(f"http://127.0.0.1:{free_port()}", captions, 2, window_s=0.5, max_windows=2)
    assert set(statuses(measured)) == {"connection"}
    assert len(measured.records) <= 2 * 11
    assert measured.stable is False


def test_a_client_goes_on_after_a_failure(captions: Workload) -> None:
    replies = (Reply(cut=True), AWAY, Reply(body="{}"), Reply(reset=True))
    with FakeServer(lambda number: 0.01, replies).serve() as url:
        seen: list[Record] = []

        async def run() -> None:
            async with open_transport(Target(url=url, model=None), connections=1) as transport:
                load = ClosedLoad(window_s=0.5, max_windows=1, warmup_s=0.0)
                await run_closed(transport, captions, load, 1, 5.0, 0, seen.append)

        asyncio.run(run())
    assert [record.status for record in seen[:5]] == ["connection", "http 503", "malformed", "connection", "ok"]


def test_what_goes_wrong_in_us_ends_the_loop(captions: Workload) -> None:
    def fail(record: Record) -> None:
        raise RuntimeError("ours")

    async def run(url: str) -> None:
        async with open_transport(Target(url=url, model=None), connections=2) as transport:
            await run_closed(transport, captions, ClosedLoad(), 2, 5.0, 0, fail)

    with FakeServer().serve() as url, pytest.raises(ExceptionGroup) as caught:
        asyncio.run(run(url))
    assert caught.group_contains(RuntimeError, match="ours")


def test_a_trace_is_sent_as_it_was(captions: Workload, tmp_path: Any) -> None:
    (tmp_path / "trace.csv").write_text("time\n5\n5.3\n5.9\n")
    server = FakeServer()
    with server.serve() as url:
        measured = opened(url, captions, f"replay:{tmp_path}/trace.csv")
    assert [record.planned_s for record in measured.records] == pytest.approx([0, 0.3, 0.9])
    assert np.diff(server.arrivals) == pytest.approx([0.3, 0.6], abs=0.25)


def test_an_empty_schedule_sends_nothing(captions: Workload) -> None:
    level = summarise("it", opened("http://127.0.0.1:1", captions, "constant:0/s,200ms"))
    assert (level.planned, level.seconds, level.throughput) == (0, 0.2, 0.0)
