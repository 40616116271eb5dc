"""Files for perf_analyzer's --input-data: in its form, with what the load test itself would send."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.tasks import TASKS, TaskInput
from florence2_loadtest.inputs import inputs, write_inputs
from florence2_loadtest.scenario import MixItem, Pictures, Scenario
from florence2_loadtest.workload import build_workload

app = typer.Typer()
app.command()(inputs)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def entries(path: Path) -> list[dict[str, dict[str, list[object]]]]:
    content = json.loads(path.read_text())
    assert list(content) == ["data"]
    return content["data"]


def picture(entry: dict[str, dict[str, list[object]]]) -> Image.Image:
    (text,) = entry["INPUT_IMAGE"]["content"]
    return Image.open(io.BytesIO(base64.b64decode(str(text), validate=True)))


def test_each_task_gets_a_file_in_perf_analyzers_form(tmp_path):
    result = call(str(tmp_path), "--scenes", "2")
    assert result.exit_code == ExitCode.OK, result.output
    for task in TASKS.values():
        data = entries(tmp_path / f"load_data_{task.name.strip('<>')}.json")
        assert len(data) == 2
        for entry in data:
            expected = {"INPUT_IMAGE", "TASK_PROMPT"} | (
                {"TEXT_PROMPT"} if task.takes is not TaskInput.NONE else set()
            )
            assert set(entry) == expected
            assert all(set(tensor) == {"content", "shape"} for tensor in entry.values())
            assert all(tensor["shape"] == [len(tensor["content"])] == [1] for tensor in entry.values())
            assert entry["TASK_PROMPT"]["content"] == [task.name]
            assert picture(entry).size == (640, 480)
        assert data[0]["INPUT_IMAGE"] != data[1]["INPUT_IMAGE"]
    assert len(list(tmp_path.iterdir())) == len(TASKS) == len(result.output.splitlines())


def test_they_hold_the_requests_of_the_load_test(tmp_path):
    scenario = Scenario(
        mix=[MixItem(task="<OD>"), MixItem(task="<REGION_TO_OCR>")], pictures=Pictures(scenes=3, width=32, height=32)
    )
    paths = write_inputs(scenario, tmp_path)
    assert [path.name for path in paths] == ["load_data_OD.json", "load_data_REGION_TO_OCR.json"]
    workload = build_workload(scenario, "florence2")
    for path, task in zip(paths, scenario.tasks, strict=True):
        sent = [json.loads(workload.only(task)[index].body)["inputs"] for index in range(3)]
        written = [{name: tensor["content"] for name, tensor in entry.items()} for entry in entries(path)]
        assert len(written) == 3
        assert all({tensor["name"]: tensor["data"] for tensor in request} in written for request in sent)


def test_a_task_that_is_twice_in_the_mix_has_both_texts(tmp_path):
    mix = [MixItem(task="<OPEN_VOCABULARY_DETECTION>", text=text) for text in ("a cat", "a dog")]
    (path,) = write_inputs(Scenario(mix=mix, pictures=Pictures(scenes=2, width=32, height=32)), tmp_path)
    assert [entry["TEXT_PROMPT"]["content"] for entry in entries(path)] == [["a cat"]] * 2 + [["a dog"]] * 2


def test_a_folder_of_pictures_and_a_text_take_the_scenarios_place(tmp_path):
    for number, name in enumerate(("a.png", "b.jpg")):
        Image.new("RGB", (10 + number, 20)).save(tmp_path / name)
    out = tmp_path / "out"
    result = call(
        str(out),
        "--task",
        "CAPTION_TO_PHRASE_GROUNDING",
        "--task",
        "OD",
        "--pictures",
        str(tmp_path),
        "--text",
        "a dog",
    )
    assert result.exit_code == ExitCode.OK, result.output
    assert {path.name for path in out.iterdir()} == {"load_data_CAPTION_TO_PHRASE_GROUNDING.json", "load_data_OD.json"}
    grounding = entries(out / "load_data_CAPTION_TO_PHRASE_GROUNDING.json")
    assert {picture(entry).size for entry in grounding} == {(10, 20), (11, 20)}
    assert all(entry["TEXT_PROMPT"]["content"] == ["a dog"] for entry in grounding)
    assert all("TEXT_PROMPT" not in entry for entry in entries(out / "load_data_OD.json"))


def test_parameters_that_the_files_cannot_hold_are_named(tmp_path):
    (tmp_path / "short.yaml").write_text(
        "mix: [{task: <OCR>, parameters: {num_beams: 1}}]\n"
        "parameters: {max_new_tokens: 5}\n"
        "pictures: {scenes: 1, width: 32, height: 32}\n"
    )
    result = call(str(tmp_path / "out"), "--scenario", str(tmp_path / "short.yaml"))
    assert result.exit_code == ExitCode.OK, result.output
    assert "without the scenario's max_new_tokens, num_beams" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "no-such-scenario"], "no-such-scenario"),
        (["--task", "READ_MINDS"], "READ_MINDS"),
        (["--pictures", "/nowhere", "--task", "OD"], "/nowhere"),
        (["--pictures", ".", "--scenes", "2"], "exclude each other"),
    ],
    ids=["scenario", "task", "folder", "both"],
)
def test_what_cannot_be_written_is_said(arguments, message, tmp_path):
    result = call(str(tmp_path / "out"), *arguments)
    assert result.exit_code == ExitCode.FAILED
    assert message in result.output
    assert not (tmp_path / "out").exists()
