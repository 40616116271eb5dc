"""``florence2 check`` against services that are well, away, or wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from florence2_kserve.check import ASKED, CheckFailed, _formed
from florence2_kserve.cli import app
from florence2_kserve.local import LocalService, free_port
from florence2_kserve.model_files import locate_model


def check(*arguments: str) -> tuple[int, list[str]]:
    """Runs the command and returns its exit code and lines."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["check", *arguments])
    return result.exit_code, result.output.splitlines()


@pytest.mark.parametrize("way", ["REST", "gRPC", "a gRPC URL"])
def test_a_service_that_is_well(service, way):
    arguments = {
        "REST": ["--url", service.rest_url],
        "gRPC": ["--url", f"http://{service.grpc_url}", "--grpc"],
        "a gRPC URL": ["--url", f"grpc://{service.grpc_url}"],
    }[way]
    code, lines = check(*arguments, "--header", "x-request-id: check")
    assert code == 0, lines
    assert len(lines) == len(ASKED) + 6
    assert all(line.startswith("ok") for line in lines[:-1])
    assert lines[-1].endswith(": all is well")
    assert any("a wrong request: refused with 400" in line or "with INVALID_ARGUMENT" in line for line in lines)
    assert "the truth: a pink square" in lines[-2]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there(scheme):
    code, lines = check("--url", f"{scheme}://127.0.0.1:{free_port()}", "--wait", "0.5")
    assert code == 1
    assert len(lines) == 2
    assert "isn't ready after 0.5 s" in lines[0]
    assert "refused" in lines[0]
    assert lines[1].endswith("1 failed")


@pytest.mark.parametrize("grpc", [False, True])
def test_a_wrong_model_name_is_told_with_the_right_one(service, grpc):
    arguments = ["--url", f"http://{service.grpc_url}", "--grpc"] if grpc else ["--url", service.rest_url]
    code, lines = check(*arguments, "--model-name", "other", "--wait", "0.5")
    assert code == 1
    assert "no model 'other' here; there is florence2" in lines[0]


def test_a_transformer_whose_predictor_is_away():
    flags = {"predictor_host": f"127.0.0.1:{free_port()}", "predictor_request_retries": 1}
    with LocalService("transformer", **flags) as alone:
        code, lines = check("--url", alone.rest_url, "--wait", "3")
    assert code == 1
    assert lines[0].startswith("ok")
    assert lines[1].startswith("FAILED")
    assert "the predictor can't answer now" in lines[1]
    assert len(lines) == 3, "it went on asking, though nothing answers"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with two words confused: its answers have their form, and are wrong."""
    folder = tmp_path_factory.mktemp("models") / "spoilt"
    shutil.copytree(locate_model().folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = [tokenizer.encode(word, add_special_tokens=False).ids[0] for word in (" square", " circle")]
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.language_model.shared.weight"]
    embeddings[words] = embeddings[words[::-1]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow  # starts two services
def test_an_embedded_model_that_tells_no_truth_and_an_unknown_one_of_which_none_is_asked(spoilt):
    with LocalService("predictor", model=spoilt) as predictor:
        with LocalService("transformer", predictor_host=predictor.grpc_url) as embedded:
            code, lines = check("--url", embedded.rest_url)
        assert code == 1, lines
        assert [line for line in lines if line.startswith("FAILED")] == [lines[-2]]
        assert "the truth: CheckFailed: the picture shows 'a pink square" in lines[-2]
        assert "the answer is 'a pink circle" in lines[-2]
        with LocalService("transformer", model=spoilt, predictor_host=predictor.grpc_url) as unknown:
            code, lines = check("--url", unknown.rest_url)
        assert code == 0, lines
        assert any("metadata: florence2_safetensors" in line for line in lines)
        assert not any("the truth" in line for line in lines)


@pytest.mark.slow  # drawn weights never end an answer by themselves
@pytest.mark.parametrize("layout", ["native", "original"])
def test_a_checkpoint_of_each_layout_with_a_transformer_that_has_the_processors_files_only(layout, tmp_path):
    """As on a cluster: the predictor's volume holds all of it, the transformer's the small files."""
    for name, flags in (("whole", []), ("small", ["--processor-only"])):
        command = [sys.executable, "-m", "tests.shadow", layout, str(tmp_path / name), *flags]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    assert not list((tmp_path / "small").glob("*.safetensors"))
    with (
        LocalService("predictor", model=tmp_path / "whole") as predictor,
        LocalService("transformer", model=tmp_path / "small", predictor_host=predictor.grpc_url) as transformer,
    ):
        code, lines = check("--url", transformer.rest_url)
    assert code == 0, lines
    assert any("metadata: florence2_safetensors" in line for line in lines)


GOOD: dict[str, Any] = {
    "<CAPTION>": "a text",
    "<OD>": {"bboxes": [[1, 2, 3, 4]], "labels": ["x"]},
    "<OCR_WITH_REGION>": {"quad_boxes": [[1, 2, 3, 4, 5, 6, 7, 8]], "labels": ["x"]},
    "<REGION_TO_SEGMENTATION>": {"polygons": [[[1, 2, 3, 4, 5, 6]]], "labels": [""]},
    "<OPEN_VOCABULARY_DETECTION>": {"bboxes": [], "bboxes_labels": [], "polygons": [], "polygons_labels": []},
}
BAD: list[tuple[str, Any]] = [
    ("<CAPTION>", {"labels": []}),
    ("<OD>", "a text"),
    ("<OD>", {"bboxes": []}),
    ("<OD>", {"bboxes": [], "labels": ["x"]}),
    ("<OD>", {"bboxes": [[1, 2, 3]], "labels": ["x"]}),
    ("<OD>", {"bboxes": [[1, 2, 3, 41]], "labels": ["x"]}),
    ("<OD>", {"bboxes": [[1, 2, 3, 4]], "labels": [None]}),
    ("<OCR_WITH_REGION>", {"quad_boxes": [[1, 2, 3, 4]], "labels": ["x"]}),
    ("<REGION_TO_SEGMENTATION>", {"polygons": [[[1, 2, 3]]], "labels": [""]}),
]


@pytest.mark.parametrize("task", GOOD)
def test_answers_of_the_right_form(task):
    assert _formed(task, {task: GOOD[task]}, (30, 40)) == GOOD[task]


@pytest.mark.parametrize(("task", "value"), BAD)
def test_answers_of_a_wrong_form(task, value):
    with pytest.raises(CheckFailed):
        _formed(task, {task: value}, (30, 40))


def test_an_answer_to_another_question():
    with pytest.raises(CheckFailed, match="this one key"):
        _formed("<OD>", {"<CAPTION>": "a text"}, (30, 40))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--url", "localhost:8080"], "url has to start with"),
        (["--url", "http://x", "--header", "Host"], "has to be 'NAME: VALUE', not 'Host'"),
        ([], "--url"),
    ],
)
def test_wrong_options(arguments, says):
    code, lines = check(*arguments)
    assert code == 2
    assert says in " ".join(lines)
