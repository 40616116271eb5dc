"""Two results beside each other: which levels, which figures, and what a condition says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result as Called
from typer.testing import CliRunner

from florence2_kserve.exit_codes import ExitCode
from florence2_loadtest.compare import compare, levels_of
from florence2_loadtest.conditions import LEVEL_FIGURES, parse_condition
from florence2_loadtest.results import (
    AutoscaleResult,
    Generator,
    Level,
    PeersResult,
    Result,
    RunResult,
    ServerSide,
    SweepResult,
    Target,
    TaskResult,
    Times,
    Trial,
    write_result,
)

HOST = {"cpu": "one", "cpus": "2"}
app = typer.Typer()
app.command()(compare)


def level(name: str = "concurrency 4", p95_s: float = 1.0, throughput: float = 20.0, **fields: Any) -> Level:
    given = {"answered": 100, "sent": 100, "planned": 100, **fields}
    latency = Times(count=given["answered"], mean_s=p95_s / 2, p50_s=p95_s / 2, p95_s=p95_s, p99_s=2 * p95_s)
    given = {"mode": "closed", "concurrency": 4, "latency": latency, "service": latency, **given}
    return Level(name=name, throughput=throughput, **given)


def task(p95_s: float, throughput: float = 5.0, answered: int = 50, **fields: Any) -> TaskResult:
    latency = Times(count=answered, p95_s=p95_s)
    return TaskResult(answered=answered, throughput=throughput, latency=latency, **fields)


def run(*levels: Level, host: dict[str, str] = HOST, target: Target | None = None, **fields: Any) -> RunResult:
    target = target or Target(url="http://127.0.0.1:8080")
    return RunResult(name="nightly", host=host, target=target, levels=list(levels), **fields)


def call(tmp_path: Path, before: Result, after: Result, *arguments: str) -> Called:
    for name, result in (("before.json", before), ("after.json", after)):
        write_result(result, tmp_path / name)
    return CliRunner().invoke(app, [str(tmp_path / "before.json"), str(tmp_path / "after.json"), *arguments])


def judged(tmp_path: Path, before: Level, after: Level, *conditions: str) -> Called:
    return call(tmp_path, run(before), run(after), *(f"--fail-if={condition}" for condition in conditions))


def told(text: str) -> str:
    """Returns a usage error's text without the frame that is drawn around it."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("p95>+10%", True),
        ("p95>+30%", False),
        ("p95 >= +200ms", True),
        ("p95>+0.3s", False),
        ("p95>1.2s", True),
        ("p95>1300 ms", False),
        ("p95<2s", True),
        ("service.p99>+10%", True),
        ("throughput<-5%", True),
        ("throughput<-15%", False),
        ("throughput<19/s", True),
        ("throughput<18", False),
        ("failed>0", True),
        ("failed>+3", False),
        ("failed>+0%", True),
        ("unsent>0", False),
        ("unsent>+0%", False),
        ("server.queue>+50%", True),
        ("queue>+50%", True),
        ("generate>+1%", False),
        ("cache_hits_share<90%", True),
        ("cache_hits_share<-60%", False),
        ("cache_hits_share<-0.1", True),
        ("server.tokens_per_s<400/s", True),
        ("*.p95>+10%", True),
        ("*.p95>+200%", False),
        ("OD.p95>+90%", True),
        ("<OCR>.p95>+0%", False),
        ("OD.failed>0", True),
        ("OCR.throughput<-1%", False),
    ],
)
def test_conditions(condition, holds, tmp_path):
    sides = [
        ServerSide(queue_s=queue, generate_s=0.5, cache_hits_share=share, tokens_per_s=tokens)
        for queue, share, tokens in ((0.1, 0.8, 500.0), (0.2, 0.4, 300.0))
    ]
    before = level(server=sides[0], tasks={"<OD>": task(1.0), "<OCR>": task(1.0)})
    after = level(
        p95_s=1.25, throughput=18.0, failed=3, server=sides[1], tasks={"<OD>": task(2.0, failed=3), "<OCR>": task(0.9)}
    )
    result = judged(tmp_path, before, after, condition)
    assert result.exit_code == (ExitCode.FAILED if holds else ExitCode.OK), result.output
    assert (f"FAILS {condition}" in result.output) == holds
    assert ("no condition holds" in result.output) != holds


def test_one_of_several_levels_and_conditions_is_enough(tmp_path):
    before = run(level("concurrency 1"), level("concurrency 4"))
    after = run(level("concurrency 1"), level("concurrency 4", p95_s=1.5))
    result = call(tmp_path, before, after, "--fail-if", "failed>0", "--fail-if", "p95>+10%")
    assert result.exit_code == ExitCode.FAILED
    (line,) = [line for line in result.output.splitlines() if line.startswith("FAILS")]
    assert line == "FAILS p95>+10%: concurrency 4: 1.00 s → 1.50 s (+50.0 %)"


def test_latencies_of_a_service_that_answers_nothing_any_more_do_not_pass(tmp_path):
    dead = level(answered=0, failed=100, throughput=0.0, p95_s=0.0)
    for condition in ("p95>+10%", "p95>2s", "throughput<-5%"):
        assert judged(tmp_path, level(), dead, condition).exit_code == ExitCode.FAILED
    gone = level(tasks={"<OD>": task(1.0)})
    for condition in ("OD.p95>+10%", "*.p95>+10%", "OD.throughput<-5%"):
        assert judged(tmp_path, level(tasks={"<OD>": task(1.0)}), gone, condition).exit_code == ExitCode.OK
        assert judged(tmp_path, gone, level(), condition).exit_code == ExitCode.FAILED


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("p95=1s", "a condition looks like"),
        ("p95>", "a condition looks like"),
        ("p95>1e3s", "a condition looks like"),
        ("speed>+10%", "no figure speed"),
        ("OD.slip.p95>+10%", "no figure slip.p95"),
        ("MIND.p95>+10%", "unknown task 'MIND'"),
        ("p95>2", "p95 takes us or µs or ms or s or min"),
        ("p95>10%", "+10% or -10%"),
        ("failed>3s", "failed takes no unit"),
        ("throughput<5%", "+5% or -5%"),
        ("goodput<-5%", "goodput isn't known in A and B"),
        ("server.queue>+10%", "server.queue isn't known in A"),
        ("*.p95>2s", "p95 isn't known in A and B"),
    ],
)
def test_a_condition_that_can_never_hold_is_a_wrong_command_line(condition, message, tmp_path):
    result = judged(tmp_path, level(), level(server=ServerSide(queue_s=0.1)), condition)
    assert result.exit_code == ExitCode.USAGE
    assert message in told(result.output)


def test_what_is_known_of_some_levels_is_judged_there_and_missed_elsewhere(tmp_path):
    before = run(level("a", goodput=10.0), level("b"))
    after = run(level("a", goodput=9.9), level("b"))
    result = call(tmp_path, before, after, "--fail-if", "goodput<-5%")
    assert result.exit_code == ExitCode.OK
    assert "not known: goodput<-5%: b: – → –" in result.output


def test_every_figure_can_stand_in_a_condition():
    assert {"p99.9", "slip.p99", "server.decode_step", "server.vision_busy_share", "retried"} < set(LEVEL_FIGURES)
    for name in LEVEL_FIGURES:
        assert parse_condition(f"{name}>+10%").name == name


def test_tables_show_both_and_what_changed(tmp_path):
    before = level(tasks={"<OD>": task(1.0), "<OCR>": task(0.5)}, server=ServerSide(queue_s=0.1, cache_hits_share=0.5))
    after = level(p95_s=0.9, failed=2, tasks={"<OD>": task(0.8), "<OCR>": task(0.5)}, server=ServerSide(queue_s=0.2))
    result = judged(tmp_path, before, after)
    assert result.exit_code == ExitCode.OK
    rows = [line.split() for line in result.output.splitlines()]
    assert ["throughput", "20.0/s", "20.0/s", "+0.0", "%"] in rows
    assert ["p95", "1.00", "s", "900", "ms", "-10.0", "%"] in rows
    assert ["failed", "0", "2", "from", "0"] in rows
    assert ["server.queue", "100", "ms", "200", "ms", "+100.0", "%"] in rows
    assert ["server.cache_hits_share", "50", "%", "–"] in rows
    assert ["<OD>", "p95", "1.00", "s", "800", "ms", "-20.0", "%"] in rows
    assert not [row for row in rows if row[:1] == ["goodput"]]  # neither has one


def test_levels_are_matched_by_name(tmp_path):
    before, after = run(level("1"), level("2")), run(level("2", p95_s=3.0), level("3"))
    result = call(tmp_path, before, after, "--fail-if", "p95>+10%")
    assert result.exit_code == ExitCode.USAGE
    assert "in A alone: 1; in B alone: 3 (--common compares the others)" in told(result.output)
    result = call(tmp_path, before, after, "--fail-if", "p95>+10%", "--common")
    assert result.exit_code == ExitCode.FAILED
    assert "FAILS p95>+10%: 2: 1.00 s → 3.00 s" in result.output
    result = call(tmp_path, run(level("1")), run(level("3")), "--common")
    assert result.exit_code == ExitCode.USAGE
    assert "in A alone: 1; in B alone: 3" in told(result.output)


def sweep(best: int | None, settings: dict[str, Any]) -> SweepResult:
    trials = [
        Trial(number=0, settings={}, state="failed"),
        Trial(number=1, settings=settings, levels=[level("1"), level("2")]),
        Trial(number=2, settings={}, levels=[level("9")]),
    ]
    return SweepResult(name="s", host=HOST, target="both", objective="throughput", best=best, trials=trials)


def test_levels_of_each_kind():
    target = Target(url="http://127.0.0.1:8080")
    peers = PeersResult(name="p", baseline="triton", runs={"ours": run(level("1")), "triton": run(level("1"))})
    autoscale = AutoscaleResult(name="a", target=target, deployment_mode="Knative", level=level("spike"))
    assert list(levels_of(run(level("1"), level("2")))) == ["1", "2"]
    assert list(levels_of(peers)) == ["ours: 1", "triton: 1"]
    assert list(levels_of(autoscale)) == ["spike"]
    assert list(levels_of(sweep(1, {}))) == ["1", "2"]
    assert levels_of(sweep(None, {})) == {}


def test_results_of_two_kinds_and_files_of_none_are_refused(tmp_path):
    result = call(tmp_path, run(level()), sweep(1, {}))
    assert result.exit_code == ExitCode.USAGE
    assert "A is a run and B a sweep" in told(result.output)
    result = call(tmp_path, sweep(None, {}), sweep(None, {}))
    assert result.exit_code == ExitCode.USAGE
    assert "neither result has a level" in told(result.output)
    (tmp_path / "other.json").write_text("[1]")
    for name, message in (("other.json", "not a result"), ("none.json", "no such file")):
        result = CliRunner().invoke(app, [str(tmp_path / "before.json"), str(tmp_path / name)])
        assert result.exit_code == ExitCode.USAGE
        assert message in told(result.output)


def warnings(result: Called) -> list[str]:
    return [line.removeprefix("warning: ") for line in result.output.splitlines() if line.startswith("warning")]


def test_what_keeps_figures_from_being_comparable_is_said(tmp_path):
    load = {"concurrency": 4, "window_s": 5.0}
    targets = [
        Target(url=url, model="embedded", revision=revision, settings={"dtype": dtype})
        for url, revision, dtype in (
            ("http://127.0.0.1:1", "aaa", "float32"),
            ("http://127.0.0.1:2", "bbb", "bfloat16"),
        )
    ]
    before = run(level(), target=targets[0], scenario={"name": "x", "load": load, "mix": [{"task": "<OD>"}]})
    slow = level(stable=False, generator=Generator(bottleneck="its processor was busy"))
    scenario = {"name": "y", "load": {**load, "window_s": 1.0}, "mix": [{"task": "<OCR>"}]}
    after = run(slow, target=targets[1], host={**HOST, "cpu": "two"}, scenario=scenario)
    result = call(tmp_path, before, after)
    assert result.exit_code == ExitCode.OK, result.output
    assert warnings(result) == [
        "on another machine: cpu one | two",
        "another scenario: load.window_s 5.0 | 1.0",
        "another scenario: mix.0.task <OD> | <OCR>",
        "another target: revision aaa | bbb",
        "concurrency 4 of B: the load generator was the bottleneck: its processor was busy",
        "concurrency 4 of B: its windows didn't become stable",
    ]
    assert "setting dtype: float32 → bfloat16" in result.output


def test_the_same_twice_gives_no_warning(tmp_path):
    result = call(tmp_path, sweep(1, {"workers": 2}), sweep(1, {"workers": 3}), "--fail-if", "p95>+0%")
    assert result.exit_code == ExitCode.OK
    assert warnings(result) == []
    assert "setting workers: 2 → 3" in result.output
