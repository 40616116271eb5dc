"""Scenarios as YAML holds them, and what the command line changes about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from florence2_kserve.tasks import TASKS
from florence2_loadtest.overrides import override
from florence2_loadtest.scenario import (
    ClosedLoad,
    MixItem,
    OpenLoad,
    Scenario,
    parse_concurrency,
    read_scenario,
    scenario_path,
)
from florence2_loadtest.schedules import parse_schedule

BUILT_IN = {path.stem for path in scenario_path().glob("*.yaml") if not path.stem.startswith("sweep")}


@pytest.mark.parametrize(
    ("value", "levels"),
    [
        ("12:60:12", [12, 24, 36, 48, 60]),
        ("1:4", [1, 2, 3, 4]),
        ("1:6:4", [1, 5]),
        (36, [36]),
        ("36", [36]),
        ([4, 1], [4, 1]),
        (" 1, 4,16", [1, 4, 16]),
    ],
)
def test_concurrency_is_a_number_a_list_or_a_range(value: Any, levels: list[int]) -> None:
    assert parse_concurrency(value) == levels


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("60:12:12", "upwards"),
        ("12:60:0", "upwards"),
        ("12-60", "has to look like 36, 1,4,16 or 12:60:12"),
        ("", "has to look like"),
        ("1:2:3:4", "has to look like"),
        ("0:4:2", "from 1 to"),
        (0, "from 1 to"),
        ([], "from 1 to"),
        ("1:100000", "from 1 to|at most 100 levels"),
        ("1:101", "at most 100 levels"),
        ([4, 4], "each once"),
    ],
)
def test_what_is_wrong_with_a_concurrency_is_said(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_concurrency(value)


def test_the_builtin_scenarios_are_there_and_bounded() -> None:
    assert {"quick", "nine-tasks", "mixed", "concurrency", "spike", "zero-step-spike-zero", "soak"} <= BUILT_IN
    for name in BUILT_IN:
        scenario = read_scenario(name)
        assert scenario.name == name
        if isinstance(scenario.load, OpenLoad):
            assert parse_schedule(scenario.load.schedule, 0).seconds <= 1800
        else:
            levels = len(scenario.load.concurrencies) * (len(scenario.mix) if scenario.separately else 1)
            assert levels * scenario.load.max_windows * scenario.load.window_s <= 600


def test_the_nine_tasks_are_those_of_the_replaced_deployment() -> None:
    scenario = read_scenario("nine-tasks")
    assert set(scenario.tasks) == {
        "<CAPTION>",
        "<DETAILED_CAPTION>",
        "<MORE_DETAILED_CAPTION>",
        "<CAPTION_TO_PHRASE_GROUNDING>",
        "<OD>",
        "<DENSE_REGION_CAPTION>",
        "<REGION_PROPOSAL>",
        "<OCR>",
        "<OCR_WITH_REGION>",
    }
    assert isinstance(scenario.load, ClosedLoad)
    assert (scenario.load.concurrencies, scenario.separately, scenario.encoding) == ([36], True, "json")


def test_the_mixed_scenario_has_all_tasks() -> None:
    assert set(read_scenario("mixed").tasks) == set(TASKS)


def test_a_load_is_open_by_its_schedule() -> None:
    assert isinstance(Scenario.model_validate({"load": {"schedule": "constant:1/s,1s"}}).load, OpenLoad)
    assert isinstance(Scenario.model_validate({"load": {"concurrency": 4}}).load, ClosedLoad)


def test_a_scenario_survives_being_written_down() -> None:
    for name in BUILT_IN:
        scenario = read_scenario(name)
        assert Scenario.model_validate(scenario.model_dump(mode="json")) == scenario


def test_a_file_is_read_with_its_pictures_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mix: [{task: od}]\npictures: {folder: here}\nload: {concurrency: 1:4:1}\n")
    scenario = read_scenario(tmp_path / "mine.yaml")
    assert (scenario.name, scenario.tasks, scenario.pictures.folder) == ("mine", ["<OD>"], tmp_path / "here")
    assert isinstance(scenario.load, ClosedLoad)
    assert scenario.load.concurrencies == [1, 2, 3, 4]  # not the number to the base of 60 that YAML 1.1 sees


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("mix: [{task: DANCE}]", "mix.0.task: unknown task 'DANCE'"),
        ("mix: []", "mix: .*at least 1"),
        ("mix: [{task: OD, slo: fast}]", "mix.0.slo: an SLO looks like p95<2s"),
        ("mix: [{task: OD, weight: 0}]", "mix.0.weight: .*greater than 0"),
        ("load: {concurrency: 12-60}", "load.concurrency: concurrency has to look like"),
        ("load: {schedule: 'ramp:5/s,3s'}", "load.schedule: schedule 'ramp:5/s,3s'"),
        ("load: {schedule: 'constant:5/s,3s', window_s: 3}", "load.window_s: Extra inputs"),
        ("lood: {}", "lood: Extra inputs"),
        ("- a\n- b", "has to hold a scenario's fields by name"),
        ("mix: [", "not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.yaml: {words}"):
        read_scenario(tmp_path / "bad.yaml")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"nosuch.*nine-tasks"):
        read_scenario("nosuch")


def test_the_command_line_changes_what_it_names_and_nothing_else() -> None:
    scenario = Scenario(
        mix=[MixItem(task="OD", weight=3.0, slo="p95<9s"), MixItem(task="CAPTION")],
        load=ClosedLoad(concurrency=7, window_s=9),
    )
    changed = override(
        scenario,
        tasks="od,ocr",
        slos=["ocr=p99<1s"],
        parameters={"max_new_tokens": 5},
        load={"max_requests": 10, "window_s": None},
        others={"retries": 2, "timeout_s": None},
    )
    assert changed.mix == [MixItem(task="OD", weight=3.0, slo="p95<9s"), MixItem(task="OCR", slo="p99<1s")]
    assert changed.load == ClosedLoad(concurrency=7, window_s=9, max_requests=10)
    assert (changed.retries, changed.timeout_s, changed.parameters) == (2, 60, {"max_new_tokens": 5})


def test_the_command_line_turns_a_closed_loop_into_an_open_one_and_back() -> None:
    opened = override(Scenario(load=ClosedLoad(window_s=9)), schedule="constant:1/s,1s")
    assert opened.load == OpenLoad(schedule="constant:1/s,1s")
    assert override(opened, concurrency="4").load == ClosedLoad(concurrency="4")


def test_all_tasks_may_be_named_at_once() -> None:
    assert override(Scenario(), tasks="all").tasks == list(TASKS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"concurrency": "4", "schedule": "constant:1/s,1s"}, "give one of them"),
        ({"schedule": "constant:1/s,1s", "load": {"window_s": 3.0}}, "has no window_s"),
        ({"concurrency": "4-5"}, "load.concurrency: concurrency has to look like"),
        ({"tasks": "od,dance"}, "unknown task 'dance'"),
        ({"slos": ["od=p95<2s"]}, "of a task that isn't asked"),
        ({"slos": ["p95=2s"]}, "unknown task 'p95'"),
        ({"slos": ["p95<2"]}, "mix.0.slo: an SLO looks like"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        override(Scenario(), **given)
