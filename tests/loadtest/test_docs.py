"""What docs/loadtest.md tells users to type is typed here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from florence2_loadtest.command import app
from florence2_loadtest.scenario import Scenario, read_scenario
from tests.batch.test_docs import blocks, type_in

TEXT = (Path(__file__).parents[2] / "docs/loadtest.md").read_text()
LANGUAGES = ("sh", "sh cluster", "sh peers")


def commands() -> list[str]:
    scripts = [script for language in LANGUAGES for script in blocks(TEXT, language)]
    lines = "\n".join(scripts).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("florence2 loadtest ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_has_flags_that_there_are(line):
    _, _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)


@pytest.mark.slow
@pytest.mark.full  # minutes; what the commands do has tests of its own
@pytest.mark.parametrize("script", blocks(TEXT, "sh"))
def test_commands_do_what_they_say(script, tmp_path, monkeypatch, service):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    type_in(script, service.rest_url)
    for name in re.findall(r"--(?:html|pdf|output) (\S+)", script):
        assert (tmp_path / name).exists()


def test_the_example_of_a_scenario_is_one():
    (text,) = blocks(TEXT, "yaml")
    scenario = Scenario.model_validate({"name": "example", **yaml.safe_load(text)})
    assert [item.task for item in scenario.mix] == ["<CAPTION>", "<CAPTION_TO_PHRASE_GROUNDING>", "<OD>"]


def test_every_scenario_that_comes_along_is_told():
    told = re.findall(r"^\| `([\w-]+)` \|", TEXT.split("| scenario | is |")[1].split("\n\n")[0], re.MULTILINE)
    there = [path.stem for path in (Path(__file__).parents[2] / "loadtest/scenarios").glob("*.yaml")]
    assert sorted(told) == sorted(name for name in there if not name.startswith("sweep-"))
    for name in there:
        assert read_scenario(name).mix
