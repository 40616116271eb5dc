"""Trains the embedded model from scratch and exports it.

    python -m florence2_kserve.tiny.train --out DIR

Three phases, each counted in steps so that a seed gives the same schedule:

1. ``tower``: the vision side alone, taught by dense helper heads;
2. ``text``: the text side on the frozen tower;
3. ``joint``: everything at a low rate.

Two single-threaded worker processes average their gradients: with matrices this
small, more threads in one process mostly wait for each other. Every scene is drawn
fresh, from a seed of its own. State is kept in a work folder every few minutes and
taken up again at the next start.

The learning rate warms up, stays, and decays. Where a phase's decay starts is part
of the recipe (``PHASES``); while tuning, ``echo STEPS > WORK/<phase>.decay-now``
starts one of so many steps at once, and the log tells at which step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from florence2_kserve.tiny.architecture import IMAGE_MEAN, IMAGE_STD, Tower, build_config, build_model, image_tokens
from florence2_kserve.tiny.export import export_checkpoint
from florence2_kserve.tiny.heads import CellHeads, cell_targets
from florence2_kserve.tiny.language import choose_examples, text_batch, text_loss
from florence2_kserve.tiny.scenes import Example, Scene, draw_scene
from florence2_kserve.tiny.tokenizer import build_tokenizer, token_id

WORK = Path("~/.cache/florence2-kserve/tiny-training").expanduser()
FINAL_RATE = 0.03  # of the peak, where the decay ends
MOST_OBJECTS = 4
TASKS_PER_PICTURE = 6
TOWER_SHARE = 0.25  # of the joint phase's rate; more would spoil the tower
CELL_SHARE = 0.5  # weight of the helper heads' loss in the joint phase
SEEDS_PER_PHASE = 100_000_000
CHECK_SCENES = 24
CHECK_SEED = 900_000_000  # neither trained on nor among the held-out scenes


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase's schedule.

    Attributes:
        name: "tower", "text" or "joint".
        pictures: Scenes per step, over all workers.
        rate: Peak learning rate.
        warm_up: Steps until the peak.
        decay_at: Step at which the decay starts.
        decay_steps: Steps from there to the phase's end.
        words: Fewest and most words in a scene.
        grow: Steps after which scenes may hold one more object; 0 for all from the start.
        blur: How far beside the true bin a location may lie, in bins, at first and at last.
        blur_steps: Steps from the first blur to the last.
    """

    name: str
    pictures: int
    rate: float
    warm_up: int
    decay_at: int
    decay_steps: int
    words: tuple[int, int]
    grow: int = 0
    blur: tuple[float, float] = (4.0, 4.0)
    blur_steps: int = 1

    @property
    def steps(self) -> int:
        return self.decay_at + self.decay_steps

    def rate_at(self, step: int) -> float:
        """Gives the learning rate of `step`: linear warm-up, level, linear decay to ``FINAL_RATE``."""
        warm = min(1.0, (step + 1) / max(1, self.warm_up))
        decayed = max(0.0, (step - self.decay_at) / max(1, self.decay_steps))
        return self.rate * warm * (1 - (1 - FINAL_RATE) * decayed)

    def blur_at(self, step: int) -> float:
        first, last = self.blur
        return first + (last - first) * min(1.0, step / self.blur_steps)

    def scene_at(self, step: int, seed: int) -> Scene:
        """Draws a scene as `step` wants it."""
        most = min(MOST_OBJECTS, 1 + step // self.grow) if self.grow else MOST_OBJECTS
        return draw_scene(seed, objects=(1, most), words=self.words)


PHASES = {
    phase.name: phase
    for phase in (
        Phase("tower", 32, 1.3e-3, warm_up=150, decay_at=424, decay_steps=1100, words=(1, 3)),
        Phase(
            "text",
            8,
            1e-3,
            warm_up=150,
            decay_at=1200,
            decay_steps=2000,
            words=(0, 2),
            grow=350,
            blur=(18.0, 4.0),
            blur_steps=2000,
        ),
        Phase("joint", 8, 2e-4, warm_up=40, decay_at=131, decay_steps=460, words=(0, 1)),
    )
}


def pixels(scenes: Sequence[Scene]) -> Tensor:
    """Normalises the scenes' images: float [B, 3, SIDE, SIDE]."""
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).float()
    normalised = (images / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return normalised.permute(0, 3, 1, 2).contiguous()


# --- what a phase trains ---------------------------------------------------------------------------------------------


class TowerPhase(nn.Module):
    """The vision side with its helper heads."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.tower = Tower(build_config(vocab_size=8))
        self.heads = CellHeads()
        self.see = _compiled_tower() if compiled else image_tokens

    def groups(self) -> list[dict[str, Any]]:
        """Gives the optimizer's groups; ``share`` is of the phase's learning rate."""
        return [{"params": list(self.parameters()), "share": 1.0}]

    def step_loss(self, phase: Phase, step: int, seeds: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """Scores this worker's scenes of `step`; returns the loss and what to log."""
        scenes = [phase.scene_at(step, seed) for seed in seeds]
        return self.heads.loss(self.see(self.tower, pixels(scenes)), cell_targets(scenes))

    @torch.no_grad()
    def check(self, phase: Phase) -> dict[str, float]:
        """Scores scenes never trained on."""
        scenes = check_scenes(CHECK_SCENES, words=(0, 2))
        loss, metrics = self.heads.loss(image_tokens(self.tower, pixels(scenes)), cell_targets(scenes))
        return {"loss": loss.item(), **metrics}


class LanguagePhase(nn.Module):
    """The whole model: the text side on a frozen tower, or both together."""

    def __init__(self, tokenizer: Tokenizer, *, joint: bool, compiled: bool) -> None:
        super().__init__()
        self.tokenizer, self.joint = tokenizer, joint
        self.first_location = token_id(tokenizer, "<loc_0>")
        self.model = build_model(tokenizer.get_vocab_size(), self.first_location)
        self.heads = CellHeads()
        self.see = _compiled_tower() if compiled else image_tokens
        if not joint:
            for parameter in self._tower_parameters() + list(self.heads.parameters()):
                parameter.requires_grad_(False)

    def _tower_parameters(self) -> list[nn.Parameter]:
        inner = self.model.model
        return [*inner.vision_tower.parameters(), *inner.multi_modal_projector.parameters()]

    def groups(self) -> list[dict[str, Any]]:
        tower = self._tower_parameters()
        theirs = {id(parameter) for parameter in tower}
        text = [parameter for parameter in self.model.parameters() if id(parameter) not in theirs]
        if not self.joint:
            return [{"params": text, "share": 1.0}]
        return [
            {"params": text + list(self.heads.parameters()), "share": 1.0},
            {"params": tower, "share": TOWER_SHARE},
        ]

    def step_loss(self, phase: Phase, step: int, seeds: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        scenes = [phase.scene_at(step, seed) for seed in seeds]
        with torch.set_grad_enabled(self.joint):
            seen = self.see(self.model.model, pixels(scenes))
        rng = random.Random(seeds[0])
        examples = [choose_examples(scene, TASKS_PER_PICTURE, rng) for scene in scenes]
        loss, metrics = self._text_loss(seen, examples, phase.blur_at(step))
        if self.joint:
            cell_loss, cell_metrics = self.heads.loss(seen, cell_targets(scenes))
            loss = loss + CELL_SHARE * cell_loss
            metrics |= cell_metrics
        return loss, metrics

    def _text_loss(
        self, seen: Tensor, examples: Sequence[Sequence[Example]], sigma: float
    ) -> tuple[Tensor, dict[str, float]]:
        batch = text_batch(examples, self.tokenizer)
        return text_loss(self.model, seen, batch, first_location=self.first_location, sigma=sigma)

    @torch.no_grad()
    def check(self, phase: Phase) -> dict[str, float]:
        scenes = check_scenes(CHECK_SCENES, words=(0, 1))
        seen = image_tokens(self.model.model, pixels(scenes))
        rng = random.Random(0)
        examples = [choose_examples(scene, TASKS_PER_PICTURE, rng) for scene in scenes]
        loss, metrics = self._text_loss(seen, examples, phase.blur[1])
        return {"loss": loss.item(), **metrics, **self.heads.loss(seen, cell_targets(scenes))[1]}


def check_scenes(count: int, words: tuple[int, int]) -> list[Scene]:
    """Draws scenes that are neither trained on nor held out for the final scores."""
    return [draw_scene(CHECK_SEED + index, words=words) for index in range(count)]


def _compiled_tower() -> Callable[[nn.Module, Tensor], Tensor]:
    return torch.compile(image_tokens, dynamic=False)


def build_phase(name: str, work: Path, compiled: bool) -> Any:
    """Builds what phase `name` trains, from the weights of the phase before it.

    Raises:
        FileNotFoundError: If the phase before has not ended.
    """
    if name == "tower":
        return TowerPhase(compiled)
    module = LanguagePhase(build_tokenizer(), joint=name == "joint", compiled=compiled)
    if name == "text":
        load_tower(module, torch.load(work / "tower.pt", weights_only=True))
    else:
        module.load_state_dict(torch.load(work / "text.pt", weights_only=True))
    return module


def load_tower(module: LanguagePhase, state: dict[str, Tensor]) -> None:
    """Puts a tower phase's weights into the whole model."""
    tower = {name.removeprefix("tower."): value for name, value in state.items() if name.startswith("tower.")}
    heads = {name.removeprefix("heads."): value for name, value in state.items() if name.startswith("heads.")}
    unknown = module.model.model.load_state_dict(tower, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"not a tower's weights: {unknown}")
    module.heads.load_state_dict(heads)


def export(work: Path, folder: Path) -> str:
    """Writes the checkpoint from the newest weights of the work folder; returns which those are."""
    module = LanguagePhase(build_tokenizer(), joint=True, compiled=False)
    for name in ("joint.pt", "joint.state.pt", "text.pt", "text.state.pt", "tower.pt"):
        if not (work / name).exists():
            continue
        state = torch.load(work / name, weights_only=True)
        state = state["module"] if name.endswith(".state.pt") else state
        if name == "tower.pt":
            load_tower(module, state)
        else:
            module.load_state_dict(state)
        export_checkpoint(module.model, module.tokenizer, folder)
        return name
    raise FileNotFoundError(f"no weights in {work}")


# --- the loop --------------------------------------------------------------------------------------------------------


class Averager:
    """Keeps all gradients in one flat buffer, so that one all-reduce averages them.

    The buffer's last number carries rank 0's wish to start the decay, in steps, to all workers.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], workers: int) -> None:
        self.workers = workers
        self.buffer = torch.zeros(sum(parameter.numel() for parameter in parameters) + 1)
        offset = 0
        for parameter in parameters:
            parameter.grad = self.buffer[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def average(self, wish: int) -> int:
        """Averages over the workers; returns the sum of their wishes."""
        self.buffer[-1] = wish
        if self.workers > 1:
            dist.all_reduce(self.buffer)
        total = int(self.buffer[-1])
        self.buffer[-1] = 0
        self.buffer.div_(self.workers)
        return total

    def clip(self, limit: float = 1.0) -> float:
        norm = self.buffer.norm().item()
        if norm > limit:
            self.buffer.mul_(limit / norm)
        return norm


def train_phase(phase: Phase, module: Any, work: Path, *, seed: int, rank: int, workers: int, every: float) -> None:
    """Trains `module` through `phase`, going on from the work folder's state where there is one.

    Args:
        phase: The schedule.
        module: What to train; see ``TowerPhase``.
        work: Folder for state, logs and the phase's final weights (``<phase>.pt``).
        seed: First scene seed of the run.
        rank: This worker.
        workers: How many workers train together.
        every: Seconds between reports; state is kept at every third.
    """
    groups = module.groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    averager = Averager(parameters, workers)
    optimizer = torch.optim.AdamW(groups, lr=phase.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    first_seed = seed + SEEDS_PER_PHASE * list(PHASES).index(phase.name)
    state_file, control = work / f"{phase.name}.state.pt", work / f"{phase.name}.decay-now"
    step, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        phase = replace(phase, decay_at=state["decay_at"], decay_steps=state["decay_steps"])
    log = _Log(work, phase.name) if rank == 0 else None
    started = time.monotonic() - seconds
    last_report, reports = time.monotonic(), 0
    while step < phase.steps:
        rate = phase.rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        # Every scene has a seed of its own, whichever worker draws it.
        seeds = range(first_seed + step * phase.pictures + rank, first_seed + (step + 1) * phase.pictures, workers)
        averager.buffer.zero_()
        loss, metrics = module.step_loss(phase, step, seeds)
        loss.backward()
        decay_steps = averager.average(_wish(control) if rank == 0 and step < phase.decay_at else 0)
        norm = averager.clip()
        optimizer.step()
        step += 1
        if decay_steps:
            phase = replace(phase, decay_at=step, decay_steps=decay_steps)
        if log:
            log.add({"loss": loss.item(), "norm": norm, **metrics})
            if time.monotonic() - last_report > every or step == phase.steps:
                reports += 1
                log.report(step, step * phase.pictures, time.monotonic() - started, rate, phase, module.check(phase))
                if reports % 3 == 0 or step == phase.steps:
                    state = {
                        "module": module.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                        "seconds": time.monotonic() - started,
                        "decay_at": phase.decay_at,
                        "decay_steps": phase.decay_steps,
                    }
                    _save(state, state_file)
                last_report = time.monotonic()
    if log:
        _save(module.state_dict(), work / f"{phase.name}.pt")


def _wish(control: Path) -> int:
    """Reads how many steps of decay are asked for; 0 where none are."""
    text = control.read_text().strip() if control.exists() else ""
    return int(text) if text.isdigit() else 0


class _Log:
    """Writes a line per report to train.log and to metrics.jsonl."""

    def __init__(self, work: Path, phase: str) -> None:
        self.work, self.phase = work, phase
        self.rows: list[dict[str, float]] = []

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def report(
        self, step: int, pictures: int, seconds: float, rate: float, phase: Phase, check: dict[str, Any]
    ) -> None:
        names = sorted({name for row in self.rows for name in row})
        means = {name: float(np.nanmean([row[name] for row in self.rows if name in row])) for name in names}
        self.rows.clear()
        record = {
            "phase": self.phase,
            "step": step,
            "pictures": pictures,
            "minutes": round(seconds / 60, 2),
            "rate": rate,
            "decay_at": phase.decay_at,
            "steps": phase.steps,
            "train": _rounded(means),
            "check": _rounded(check),
        }
        with (self.work / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        line = (
            f"{time.strftime('%H:%M:%S')} {self.phase} step {step}/{phase.steps} pictures {pictures} "
            f"({pictures / seconds:.0f}/s) {seconds / 60:.1f} min rate {rate:.1e} decay at {phase.decay_at} "
            f"train {record['train']} check {record['check']}"
        )
        with (self.work / "train.log").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def _save(value: Any, path: Path) -> None:
    """Writes atomically, so that a stop in the middle leaves the earlier file."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(rank: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if options.workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.workers, timeout=timedelta(hours=1)
        )
    for name in options.phases.split(","):
        if not (options.work / f"{name}.pt").exists():
            torch.manual_seed(options.seed)  # all workers start from the same weights
            # The other phases' few pictures a step would not earn back the compiler's minute.
            module = build_phase(name, options.work, compiled=name == "tower" and not options.eager)
            train_phase(
                PHASES[name],
                module,
                options.work,
                seed=options.seed,
                rank=rank,
                workers=options.workers,
                every=options.report_every,
            )
        if options.workers > 1:
            dist.barrier()
    if options.workers > 1:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded model from scratch and exports it.")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint when training has ended")
    parser.add_argument("--export", action="store_true", help="train nothing: write --out from the newest weights")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for state and logs (%(default)s)")
    parser.add_argument("--phases", default=",".join(PHASES), help="which phases to run, in order (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first scene seed, and seed of the weights (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="do without a C++ compiler: slower")
    parser.add_argument("--report-every", type=float, default=120.0, help="seconds (%(default)s)")
    options = parser.parse_args(arguments)
    if not options.export:
        options.work.mkdir(parents=True, exist_ok=True)
        os.environ["OMP_NUM_THREADS"] = "1"
        spawn(_worker, (_free_port(), options), nprocs=options.workers)
    if options.out:
        print(f"wrote {options.out} from {export(options.work, options.out)}")


if __name__ == "__main__":
    main()
