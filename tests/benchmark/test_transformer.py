"""The transformer's benchmark, as small as it gets."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from florence2_kserve.benchmark import transformer
from florence2_kserve.benchmark.transformer import draw_photograph, encode, main, parse, take_turns

SIZES = ("80x60", "2920x2930")  # the second has a draft


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Figures and output of a run."""
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    with redirect_stdout(io.StringIO()) as output:
        arguments = f"--sizes {','.join(SIZES)} --pictures 1 --answers 2 --rounds 2 --seed 3 --json {file}"
        assert main(arguments.split()) == 0  # it is 1 where the sides disagree
    return json.loads(file.read_text()), output.getvalue()


def test_every_side_is_timed_on_every_size(run: tuple[dict[str, Any], str]) -> None:
    figures, _ = run
    assert set(figures["pictures"]) == set(SIZES)
    for comparison in figures["pictures"].values():
        assert set(comparison["seconds"]) == {
            "transformers, PIL",
            "transformers, torchvision",
            "ours, exact",
            "ours, exact, normalised",
            "ours",
            "ours, normalised",
        }
        assert all(seconds > 0 for seconds in comparison["seconds"].values())


def test_every_kind_of_answer_is_timed(run: tuple[dict[str, Any], str]) -> None:
    figures, _ = run
    assert set(figures["answers"]) == {
        "a caption of 80 words",
        "30 boxes",
        "20 quads",
        "3 polygons of 60 points",
    }
    assert all(set(comparison["seconds"]) == {"transformers", "ours"} for comparison in figures["answers"].values())


def test_ratios_are_the_baselines_time_over_the_sides_own(run: tuple[dict[str, Any], str]) -> None:
    figures, _ = run
    for comparison in [*figures["pictures"].values(), *figures["answers"].values()]:
        seconds = comparison["seconds"]
        for baseline, speeds in comparison["speed"].items():
            assert speeds == {side: pytest.approx(seconds[baseline] / taken) for side, taken in seconds.items()}
            assert speeds[baseline] == 1


def test_the_output_says_what_is_compared(run: tuple[dict[str, Any], str]) -> None:
    _, output = run
    for part in ("the predictor's device rescales and normalises", "processor time", "Pillow", "× transformers, PIL"):
        assert part in output
    assert "2920×2930, " in output
    assert "a draft decodes 1460×1465" in output


def test_sides_that_disagree_fail_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(transformer, "parse_answer", lambda *_: "something else")
    assert main("--sizes 8x8 --pictures 1 --answers 1 --rounds 1".split()) == 1
    assert "sides that have to agree don't" in capsys.readouterr().err


def test_without_torch_it_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main([]) == 2
    assert "needs the extra [predictor]" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_started_as_a_module() -> None:
    command = [sys.executable, "-m", "florence2_kserve.benchmark.transformer", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "the predictor's device rescales" in result.stdout


def test_sides_take_turns() -> None:
    calls: list[str] = []
    sides = {name: lambda item, name=name: calls.append(f"{name}{item}") for name in "abc"}
    seconds = take_turns(sides, [1, 2], rounds=3)
    assert set(seconds) == set("abc")
    warm_up, rounds = calls[:3], calls[3:]
    assert warm_up == ["a1", "b1", "c1"]
    assert "".join(rounds) == "a1a2b1b2c1c2" + "b1b2c1c2a1a2" + "c1c2a1a2b1b2"


def test_photographs_follow_from_their_seed() -> None:
    first, again, other = (np.asarray(draw_photograph((90, 70), seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    image = Image.open(io.BytesIO(encode(draw_photograph((90, 70), 1))))
    assert (image.format, image.size, image.mode) == ("JPEG", (90, 70), "RGB")


def test_flags_become_settings() -> None:
    settings = parse("--sizes 10x20,30x40 --pictures 2 --rounds 7 --json out.json".split())
    assert settings.sizes == ((10, 20), (30, 40))
    assert (settings.pictures, settings.rounds, settings.json) == (2, 7, Path("out.json"))
    assert parse([]).sizes == ((640, 480), (4000, 3000))


@pytest.mark.parametrize("wrong", ["--sizes 640", "--sizes 0x5", "--sizes x", "--rounds 0", "--rounds many"])
def test_a_wrong_flag_ends_with_the_usage(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(wrong.split())
    assert error.value.code == 2
    assert "usage: python -m florence2_kserve.benchmark.transformer" in capsys.readouterr().err
