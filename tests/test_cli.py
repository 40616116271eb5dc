from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from florence2_kserve.cli import app
from florence2_kserve.client import Florence2Client
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.local import free_port
from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.scenes import held_out_scene


def run(*arguments: str, stdin: bytes | None = None):
    return CliRunner().invoke(app, [*arguments], input=stdin)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.fromarray(held_out_scene(36).image).save(path)
    return path


def test_infer_prints_what_the_client_gets_in_one_line(picture, service):
    result = run("infer", str(picture), "--task", "OD", "--num-beams", "1", "--url", service.rest_url)
    with Florence2Client(service.rest_url) as client:
        answer = client.infer(picture, "<OD>", num_beams=1)
    assert result.stdout == json.dumps(answer, ensure_ascii=False) + "\n"


def test_infer_takes_a_picture_from_standard_input_or_an_address(picture, service):
    ask = ("--url", service.rest_url, "--num-beams", "1")
    by_path, by_input, by_address = (
        run("infer", str(picture), *ask),
        run("infer", "-", *ask, stdin=picture.read_bytes()),
        run("infer", picture.as_uri(), *ask),
    )
    assert by_path.exit_code == ExitCode.OK
    assert by_path.stdout == by_input.stdout == by_address.stdout


def test_infer_asks_several_tasks_and_gives_the_text_to_those_that_take_one(picture, service):
    tasks = ("--task", "CAPTION", "--task", "CAPTION_TO_PHRASE_GROUNDING", "--text", "a pink square")
    result = run("infer", str(picture), *tasks, "--url", service.rest_url)
    answer = json.loads(result.stdout)
    assert list(answer) == ["<CAPTION>", "<CAPTION_TO_PHRASE_GROUNDING>"]
    assert answer["<CAPTION_TO_PHRASE_GROUNDING>"]["labels"] == ["a pink square"]
    assert result.stdout.count("\n") == 1


def test_infer_prints_scores(picture, service):
    tasks = ("--task", "CAPTION", "--task", "OD")
    result = run("infer", str(picture), *tasks, "--scores", "--url", service.rest_url)
    answer = json.loads(result.stdout)
    assert answer["<CAPTION>"].keys() == {"answer", "score", "scores", "finish_reason"}
    assert len(answer["<CAPTION>"]["scores"]) == 1
    assert len(answer["<OD>"]["scores"]) == len(answer["<OD>"]["answer"]["labels"]) > 0
    assert all(0 <= score <= 1 for score in answer["<OD>"]["scores"])
    assert answer["<OD>"]["finish_reason"] == "stop"


def test_infer_prints_a_table_and_draws(picture, service, tmp_path):
    tasks = ("--task", "CAPTION", "--task", "DENSE_REGION_CAPTION")
    drawn = tmp_path / "drawn.png"
    options = ("--output-format", "table", "--plot", str(drawn), "--url", service.rest_url)
    result = run("infer", str(picture), *tasks, *options)
    assert result.exit_code == ExitCode.OK, result.stderr
    heads, *rows = result.stdout.splitlines()
    assert heads.split() == ["task", "what", "where"]
    assert rows[0].startswith("<CAPTION>")
    assert sum(row.startswith("<DENSE_REGION_CAPTION>") for row in rows) >= 2
    for path in (drawn, tmp_path / "drawn-2.png"):
        with Image.open(path) as image:
            assert image.width > 100


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("gone.png",), ExitCode.USAGE, "gone.png"),
        (("nosuch://x/y.png",), ExitCode.USAGE, "nosuch"),
        (("-", "--url", "localhost:8080"), ExitCode.USAGE, "url has to start with"),
        (("-", "--url", "http://[::1"), ExitCode.USAGE, "Invalid port"),
        (("-", "--task", "OD", "--task", "OCR", "--text", "x"), ExitCode.USAGE, "none of OD, OCR takes a text"),
        (("-", "--header", "Host", "--url", "http://x"), ExitCode.USAGE, "has to be 'NAME: VALUE'"),
    ],
)
def test_infer_says_what_is_wrong(arguments, code, says):
    result = run("infer", *arguments, stdin=b"x")
    assert result.exit_code == code
    assert says in result.stderr


def test_infer_says_what_the_service_refuses(picture, service):
    region = ("--task", "REGION_TO_OCR", "--text", "no region")
    result = run("infer", str(picture), *region, "--url", service.rest_url)
    assert result.exit_code == ExitCode.FAILED
    assert result.stderr.startswith("error: TEXT_PROMPT, row 0: <REGION_TO_OCR>")


def test_tasks_are_those_of_the_registry():
    _, *rows = run("tasks").stdout.splitlines()
    assert [row.split()[0] for row in rows] == list(TASKS)
    listed = json.loads(run("tasks", "--json").stdout)
    assert [entry["task"] for entry in listed] == list(TASKS)
    assert {entry["task"]: entry["takes"] for entry in listed}["<REGION_TO_OCR>"] == "region"


def test_tasks_are_a_drawn_table_on_a_terminal():
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "florence2_kserve.cli", "tasks"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=child, stderr=child, env=environment)
    os.close(child)
    output = io.BytesIO()
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:  # the other end was closed
            break
        if not data:
            break
        output.write(data)
    os.close(parent)
    assert process.wait() == 0
    text = output.getvalue().decode()
    assert "┃" in text
    assert all(task in text for task in TASKS)


def test_help_loads_nothing_heavy():
    heavy = ["torch", "numpy", "httpx", "grpc", "rich", "fsspec", "pyarrow", "PIL", "huggingface_hub", "orjson"]
    code = (
        "import sys; from florence2_kserve.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('loaded', sorted(set({heavy}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "loaded []"
    assert "batch" in result.stdout


@pytest.mark.slow  # the client tries again for a while
def test_nobody_at_the_address(picture):
    result = run("infer", str(picture), "--url", f"grpc://127.0.0.1:{free_port()}")
    assert result.exit_code == ExitCode.UNREACHABLE
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
