"""Schedules: what is planned is what was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from florence2_loadtest.results import Record, write_records
from florence2_loadtest.schedules import parse_schedule


def test_a_constant_rate_sends_at_equal_distances() -> None:
    schedule = parse_schedule("constant:50/s,60s", 0)
    assert len(schedule.starts) == 3000
    assert schedule.starts[0] == 0
    assert np.diff(schedule.starts) == pytest.approx(0.02)
    assert (schedule.seconds, schedule.rate) == (60.0, 50.0)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(parse_schedule("poisson:50/s,400s", 7).starts)
    # 20,000 gaps: their mean is known within 0.7 %, their deviation within 1 %; an exponential's are equal.
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.04)
    assert np.mean(gaps > 0.02) == pytest.approx(np.exp(-1), rel=0.04)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.03)


def test_the_number_of_poisson_requests_varies_with_the_seed_by_its_root() -> None:
    counts = [len(parse_schedule("poisson:10/s,10s", seed).starts) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(100, rel=0.03)
    assert np.var(counts) == pytest.approx(100, rel=0.25)


def test_a_seed_makes_the_same_schedule_again() -> None:
    first, again, other = (parse_schedule("poisson:50/s,10s", seed).starts for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("text", "early"), [("ramp:0-100/s,10s", 0.25), ("ramp:100-0/s,10s", 0.75)])
def test_a_ramp_sends_a_quarter_in_its_slower_half(text: str, early: float) -> None:
    starts = parse_schedule(text, 0).starts
    assert len(starts) == 500
    assert (np.diff(starts) >= 0).all()
    assert np.mean(starts < 5) == pytest.approx(early, abs=0.01)
    assert 0 <= starts[0] <= starts[-1] <= 10


def test_a_flat_ramp_is_constant() -> None:
    assert parse_schedule("ramp:5-5/s,2s", 0).starts == pytest.approx(np.arange(10) / 5)


def test_parts_follow_each_other_and_each_may_have_a_kind() -> None:
    schedule = parse_schedule("spike:5/s,20s;poisson:100/s,5s;0/s,10s;ramp:0-10/s,2s;10/s,1s", 3)
    counts, _ = np.histogram(schedule.starts, [0, 20, 25, 35, 37, 38])
    assert counts[[0, 2, 3, 4]].tolist() == [100, 0, 10, 10]
    assert 400 < counts[1] < 600
    assert schedule.seconds == 38


def test_a_part_without_a_kind_is_of_the_kind_before_it() -> None:
    gaps = np.diff(parse_schedule("steps:poisson:100/s,10s;50/s,10s", 0).starts[-400:])
    assert gaps.std() == pytest.approx(0.02, rel=0.3)


def test_a_schedule_of_nothing_is_a_pause() -> None:
    schedule = parse_schedule("constant:0/s,30s", 0)
    assert (len(schedule.starts), schedule.seconds) == (0, 30.0)


def test_rates_and_times_have_units() -> None:
    assert len(parse_schedule("constant:30/min,2min", 0).starts) == 60
    assert parse_schedule("constant:1/s,500ms", 0).seconds == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("50/s,60s", "a schedule looks like"),
        ("sawtooth:50/s,60s", "a schedule looks like"),
        ("constant:50,60s", "'50,60s' has to look like 50/s,60s"),
        ("constant:-5/s,60s", "'-5/s,60s' has to look like"),
        ("ramp:50/s,60s", "'50/s,60s' has to look like ramp:0-100/s,60s"),
        ("constant:0-50/s,60s", "'0-50/s,60s' has to look like"),
        ("steps:5/s,3s;;5/s,3s", "'' has to look like"),
        ("steps:5/s,3s;saw:5/s,3s", "'saw:5/s,3s' has to look like"),
        ("constant:5/s,0s", "0 requests in 0 s"),
        ("constant:100000/s,1h", "360000000 requests in 3600 s; it may have"),
        ("constant:1/s,48h", "172800 s; it may have"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="schedule") as caught:
        parse_schedule(text, 0)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        '{"time": 12.5, "task": "x"}\n\n{"time": 10}\n{"time": 11}\n',
        "time,task\n10,x\n12.5,x\n11,x\n",
        "10\n11\n12.5\n",
        "when,timestamp\nx,2024-05-01T10:00:00Z\nx,2024-05-01T10:00:01+00:00\nx,2024-05-01T10:00:02.500\n",
    ],
    ids=["jsonl", "csv", "times alone", "dates"],
)
def test_a_trace_is_replayed_from_its_first_request_on(content: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(content)
    schedule = parse_schedule(f"replay:{tmp_path}/trace", 0)
    assert schedule.starts.tolist() == [0.0, 1.0, 2.5]
    assert schedule.seconds == 3.0


def test_a_runs_own_records_are_a_trace(tmp_path: Path) -> None:
    write_records([Record(0, "<OD>", 3.0, sent_s=99.0), Record(1, "<OD>", 3.25)], tmp_path / "records.jsonl")
    assert parse_schedule(f"replay:{tmp_path}/records.jsonl", 0).starts.tolist() == [0.0, 0.25]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("", "no request"),
        ("time\n", "no request"),
        ('{"time": 1}\n{"when": 2}\n', "line 2: none of"),
        ('{"time": 1}\n\n{"time": \n', "line 3: not JSON"),
        ("time\n1\nsoon\n", "line 3: 'soon' is no time"),
        ("1\ninf\n", "isn't finite"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "trace").write_text(content)
    with pytest.raises(ValueError, match=words):
        parse_schedule(f"replay:{tmp_path}/trace", 0)


def test_rises_are_those_of_the_planned_rate() -> None:
    schedule = parse_schedule(
        "steps:0/s,5s;2/s,20s;poisson:120/min,5s;10/s,5s;ramp:10-4/s,5s;ramp:0-8/s,10s;8/s,5s", 0
    )
    assert schedule.rises == [(5, 2), (30, 10), (40, 8)]
    assert [part.begin_s for part in schedule.parts] == [0, 5, 25, 30, 35, 40, 50]


def test_a_ramp_says_where_it_begins_and_ends() -> None:
    assert parse_schedule("ramp:2-100/s,60s", 0).parts == ((0, 2, 100),)


def test_a_trace_has_no_planned_rate(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("1\n2\n3\n")
    schedule = parse_schedule(f"replay:{tmp_path / 'trace'}", 0)
    assert (schedule.parts, schedule.rises) == ((), [])
