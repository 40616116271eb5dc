"""What tells one sweep from another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from florence2_loadtest.scenario import Pictures, Scenario
from florence2_loadtest.sweep.checkpoint import Checkpoint, CheckpointError
from florence2_loadtest.sweep.fingerprint import describe_folder, fingerprint
from florence2_loadtest.sweep.space import make_space

SPACE = make_space({"max_batch_size": "6,12,24"}, "both")
SCENARIO = Scenario(name="night")


def test_it_has_what_trials_depend_on_and_not_what_they_are_judged_by() -> None:
    base = fingerprint(SPACE, SCENARIO, "both", {})
    others = [
        fingerprint(make_space({"max_batch_size": "6,12"}, "both"), SCENARIO, "both", {}),
        fingerprint(SPACE, SCENARIO.model_copy(update={"seed": 1}), "both", {}),
        fingerprint(SPACE, SCENARIO, "predictor", {}),
        fingerprint(SPACE, SCENARIO, "both", {"dtype": "bfloat16"}),
        fingerprint(SPACE, SCENARIO, "both", {}, answer_tokens=3),
    ]
    assert all(other != base for other in others)
    assert fingerprint(SPACE, SCENARIO, "both", {}) == base
    assert {"version", "host", "code", "accelerators"} <= base.keys()
    assert not {"objective", "constraint", "trials"} & base.keys()


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS"])
def test_inherited_variables_that_matter_are_in_it_and_named_when_they_differ(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.jsonl"
    monkeypatch.delenv(name, raising=False)
    with Checkpoint(path, fingerprint(SPACE, SCENARIO, "both", {})):
        pass
    monkeypatch.setenv(name, "1")
    message = rf'with another variables\.{name} \(variables\.{name} was unset, is "1"\)'
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(path, fingerprint(SPACE, SCENARIO, "both", {})).__enter__()


def test_other_variables_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    base = fingerprint(SPACE, SCENARIO, "both", {})
    monkeypatch.setenv("TERM_PROGRAM", "something else")
    assert fingerprint(SPACE, SCENARIO, "both", {}) == base


def test_a_model_or_pictures_that_changed_in_place_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12")
    scenario = SCENARIO.model_copy(update={"pictures": Pictures(folder=tmp_path)})
    before = fingerprint(SPACE, scenario, "both", {"model": str(tmp_path)})
    os.utime(tmp_path / "model.safetensors", (1, 1))
    after = fingerprint(SPACE, scenario, "both", {"model": str(tmp_path)})
    assert {name for name in before if before[name] != after[name]} == {"model_files", "pictures"}
    assert describe_folder("embedded") is None


def test_a_secret_is_in_it_as_a_hash_that_tells_another_one(tmp_path: Path) -> None:
    first, second = (
        fingerprint(SPACE, SCENARIO, "both", {"env.HF_TOKEN": f"hf_verysecret{number}"}) for number in (1, 2)
    )
    assert "verysecret" not in json.dumps(first)
    path = tmp_path / "checkpoint.jsonl"
    with Checkpoint(path, first):
        pass
    with Checkpoint(path, first):
        pass
    with pytest.raises(CheckpointError, match=r"another settings\.env\.HF_TOKEN") as raised:
        Checkpoint(path, second).__enter__()
    assert "verysecret" not in f"{raised.value}{path.read_text()}"
