"""What docs/batch.md and docs/cli.md tell users to type is typed here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from florence2_kserve.batch.ledger import FIELDS, FailureKind
from florence2_kserve.cli import app
from florence2_kserve.exit_codes import ExitCode
from tests.batch.runs import QUICK, draw, names, read_lines, run
from tests.batch.test_s3 import bucket  # noqa: F401

DOCS = Path(__file__).parents[2] / "docs"
BATCH, CLI = ((DOCS / name).read_text() for name in ("batch.md", "cli.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds what the examples name."""
    monkeypatch.chdir(tmp_path)
    paths = draw(tmp_path / "pictures", 2)
    (tmp_path / "list.txt").write_text("pictures/00001.png\n")
    data = [path.read_bytes() for path in paths]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": data, "phrase": ["a red circle", "a star"]}), tmp_path / "table.parquet"
    )
    (tmp_path / "picture.png").write_bytes(data[0])
    return tmp_path


def type_in(script: str, url: str) -> str:
    """Types a block into a shell, with the service's real address."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = subprocess.run(
        ["sh", "-eu", "-c", script.replace("http://localhost:8080", url)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert shell.returncode == 0, shell.stderr
    return shell.stdout


@pytest.mark.slow  # a dozen commands
@pytest.mark.parametrize("script", blocks(BATCH, "sh"))
def test_commands_of_the_batch(script, place, service):
    said = type_in(script, service.rest_url)
    assert "pictures answered" in said
    if "wc -l" in script:
        assert said.rstrip().endswith("2")


@pytest.mark.slow
@pytest.mark.parametrize("script", blocks(CLI, "sh"))
def test_commands_of_the_command_line(script, place, service):
    assert type_in(script, service.rest_url)
    assert ("--plot" in script) == (place / "drawn.png").exists()


@pytest.mark.slow
def test_commands_of_an_object_store(bucket, place, service):  # noqa: F811
    (script,) = blocks(BATCH, "sh s3")
    assert script.count("…") == 2
    command = script.splitlines()[1].replace("s3://bucket/pictures", f"{bucket}/set")
    assert "3 pictures answered" in type_in(command, service.rest_url)


def test_the_indexed_job_runs_its_part(place, service, monkeypatch):
    (text,) = blocks(BATCH, "yaml")
    job = yaml.safe_load(text)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command, *arguments = [argument.replace("/data", str(place)) for argument in container["args"]]
    assert command == "batch"
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailIndex"
    assert rule["onExitCodes"]["values"] == [ExitCode.USAGE, ExitCode.SOME_REFUSED], "others may be gone at a rerun"
    assert f"--shard=auto/{job['spec']['completions']}" in arguments
    arguments[1] = f"--url={service.rest_url}"
    for index in range(job["spec"]["completions"]):
        assert run(*arguments, *QUICK, env={"JOB_COMPLETION_INDEX": str(index)}).returncode == ExitCode.OK
    outputs = sorted(place.glob("captions-*.jsonl"))
    assert len(outputs) == job["spec"]["completions"]
    assert names([line for output in outputs for line in read_lines(output)]) == ["00000.png", "00001.png"]


def test_every_exit_code_is_told_with_its_meaning():
    told = dict(re.findall(r"^\| (\d+) \| (.*) \|$", CLI, re.MULTILINE))
    assert told == {str(code.value): code.meaning for code in ExitCode}


def test_every_field_and_kind_of_failure_is_told():
    _, table = BATCH.split("| field | |", 1)
    rows = re.findall(r"^\| (`.*?) \|", table.split("\n\n", 1)[0], re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(FIELDS)
    assert re.findall(r"^\| `(\w+)` \| ", BATCH.split("| kind | |", 1)[1], re.MULTILINE) == [
        kind.value for kind in FailureKind
    ]


def test_every_command_is_told():
    told = set(re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| (`.*?) \|", CLI.split("## ")[0], re.MULTILINE))))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert told == commands - {"version"}


def test_addresses_are_as_told(place, service):
    (line, *_) = [
        json.loads(text)
        for text in (run("table.parquet", "--column", "image", "--url", service.rest_url, *QUICK), place)
        and (place / "answers.jsonl").read_text().splitlines()
    ]
    assert re.fullmatch(rf"{re.escape(str(place))}/table\.parquet#\d", line["address"])
