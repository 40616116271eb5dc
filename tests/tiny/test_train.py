"""Training: its schedule, and that an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from florence2_kserve.tiny import train
from florence2_kserve.tiny.train import PHASES, Phase
from tests.tiny.conftest import CHECKPOINT


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few threads, small checks, and the shipped tokenizer, which is what would be built."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    monkeypatch.setattr(train, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(train, "CHECK_SCENES", 2)
    monkeypatch.setattr(train, "TASKS_PER_PICTURE", 3)


def short(name: str) -> Phase:
    return replace(PHASES[name], pictures=2, warm_up=2, decay_at=2, decay_steps=2)


def test_rate_warms_up_stays_and_decays() -> None:
    phase = replace(PHASES["text"], rate=1.0, warm_up=10, decay_at=50, decay_steps=100)
    assert phase.rate_at(0) == pytest.approx(0.1)
    assert phase.rate_at(9) == phase.rate_at(50) == pytest.approx(1.0)
    assert phase.rate_at(100) == pytest.approx((1 + train.FINAL_RATE) / 2)
    assert phase.rate_at(phase.steps) == pytest.approx(train.FINAL_RATE)


def test_phases_draw_scenes_apart() -> None:
    most = max(phase.steps * phase.pictures for phase in PHASES.values())
    assert most < train.SEEDS_PER_PHASE
    assert len(PHASES) * train.SEEDS_PER_PHASE < train.CHECK_SEED


def run(phase: Phase, work: Path, steps: int | None = None) -> dict[str, torch.Tensor]:
    """Trains `phase` alone; with `steps`, stops there as if killed."""
    torch.manual_seed(0)
    module = train.build_phase(phase.name, work, compiled=False)
    steps_done = 0
    step_loss = module.step_loss

    def stopping(*arguments: object) -> object:
        nonlocal steps_done
        if steps is not None and steps_done == steps:
            raise KeyboardInterrupt
        steps_done += 1
        return step_loss(*arguments)

    module.step_loss = stopping
    train.train_phase(phase, module, work, seed=0, rank=0, workers=1, every=-1.0)
    return module.state_dict()


def test_all_phases_train_and_resume(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    for name in PHASES:
        phase = short(name)
        run(phase, whole)
        with pytest.raises(KeyboardInterrupt):
            run(phase, halves, steps=3)  # state is kept at every third report, here at every third step
        assert not (halves / f"{name}.pt").exists()
        run(phase, halves)
        first = torch.load(whole / f"{name}.pt", weights_only=True)
        second = torch.load(halves / f"{name}.pt", weights_only=True)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), key
    tower, text = (torch.load(whole / f"{name}.pt", weights_only=True) for name in ("tower", "text"))
    key = "vision_tower.convs.0.conv.weight"
    assert torch.equal(tower[f"tower.{key}"], text[f"model.model.{key}"]), "the text phase leaves the tower alone"
    joint = torch.load(whole / "joint.pt", weights_only=True)
    assert not torch.equal(text[f"model.model.{key}"], joint[f"model.model.{key}"]), "the joint phase trains it"
    assert train.export(whole, tmp_path / "checkpoint") == "joint.pt"
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()
    assert (whole / "train.log").read_text().count("joint step 4/4") == 1


def test_decay_starts_when_asked(tmp_path: Path) -> None:
    phase = replace(short("tower"), decay_at=1000)
    (tmp_path / "tower.decay-now").write_text("2\n")
    run(phase, tmp_path)
    state = torch.load(tmp_path / "tower.state.pt", weights_only=True)
    assert (state["step"], state["decay_at"], state["decay_steps"]) == (3, 1, 2)
