"""``florence2 loadtest sweep`` as it is run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from florence2_loadtest.results import SweepResult, Trial, read_result
from florence2_loadtest.scenario import ClosedLoad, MixItem, Pictures, Scenario, read_scenario
from florence2_loadtest.sweep.checkpoint import Checkpoint
from florence2_loadtest.sweep.command import sweep
from florence2_loadtest.sweep.fingerprint import fingerprint
from florence2_loadtest.sweep.space import make_space
from florence2_loadtest.sweep.trial import Bench, make_workload
from tests.loadtest.sweep.trials import level

COMMAND = [sys.executable, "-c", "import typer; from florence2_loadtest.sweep.command import sweep; typer.run(sweep)"]
SCENARIO = """
mix: [{task: <CAPTION>}, {task: <OD>}]
pictures: {scenes: 2, width: 64, height: 48}
load: {concurrency: 2, window_s: 0.2, max_windows: 2, warmup_s: 0}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Runs the command in this process, for what ends before anything is measured."""
    app = typer.Typer()
    app.command()(sweep)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on_measures_nothing_twice_and_leaves_no_server(
    scenario: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    # No transformer takes 300 rows in a request, since its queue has 256: half of the servers don't start.
    arguments = [scenario, "--target", "transformer", "--output", output, "--constraint", "p95<30s"]
    arguments += ["--param", "max_rows=32,300", "--param", "max_asyncio_workers=1,2"]
    arguments += ["--set", "env.SOME_TOKEN=verysecret"]
    checkpoint = output / "checkpoint.jsonl"

    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL)
    servers = _kill_once_it_measures_its_third(process, checkpoint)
    _wait_until_gone(servers)
    left = checkpoint.read_bytes()
    assert left.count(b"\n") in (3, 4)

    checkpoint.write_bytes(left + b'{"number": 2, "sett')
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkpoint.read_bytes().startswith(left)
    result = read_result(output / "result.json")
    assert isinstance(result, SweepResult)
    assert [trial.number for trial in result.trials] == list(range(6 + 6))
    secret = {"env.SOME_TOKEN": "***"}
    assert [trial.settings for trial in result.trials[:6]] == [
        secret,
        *({**secret, "max_rows": rows, "max_asyncio_workers": workers} for rows in (32, 300) for workers in (1, 2)),
        secret,
    ]
    assert [trial.state for trial in result.trials[:6]] == ["done", "done", "done", "failed", "failed", "done"]
    assert sorted(trial.confirms or 0 for trial in result.trials[6:]) == [0, 0, 1, 1, 2, 2]
    assert "never fit max_queue_size" in (result.trials[3].error or "")
    assert result.best in (0, 1, 2)
    assert isinstance(yaml.safe_load((output / "values.yaml").read_text()), dict)
    lines = checkpoint.read_text().splitlines()
    assert len(lines) == 1 + 6 + 6
    assert not any("verysecret" in path.read_text() for path in output.iterdir())

    again = run(*arguments)
    assert again.returncode == 0
    assert checkpoint.read_text().splitlines() == lines  # nothing was measured anew


@pytest.mark.slow
def test_the_predictor_is_measured_alone_and_tells_its_side() -> None:
    scenario = Scenario(
        mix=[MixItem(task=task) for task in ("<CAPTION>", "<REGION_TO_CATEGORY>", "<CAPTION_TO_PHRASE_GROUNDING>")],
        pictures=Pictures(scenes=2),
        parameters={"num_beams": 2, "max_new_tokens": 4, "length_penalty": 0.5},
        load=ClosedLoad(concurrency=2, window_s=0.5, max_windows=2, warmup_s=0),
    )
    settings = {"env.OMP_NUM_THREADS": "1", "admission_delay_us": 100}
    bench = Bench(scenario, make_workload(scenario, "predictor", settings), "predictor")
    (level,) = bench.measure(settings)
    assert level.answered > 0
    assert level.failed == 0
    assert level.server is not None
    assert level.server.requests
    assert level.server.tokens


def test_what_is_wrong_with_a_command_line_is_said_before_anything_is_written(
    scenario: Path, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    output = tmp_path / "output"
    for arguments, message in {
        ("--param", "max_rows=0"): "max_rows=0: Input should be greater",
        ("--search", "optuna", "--param", "max_rows=1:32"): "optuna needs a budget",
        ("--param", "max_rows=8,16", "--set", "max_rows=8"): "it is searched over",
        ("--param", "max_rows=8,16", "--objective", "goodput"): "the scenario names none",
        ("--param", "max_rows=8,16", "--constraint", "p95"): "looks like p95<2s",
        ("--param", "max_rows=8,16", "--confirm", "1"): "--confirm 1 would tell nothing",
        ("--param", "env.HF_TOKEN=a,b"): "env.HF_TOKEN isn't searched over: it is a secret",
        ("--param", "max_rows=8,16", "--grid", "replaced"): "one of --param, --space and --grid",
    }.items():
        done = invoke(scenario, *arguments, "--output", output)
        assert done.exit_code == 2, arguments
        assert message in _plain(done.output)
    assert not output.exists()


def test_a_checkpoint_of_another_sweep_is_refused(scenario: Path, tmp_path: Path, invoke: Callable[..., Any]) -> None:
    checkpoint = tmp_path / "output" / "checkpoint.jsonl"
    checkpoint.parent.mkdir()
    checkpoint.write_text(json.dumps({"sweep": {"target": "both"}}) + "\n")
    done = invoke(scenario, "--target", "predictor", "--param", "max_rows=8", "--output", checkpoint.parent)
    assert done.exit_code == 1
    assert "another sweep's, with another target" in _plain(done.output)


def test_what_a_server_said_cannot_keep_the_result_from_being_written(
    scenario: Path, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    settings = [{}, {"max_rows": 8}, {}]
    error = {"state": "failed", "error": "no such folder [/models/large]"}
    mark = fingerprint(
        make_space({"max_rows": "8,16"}, "transformer"), read_scenario(scenario), "transformer", {}, answer_tokens=40
    )
    with Checkpoint(tmp_path / "output" / "checkpoint.jsonl", mark) as checkpoint:
        for number, given in enumerate(settings):
            done = error if given else {"levels": [level()]}
            checkpoint.add(Trial.model_validate({"number": number, "settings": given, **done}))
    arguments = ["--target", "transformer", "--param", "max_rows=8,16", "--trials", "1"]
    done = invoke(scenario, *arguments, "--output", tmp_path / "output")
    assert done.exit_code == 0, done.output
    assert "no such folder [/models/large]" in done.output
    assert isinstance(read_result(tmp_path / "output" / "result.json"), SweepResult)


def _kill_once_it_measures_its_third(sweep: subprocess.Popen[bytes], checkpoint: Path) -> list[int]:
    """Kills a sweep that has noted two trials and started servers for the next; returns these."""
    end = time.monotonic() + 120
    try:
        while time.monotonic() < end:
            assert sweep.poll() is None
            noted = checkpoint.exists() and checkpoint.read_bytes().count(b"\n") == 3
            if noted and len(children := _children(sweep.pid)) == 2:  # the transformer, and its instant predictor
                return children
            time.sleep(0.02)
        raise AssertionError("the sweep never got so far")
    finally:
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()


def _children(parent: int) -> list[int]:
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(child) for child in listed.read_text().split()]


def _wait_until_gone(processes: list[int]) -> None:
    end = time.monotonic() + 60
    while any(_lives(process) for process in processes):
        assert time.monotonic() < end, processes
        time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _plain(text: str) -> str:
    """Returns an error without the box that typer draws around it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
