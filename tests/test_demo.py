from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from florence2_kserve.tasks import TASKS


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "florence2_kserve.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=cwd)


def test_the_demo_answers_beside_the_truth_and_leaves_a_picture_and_nothing_running(tmp_path):
    before = servers()
    result = run("demo", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert servers() <= before
    answers = [json.loads(line) for line in re.findall(r"^    answer (.*)$", result.stdout, re.MULTILINE)]
    truths = [json.loads(line) for line in re.findall(r"^    truth  (.*)$", result.stdout, re.MULTILINE)]
    assert [list(answer) for answer in answers] == [list(truth) for truth in truths]
    assert {task for answer in answers for task in answer} == set(TASKS)
    right = sum(answer == truth for answer, truth in zip(answers, truths, strict=True) if "<REGION_TO_" in str(truth))
    assert right >= 2, "the embedded model knows what a region holds, nearly always"
    with Image.open(tmp_path / "annotated.png") as picture:
        assert picture.width > 2 * picture.height * 0.9
    assert "toy" in result.stdout


def servers() -> set[str]:
    lines = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    return {line.decode() for line in lines if b"florence2_kserve.cli" in line}


@pytest.mark.slow  # starts servers; quick tests ask a running service by the same command
def test_infer_prints_one_answer(tmp_path, service):
    path = tmp_path / "white.png"
    Image.new("RGB", (80, 60), "white").save(path)
    for where in (("--url", service.rest_url), ("--url", f"grpc://{service.grpc_url}"), ()):
        result = run("infer", str(path), "--task", "OD", *where)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout).keys() == {"<OD>"}


def test_infer_says_what_is_wrong(tmp_path, service):
    path = tmp_path / "white.png"
    Image.new("RGB", (80, 60), "white").save(path)
    result = run("infer", str(path), "--task", "NONE", "--url", service.rest_url)
    assert result.returncode == 1
    assert "error: TASK_PROMPT, row 0: unknown task 'NONE'" in result.stderr
