"""``florence2 loadtest run``: scenarios on small servers and on the real service."""

from __future__ import annotations

import asyncio
import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.local import LocalService, free_port
from florence2_kserve.tasks import TASKS
from florence2_loadtest.console import remarks
from florence2_loadtest.measure import file_name, measure
from florence2_loadtest.results import Generator, Level, RunResult, Target, TaskResult, read_records, read_result
from florence2_loadtest.run import exit_code, run
from florence2_loadtest.scenario import ClosedLoad, MixItem, OpenLoad, Pictures, Scenario
from tests.loadtest.fake_server import FakeServer, Reply

SHORT = ["--window", "0.2", "--max-windows", "1"]
AWAY = Reply(503, '{"error": "the predictor can\'t answer now: away"}')
app = typer.Typer()
app.command()(run)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "mix: [{task: CAPTION}, {task: OD}]\npictures: {scenes: 1, width: 64, height: 64}\n"
        "load: {concurrency: 2, warmup_s: 0}\n"
    )
    return str(path)


def test_a_run_prints_its_levels_and_writes_them_with_every_request(scenario: str, tmp_path: Path) -> None:
    with FakeServer(lambda number: 0.005).serve() as url:
        done = command(
            "--url", url, "--scenario", scenario, "--concurrency", "1:2", *SHORT, "--output", str(tmp_path / "o")
        )
    assert done.exit_code == 0, done.output
    assert "concurrency 1" in done.stdout
    assert "<OD>" in done.stdout
    result = read_result(tmp_path / "o" / "result.json")
    assert isinstance(result, RunResult)
    assert [level.name for level in result.levels] == ["concurrency 1", "concurrency 2"]
    assert (result.name, result.target.url, result.scenario["mix"][1]["task"]) == ("tiny", url, "<OD>")
    for level in result.levels:
        records = list(read_records(tmp_path / "o" / f"records-{file_name(level.name)}.jsonl"))
        assert len(records) == level.answered > 0
    with (tmp_path / "o" / "perf_analyzer.csv").open() as file:
        assert sorted(row["Concurrency"] for row in csv.DictReader(file)) == ["1", "2"]


def test_tasks_may_be_measured_separately(scenario: str, tmp_path: Path) -> None:
    with FakeServer(lambda number: 0.005).serve() as url:
        done = command("--url", url, "--scenario", scenario, "--separately", *SHORT, "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, RunResult)
    assert [list(level.tasks) for level in result.levels] == [["<CAPTION>"], ["<OD>"]]
    assert (tmp_path / "records-od-concurrency-2.jsonl").exists()


def test_a_missed_slo_is_an_exit_code_and_a_word(scenario: str) -> None:
    with FakeServer(lambda number: 0.005).serve() as url:
        base = ("--url", url, "--scenario", scenario, *SHORT, "--slo")
        met, missed = command(*base, "p95<50s"), command(*base, "od=p95<1us")
    assert (met.exit_code, missed.exit_code) == (0, 1), met.output
    assert "p95<50s met" in met.stdout
    assert "p95<1us MISSED" in missed.stdout


def test_a_service_that_refuses_everything_is_an_exit_code_and_says_why(scenario: str) -> None:
    with FakeServer(lambda number: 0.01, replies=(AWAY,) * 10_000).serve() as url:
        done = command("--url", url, "--scenario", scenario, "--schedule", "constant:20/s,200ms")
    assert done.exit_code == 1
    assert "4 × http 503" in done.stdout


def test_a_service_that_is_not_there_is_an_exit_code(scenario: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for patience in ("0", "0.1"):
        done = command("--url", url, "--scenario", scenario, "--timeout", "0.1", "--wait-ready", patience)
        assert done.exit_code == 4
        assert "error:" in done.stderr
    assert "isn't ready after 0.1 s" in done.stderr


def test_a_service_that_is_not_ready_yet_is_waited_for(scenario: str) -> None:
    server = FakeServer(lambda number: 0.005)
    server.ready_at = time.monotonic() + 1.0
    with server.serve() as url:
        done = command("--url", url, "--scenario", scenario, *SHORT)
    assert done.exit_code == 0, done.output
    assert server.arrivals[0] >= server.ready_at
    assert f"waiting until {url} is ready" in done.stderr


def test_what_an_earlier_run_left_is_removed(scenario: str, tmp_path: Path) -> None:
    stale = ["perf_analyzer.csv", "OD.perf_analyzer.csv", "records-concurrency-99.jsonl"]
    others = ["notes.csv", "records.jsonl", "values.yaml"]
    for name in [*stale, *others]:
        (tmp_path / name).write_text("old")
    with FakeServer(lambda number: 0.005).serve() as url:
        done = command("--url", url, "--scenario", scenario, "--separately", *SHORT, "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    of_the_run = ["CAPTION.perf_analyzer.csv", "OD.perf_analyzer.csv", "result.json"]
    of_the_run += [f"records-{task}-concurrency-2.jsonl" for task in ("caption", "od")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*of_the_run, *others, "tiny.yaml"])
    assert (tmp_path / "OD.perf_analyzer.csv").read_text() != "old"
    assert {(tmp_path / name).read_text() for name in others} == {"old"}


def test_results_that_cannot_be_written_are_an_error_without_a_traceback(scenario: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with FakeServer(lambda number: 0.005).serve() as url:
        done = command("--url", url, "--scenario", scenario, *SHORT, "--output", str(tmp_path / "file"))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: concurrency 2: FileExistsError: ")
    assert isinstance(done.exception, SystemExit)


def test_two_slos_of_one_task_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("mix: [{task: OD, slo: p95<2s}, {task: OD, slo: p50<1s}]\n")
    done = command("--url", "http://h", "--scenario", str(path))
    assert done.exit_code == 2
    assert "<OD> has two SLOs" in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrency", "60:12:12"], "upwards"),
        (["--schedule", "sawtooth:1/s,1s"], "a schedule looks like"),
        (["--scenario", "nosuch"], "nosuch"),
        (["--tasks", "dance"], "unknown task"),
        (["--slo", "fast"], "p95<2s"),
        (["--url", "ftp://h"], "http://"),
        (["--url", "http://h", "--protocol", "grpc"], "is not asked over grpc"),
        (["--header", "nocolon"], "NAME: VALUE"),
        (["--schedule", "constant:1/s,1s", "--requests", "5"], "has no max_requests"),
    ],
)
def test_a_wrong_command_line_is_explained_before_anything_is_begun(arguments: list[str], words: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("<OD>, concurrency 36", "od-concurrency-36"),
        ("spike:5/s,20s;100/s,5s", "spike-5-s-20s-100-s-5s"),
        ("replay:../../etc/x", "replay-..-..-etc-x"),
    ],
)
def test_a_levels_name_becomes_a_files(name: str, file: str) -> None:
    assert file_name(name) == file


def result_of(*levels: Level) -> RunResult:
    return RunResult(name="it", target=Target(url="http://h", model=None), levels=list(levels))


def level_of(**fields: Any) -> Level:
    return Level(**{"name": "l", "mode": "closed", "planned": 1, "answered": 1, "goodput": None, **fields})


def test_a_level_without_an_answer_is_no_success_beside_others() -> None:
    assert exit_code(result_of(level_of(), level_of(answered=0, statuses={"timeout": 1}))) == 1
    assert exit_code(result_of(level_of())) == 0


def test_a_service_that_went_away_is_told_from_one_that_refuses() -> None:
    assert exit_code(result_of(level_of(answered=0, statuses={"connection": 1}))) == 4


def test_the_reader_is_told_what_not_to_believe() -> None:
    fields: dict[str, Any] = {
        "generator": Generator(bottleneck="its event loop was busy"),
        "tasks": {
            "<OD>": TaskResult(slo="p95<2s", slo_met=False),
            "<OCR>": TaskResult(slo="p95<2s", slo_met=False, failed=3),
        },
    }
    lines = " / ".join(
        remarks(result_of(level_of(stable=False, statuses={"ok": 1, "timeout": 2}, held_back=17, **fields)))
    )
    assert "17 requests waited for others" in lines
    assert "<OD> misses its SLO: none of its requests was over" in lines
    assert "<OCR> misses its SLO: none of its 3 requests was answered" in lines
    assert "2 × timeout" in lines
    assert "didn't agree" in lines
    assert "the load generator was the bottleneck: its event loop was busy" in lines
    assert remarks(result_of(level_of(stable=True, statuses={"ok": 1}, generator=Generator(bottleneck=None)))) == []


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "encoding"), [("rest", "json"), ("rest", "binary"), ("grpc", "json")])
def test_the_real_service_answers_all_tasks_in_a_closed_loop(
    service: LocalService, protocol: Any, encoding: Any
) -> None:
    url = service.rest_url if protocol == "rest" else f"grpc://{service.grpc_url}"
    asked = Scenario(
        mix=[MixItem(task=task) for task in TASKS],
        pictures=Pictures(scenes=4),
        load=ClosedLoad(concurrency=3, window_s=60, max_requests=30, warmup_s=0),
        encoding=encoding,
    )
    said: list[str] = []
    result, records = asyncio.run(
        measure(
            Target(url=url, protocol=protocol, model=None),
            asked,
            metrics_urls=[f"{service.rest_url}/metrics"],
            say=said.append,
        )
    )
    (level,) = result.levels
    assert level.statuses == {"ok": 30}
    assert len(records[level.name]) == 30
    assert len(level.tasks) >= 8
    assert (result.target.model, bool(result.target.revision)) == ("embedded", True)
    assert level.server is not None
    assert level.server.requests == pytest.approx(30, abs=6)  # beside them what is in flight when it is read
    assert any("answers/s" in line for line in said)


@pytest.mark.slow
def test_the_real_service_answers_in_an_open_loop(service: LocalService) -> None:
    asked = Scenario(pictures=Pictures(scenes=2), load=OpenLoad(schedule="poisson:5/s,2s"))
    result, _ = asyncio.run(
        measure(Target(url=f"grpc://{service.grpc_url}", protocol="grpc", keep_alive=False, model=None), asked)
    )
    (level,) = result.levels
    assert level.planned == level.answered > 0
    assert level.latency.count == level.slip.count == level.planned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGKILL, -9)],
)
def test_what_was_measured_before_an_end_by_signal_is_written(
    number: signal.Signals, code: int, scenario: str, tmp_path: Path
) -> None:
    program = "import typer; from florence2_loadtest.run import run; typer.run(run)"
    with FakeServer(lambda number: 0.005).serve() as url:
        options = ["--url", url, "--scenario", scenario, "--concurrency", "1:50", "--output", str(tmp_path)]
        options += ["--window", "0.5", "--max-windows", "1"]
        with subprocess.Popen([sys.executable, "-c", program, *options], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            while not process.stderr.readline().startswith("concurrency 3 …"):
                assert process.poll() is None
            while not (unfinished := tmp_path / "records-concurrency-3.jsonl").exists():
                assert process.poll() is None
            time.sleep(0.1)
            process.send_signal(number)
            process.communicate(timeout=30)
    assert process.returncode == code
    assert next(read_records(unfinished)).status == "ok"
    assert (tmp_path / "perf_analyzer.csv").exists() == (number != signal.SIGKILL)
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, RunResult)
    assert 2 <= len(result.levels) < 50


@pytest.mark.slow
def test_without_a_url_a_service_is_started(scenario: str, tmp_path: Path) -> None:
    done = command("--scenario", scenario, "--protocol", "grpc", "--requests", "8", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    result = read_result(tmp_path / "result.json")
    assert isinstance(result, RunResult)
    assert result.levels[0].answered == 8
    assert result.levels[0].server is not None
    assert result.levels[0].server.images_encoded is not None
