"""Spaces: what can be searched over, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from florence2_loadtest.sweep.grids import replaced_grid
from florence2_loadtest.sweep.space import Range, make_space, parse_assignments, read_space, read_value


def test_values_are_read_as_the_settings_class_reads_them() -> None:
    space = make_space(
        {
            "max_batch_size": "6, 12",
            "max_decode_rows": "unset,72",
            "compile_vision": "true,false",
            "decode_capture": "off,compile",
            "feature_cache_mib": "0,0.5",
            "env.OMP_NUM_THREADS": "1,2",
        },
        "both",
    )
    assert space.parameters == {
        "max_batch_size": (6, 12),
        "max_decode_rows": (None, 72),
        "compile_vision": (True, False),
        "decode_capture": ("off", "compile"),
        "feature_cache_mib": (0.0, 0.5),
        "env.OMP_NUM_THREADS": ("1", "2"),
    }


def test_a_grid_has_every_combination_and_changes_its_last_setting_fastest() -> None:
    space = make_space({"max_batch_size": "1:5:2", "vision_batch_size": "1,2"}, "predictor")
    assert list(space.configurations()) == [
        {"max_batch_size": batch, "vision_batch_size": vision} for batch in (1, 3, 5) for vision in (1, 2)
    ]


def test_a_range_without_a_step_is_for_optuna_alone() -> None:
    space = make_space({"max_batch_size": "4:64"}, "both")
    assert space.parameters["max_batch_size"] == Range(4, 64)
    with pytest.raises(ValueError, match=r"max_batch_size: a grid needs values or a step: 4:64:STEP"):
        list(space.configurations())


@pytest.mark.parametrize(
    ("given", "target", "message"),
    [
        ({}, "both", "name a setting to search over"),
        ({"max_batchsize": "1"}, "both", "max_batchsize: there is no such setting"),
        ({"max_batch_size": "1"}, "transformer", "the transformer doesn't take it, only the predictor does"),
        ({"exact_images": "true"}, "predictor", "the predictor doesn't take it, only the transformer does"),
        ({"max_batch_size": "0"}, "both", "max_batch_size=0: Input should be greater than or equal to 1"),
        ({"max_batch_size": "a"}, "both", "max_batch_size=a: Input should be a valid integer"),
        ({"max_batch_size": "unset"}, "both", "max_batch_size=unset: Input should be a valid integer"),
        ({"dtype": "float8"}, "both", "dtype=float8: Input should be 'auto', "),
        ({"max_batch_size": "6,6"}, "both", "a value is given twice"),
        ({"max_batch_size": "8:4"}, "both", "a range goes up"),
        ({"max_batch_size": "0:4"}, "both", "max_batch_size=0: Input should be greater"),
        ({"max_batch_size": "1:4:0.5"}, "both", "max_batch_size=1.5: Input should be a valid integer"),
        ({"max_batch_size": {"low": 1, "high": 4, "stride": 2}}, "both", "low, high, step and log, not stride"),
        ({"max_batch_size": {"low": 1}}, "both", "a range has numbers low and high"),
        ({"max_batch_size": {"low": 1, "high": 4, "step": 1, "log": True}}, "both", "with log"),
        ({"max_batch_size": []}, "both", "name its values"),
        ({"model": "embedded"}, "both", "model isn't searched over: it is what is tuned"),
        ({"workers": "1,2"}, "both", "workers isn't searched over: a server is one process"),
        ({"http_port": "1,2"}, "both", "the servers are started here, on free ports"),
        ({"env.": "1"}, "both", "name a variable, such as env.OMP_NUM_THREADS"),
        ({"env.FLORENCE2_MAX_BATCH_SIZE": "1"}, "both", "name the setting itself, max_batch_size"),
    ],
)
def test_what_cannot_be_searched_over_is_refused_by_name(given: dict[str, Any], target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        make_space(given, target)
    assert message in str(raised.value)


def test_yaml_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "max_batch_size: [6, 12]\ndecode_capture: [off, compile]\nmax_decode_rows: [null, 72]\n"
        "feature_cache_mib: {low: 1, high: 512, log: true}\nmax_queue_size: {low: 64, high: 256, step: 64}\n"
    )
    assert read_space(file, "predictor").parameters == {
        "max_batch_size": (6, 12),
        "decode_capture": ("off", "compile"),
        "max_decode_rows": (None, 72),
        "feature_cache_mib": Range(1, 512, log=True),
        "max_queue_size": Range(64, 256, 64),
    }


@pytest.mark.parametrize("text", ["- max_batch_size", "max_batch_size: [", "max_batch_size: [0]", None])
def test_a_file_that_is_no_space_is_refused_by_name(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "space.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=r"space\.yaml: "):
        read_space(file, "both")


def test_assignments_take_flags_spelling_and_values_with_an_equals_sign() -> None:
    assert parse_assignments(["max-batch-size=6,12", "env.A-B=x=y"], "--param") == {
        "max_batch_size": "6,12",
        "env.A-B": "x=y",
    }
    for wrong in (["max_batch_size"], ["=6"], ["max_batch_size=6", "max-batch-size=12"]):
        with pytest.raises(ValueError, match="--param"):
            parse_assignments(wrong, "--param")


def test_a_value_is_checked_like_the_setting() -> None:
    assert read_value("request_timeout_seconds", "2.5") == 2.5
    with pytest.raises(ValueError, match=r"max_num_beams=9"):
        read_value("max_num_beams", "9")


@pytest.mark.parametrize(
    ("target", "names", "size"),
    [
        ("both", ["max_batch_size", "admission_delay_us", "max_asyncio_workers"], 36),
        ("predictor", ["max_batch_size", "admission_delay_us"], 12),
        ("transformer", ["max_asyncio_workers"], 3),
    ],
)
def test_the_replaced_grid_has_no_duplicates_and_says_why(target: Any, names: list[str], size: int) -> None:
    space = replaced_grid(target)
    configurations = list(space.configurations())
    assert list(space.parameters) == names
    assert len(configurations) == len({tuple(each.items()) for each in configurations}) == size
    assert space.notes


def test_a_result_tells_ranges_as_well_as_values() -> None:
    space = make_space({"max_batch_size": "6,12", "max_queue_size": "64:128:64"}, "predictor")
    assert space.as_lists() == {
        "max_batch_size": [6, 12],
        "max_queue_size": [{"low": 64, "high": 128, "step": 64, "log": False}],
    }
