"""Collects a benchmark's figures; prints them, and writes them as JSON and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from florence2_kserve.benchmark.divergence import Comparison
from florence2_kserve.benchmark.flops import ModelFlops
from florence2_kserve.benchmark.models import ModelShape
from florence2_kserve.benchmark.plot import draw_plot
from florence2_kserve.benchmark.settings import BenchmarkSettings, Plan

_TYPICAL_PROMPT = 12


class Report:
    """The figures of one benchmark.

    Args:
        settings: What was asked for.
        machine: What it runs on.

    Attributes:
        data: All figures, as they go into the JSON file: ``ratios`` by name; ``loads`` by name and side;
            ``parity`` by name; ``sweeps`` by profile and capture; ``towers`` by
            profile and batch.
    """

    def __init__(self, settings: BenchmarkSettings, machine: Mapping[str, Any]) -> None:
        self._json, self._plot = settings.json, settings.plot
        self.data: dict[str, Any] = {
            "machine": dict(machine),
            "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
            "profiles": {},
            "ratios": {},
            "loads": {},
            "parity": {},
            "sweeps": {},
            "towers": {},
        }
        print(_describe(machine))

    def begin_profile(self, profile: str, plan: Plan, shape: ModelShape, flops: ModelFlops) -> None:
        """Notes what a profile runs."""
        tokens = shape.image_tokens + _TYPICAL_PROMPT
        parts = {
            "image": flops.image,
            "encoder": flops.encoder(tokens),
            "cross_kv": flops.cross_kv(tokens),
            "decode_step_per_beam": flops.decode_step(tokens, 40),
        }
        self.data["profiles"][profile] = {"plan": asdict(plan), "shape": asdict(shape), "flops": parts}
        print(
            f"\n== {profile}: d {shape.d_model}, layers {shape.layers[0]}+{shape.layers[1]}, tower "
            f"{'-'.join(map(str, shape.dim_embed))} at {shape.image_size}², lengths x{plan.length_scale:g}, "
            f"{plan.repeats} repetition(s)\n   GFLOP: "
            + ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.3g}" for name, value in parts.items())
        )

    def add_load(self, key: str, sides: Mapping[str, Any], peak_bytes: Mapping[str, int]) -> None:
        """Adds the summaries of all sides of a load, and the GPU memory they took."""
        for side, taken in peak_bytes.items():
            sides[side]["peak_device_bytes"] = taken
        self.data["loads"][key] = dict(sides)
        self._save()

    def add_ratios(self, named: Mapping[str, float]) -> None:
        """Adds ratios by name."""
        self.data["ratios"].update(named)
        self._save()

    def add_parity(self, name: str, comparison: Comparison) -> None:
        """Adds how many sequences agreed."""
        self.data["parity"][name] = comparison.to_json()
        print(f"   tokens {name}: {_agreement(comparison)}")
        self._save()

    def add_sweep(self, profile: str, capture: str, points: Sequence[Mapping[str, float]]) -> None:
        """Adds decode steps by rows in flight."""
        self.data["sweeps"].setdefault(profile, {})[capture] = [dict(point) for point in points]
        print(f"   decode steps, capture {capture}")
        rows = [
            (
                f"{point['rows']:.1f}",
                f"{point['step_seconds'] * 1e3:.2f}",
                f"{point['roofline_step_seconds'] * 1e3:.2f}",
                f"{point['roofline_step_seconds'] / point['step_seconds']:.0%}",
                f"{point['tokens_per_second']:.1f}",
                f"{point['items_per_second']:.2f}",
                f"{point['host_syncs_per_token']:.3f}",
            )
            for point in points
        ]
        header = ("rows in flight", "ms a step", "roofline ms", "reached", "tokens/s", "items/s", "host syncs/token")
        print(table([header, *rows]))
        self._save()

    def add_tower(self, profile: str, images: int, seconds: Mapping[str, float], flops: float) -> None:
        """Adds what the image tower takes by itself for a batch of images, by side; `flops` are one image's."""
        peak = self.data["machine"]["peak_gflops"] * 1e9
        figures = {
            side: {
                "seconds": taken,
                "flops_per_second": images * flops / taken,
                "reached": images * flops / taken / peak,
            }
            for side, taken in seconds.items()
        }
        self.data["towers"].setdefault(profile, {})[str(images)] = figures
        for side, one in figures.items():
            print(
                f"   tower, {images} image(s), {side}: {one['seconds']:.4f} s, {one['flops_per_second'] / 1e9:.1f} "
                f"GFLOP/s, {one['reached']:.0%} of the measured peak"
            )
        ratio = seconds["transformers"] / seconds["ours"]
        self.add_ratios({f"{profile}.tower.b{images}.ratio": ratio})

    def print_load(self, key: str) -> None:
        """Prints a load's figures."""
        sides = self.data["loads"][key]
        header = (
            *("side", "s", "items/s", "p50 s", "p95 s", "useful steps", "images", "cross-K/V MB"),
            *("TFLOP", "GFLOP/s", "syncs/token"),
        )
        rows = [
            (
                side,
                f"{figures['seconds']:.2f}",
                f"{figures['items_per_second']:.3f}",
                f"{figures['latency']['p50']:.3f}",
                f"{figures['latency']['p95']:.3f}",
                f"{figures['useful_share']:.3f}",
                f"{figures['counts']['images_encoded']:.0f}",
                f"{figures['counts']['cross_kv_bytes'] / 1e6:.1f}",
                f"{figures['flops']['total'] / 1e12:.3f}",
                f"{figures['achieved_flops'] / 1e9:.1f}",
                f"{figures['host_syncs_per_token']:.3f}" if "host_syncs_per_token" in figures else "-",
            )
            for side, figures in sides.items()
        ]
        print(f" {key}\n{table([header, *rows])}")
        ours = sides["ours"]
        if "vision_share_of_seconds" in ours and "card" not in self.data["machine"]:
            reached = ours["tower_flops_per_second"] / (self.data["machine"]["peak_gflops"] * 1e9)
            print(
                f"   vision {ours['vision_share_of_seconds']:.0%} of ours' time, at "
                f"{ours['tower_flops_per_second'] / 1e9:.1f} GFLOP/s: {reached:.0%} of the measured peak"
            )
        print("   " + ", ".join(f"{name} {value:.2f}" for name, value in self._ratios_of(key)), flush=True)

    def finish(self) -> None:
        """Prints all ratios, and draws the picture."""
        print("\n== ratios (of speed: ours ÷ baseline's; p50, p95: ours ÷ baseline's latency)")
        print(table([(name, f"{value:.3f}") for name, value in self.data["ratios"].items()]))
        self._save()
        if self._plot is not None:
            draw_plot(self.data, self._plot)
            print(f"plot: {self._plot}")
        if self._json is not None:
            print(f"figures: {self._json}")

    def _ratios_of(self, key: str) -> list[tuple[str, float]]:
        start = f"{key}."
        return [(name.removeprefix(start), v) for name, v in self.data["ratios"].items() if name.startswith(start)]

    def _save(self) -> None:
        """Writes the JSON file whole, so that a run cut short leaves what it had."""
        if self._json is not None:
            unfinished = self._json.with_name(f"{self._json.name}.{os.getpid()}")
            unfinished.write_text(json.dumps(self.data, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(self._json)


def _describe(machine: Mapping[str, Any]) -> str:
    lines = [
        f"cpu: {machine['cpu']}, {machine['threads']} thread(s), {' '.join(machine['cpu_features']) or 'no AVX'}",
        f"device: {machine['device']}, {machine['dtype']}, {machine['peak_gflops']:.1f} GFLOP/s and "
        f"{machine['peak_gbytes_per_second']:.1f} GB/s measured",
        f"torch {machine['torch']}, transformers {machine['transformers']}",
    ]
    if "card" in machine:
        lines.append(
            f"card: {machine['card']}, {machine['card_bytes'] / 2**30:.0f} GiB, CUDA {machine['cuda']}, TF32 "
            f"{'on' if machine['tf32'] else 'off'}"
        )
    return "\n".join(lines)


def _agreement(comparison: Comparison) -> str:
    text = f"{comparison.identical} of {comparison.compared} sequences identical"
    if comparison.divergences:
        margin = max(divergence.margin for divergence in comparison.divergences)
        gap = max(divergence.score_gap for divergence in comparison.divergences)
        text += f"; where they part, candidates lie within {margin:.2g} and scores within {gap:.2g}"
    return text


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of words as a table for a terminal, its columns as wide as they have to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
