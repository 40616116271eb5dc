"""Runs a benchmark: profile by profile, load by load, side by side."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from florence2_kserve.benchmark.baseline import POLICIES, StaticBaseline
from florence2_kserve.benchmark.divergence import Comparison
from florence2_kserve.benchmark.flops import ModelFlops
from florence2_kserve.benchmark.models import ModelShape, build_model, find_shape, image_settings
from florence2_kserve.benchmark.report import Report
from florence2_kserve.benchmark.roofline import (
    Peak,
    describe_machine,
    measure_peak,
    step_seconds,
    synchronize,
)
from florence2_kserve.benchmark.settings import BenchmarkSettings, CaptureName, LoadName, Plan, ProfileName, plan
from florence2_kserve.benchmark.sides import EngineSide, Run, Side, StaticSide
from florence2_kserve.benchmark.workload import TASKS, Load, Workload, draw_image, prompt_ids
from florence2_kserve.engine.engine import InflightEngine
from florence2_kserve.engine.vision import ImageEncoder
from florence2_kserve.weights import LoadedModel, find_device

_SWEEP_REQUESTS = (1, 2, 4, 8, 16, 36)
_SINGLE_TASKS = ("caption", "detailed_caption", "od")
_OPEN_SHARE = 0.8
_CAPTURES: tuple[CaptureName, ...] = ("off", "compile", "cuda-graph")
_HALVES = (torch.bfloat16, torch.float16)

Summary = dict[str, Any]


def run_benchmark(settings: BenchmarkSettings) -> int:
    """Runs a benchmark and prints its table; see `BenchmarkSettings` for what it writes.

    Args:
        settings: What to run.

    Returns:
        0, or 1 if the two sides disagreed in float64, where they must not.

    Raises:
        ValueError: If the device isn't there.
    """
    device = find_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
    transformers_logging.set_verbosity_error()
    logging.getLogger("florence2_kserve").setLevel(logging.WARNING)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    peak = measure_peak(device, dtype)
    report = Report(settings, describe_machine(device, dtype, peak))
    exact = compare_in_float64(settings, device)
    report.add_parity("float64", exact)
    for profile in settings.profiles:
        _Profile(settings, profile, device, peak, report).run()
    report.finish()
    return 0 if exact.identical == exact.compared else 1


def compare_in_float64(settings: BenchmarkSettings, device: torch.device, requests: int = 36) -> Comparison:
    """Answers a mixed load on both sides with the small model in float64.

    There the order of summation can't decide between candidates, so that all tokens must agree.
    """
    comparison = Comparison()
    workload = Workload(seed=settings.seed, length_scale=0.15, concurrency=requests)
    shape = find_shape("quick", "decode-bound")
    small = replace(settings, max_batch_size=12, decode_capture="off", compile_vision=False)
    with _bench(small, shape, torch.float64, device, workload) as bench:
        load = workload.mixed(requests)
        ours, theirs = bench.engine_side.run(load), bench.static_side("arrival").run(load)
        comparison.add(bench.baseline, load.items, ours.answers, theirs.answers)
    return comparison


class _Bench:
    """One model with both sides on it."""

    def __init__(
        self, settings: BenchmarkSettings, shape: ModelShape, dtype: torch.dtype, device: torch.device, longest: int
    ) -> None:
        self._settings, self._longest = settings, longest
        self.loaded: LoadedModel = build_model(shape, seed=settings.seed, dtype=dtype, device=device)
        self.image = image_settings(shape)
        self.flops = ModelFlops(self.loaded.model.config, shape.image_size)
        self.element_bytes = dtype.itemsize
        self.baseline = StaticBaseline(self.loaded, self.image, seed=settings.seed, num_beams=settings.num_beams)
        self._engine = self.make_engine(settings.decode_capture)
        self.engine_side = self.engine_side_of(self._engine)

    def make_engine(self, capture: CaptureName) -> InflightEngine:
        """Starts an engine, sized for the benchmark's longest answers."""
        settings = self._settings
        return InflightEngine(
            self.loaded,
            self.image,
            max_batch_size=settings.max_batch_size,
            max_rows=settings.num_beams * settings.max_batch_size,
            max_tokens=settings.num_beams * settings.max_batch_size * self._longest,
            max_queue_size=100_000,
            vision_backend=settings.vision_backend,
            compile_vision=settings.compile_vision,
            decode_capture=capture,
        )

    def engine_side_of(self, engine: InflightEngine) -> EngineSide:
        """Returns the side that drives an engine."""
        return EngineSide(
            engine,
            self.loaded,
            self.image,
            self.flops,
            seed=self._settings.seed,
            num_beams=self._settings.num_beams,
        )

    def static_side(self, policy: str) -> StaticSide:
        """Returns a baseline."""
        return StaticSide(
            self.baseline,
            POLICIES[policy],
            self.flops,
            max_batch_size=self._settings.max_batch_size,
            element_bytes=self.element_bytes,
        )

    def close(self) -> None:
        """Stops the engine."""
        self._engine.close()


@contextmanager
def _bench(
    settings: BenchmarkSettings, shape: ModelShape, dtype: torch.dtype, device: torch.device, workload: Workload
) -> Iterator[_Bench]:
    bench = _Bench(settings, shape, dtype, device, workload.longest)
    try:
        yield bench
    finally:
        bench.close()


class _Profile:
    """One profile of a benchmark."""

    def __init__(
        self, settings: BenchmarkSettings, profile: ProfileName, device: torch.device, peak: Peak, report: Report
    ) -> None:
        self._settings, self._device, self._peak, self._report = settings, device, peak, report
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._prefix = profile.replace("-", "_")
        self._plan: Plan = plan(settings, profile, on_gpu=device.type == "cuda")
        self._shape = find_shape(settings.size, profile)
        self._workload = Workload(
            seed=settings.seed, length_scale=self._plan.length_scale, concurrency=settings.concurrency
        )
        self._rate = settings.rate

    def run(self) -> None:
        """Runs all of the profile's loads."""
        with _bench(self._settings, self._shape, self._dtype, self._device, self._workload) as bench:
            self._report.begin_profile(self._prefix, self._plan, self._shape, bench.flops)
            sides: dict[str, Side] = {"ours": bench.engine_side}
            sides |= {policy: bench.static_side(policy) for policy in self._plan.baselines}
            warm_up = self._workload.unique(2)
            for side in (sides["ours"], bench.static_side("arrival")):
                side.run(warm_up)
            for name in self._plan.loads:
                self._run_load(name, bench, sides)
            if self._settings.sweep:
                self._sweep(bench.engine_side, bench, self._settings.decode_capture)

    def _run_load(self, name: LoadName, bench: _Bench, sides: Mapping[str, Side]) -> None:
        workload, requests = self._workload, self._plan.requests
        if name == "capture":
            self._compare_captures(bench)
        elif name == "tower":
            self._measure_tower(bench)
        elif name == "precision":
            self._compare_precisions()
        elif name == "single":
            for task in _SINGLE_TASKS:
                one = {"ours": sides["ours"], "generate": bench.static_side("arrival")}
                self._compare(bench, workload.single(TASKS[task]), one, self._plan.single_repeats)
        elif name == "tasks":
            for item in TASKS.values():
                self._compare(bench, workload.alone(item, requests), _of_one_task(sides), self._plan.repeats)
        elif name == "unique":
            load = workload.unique(self._plan.unique_requests)
            self._compare(bench, load, _of_one_task(sides), self._plan.repeats)
        else:
            load = {
                "mixed": lambda: workload.mixed(requests),
                "nine_tasks": lambda: workload.nine_tasks(max(1, requests // len(TASKS))),
                "caption_beside_od": lambda: workload.caption_beside_od(self._plan.rounds, clients=6),
                "open": lambda: workload.open(requests, self._rate or 1.0),
            }[name]()
            runs = self._compare(bench, load, sides, self._plan.repeats)
            if name == "mixed" and self._rate is None:
                self._rate = _OPEN_SHARE * min(_throughput(side_runs) for side_runs in runs.values())

    def _compare(self, bench: _Bench, load: Load, sides: Mapping[str, Side], repeats: int) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        peak_bytes: dict[str, int] = {}
        names = list(sides)
        for repeat in range(repeats):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                if self._device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self._device)
                runs[name].append(sides[name].run(load))
                if self._device.type == "cuda":
                    peak_bytes[name] = torch.cuda.max_memory_allocated(self._device)
        key = f"{self._prefix}.{load.name}"
        self._report.add_load(key, {name: summarise(load, side_runs) for name, side_runs in runs.items()}, peak_bytes)
        self._report.add_ratios(ratios(key, load, runs))
        for name in names[1:]:
            comparison = Comparison()
            comparison.add(bench.baseline, load.items, runs["ours"][0].answers, runs[name][0].answers)
            self._report.add_parity(f"{key}.vs_{name}", comparison)
        self._report.print_load(key)
        return runs

    def _sweep(self, side: EngineSide, bench: _Bench, capture: str, requests: Sequence[int] = _SWEEP_REQUESTS) -> None:
        tokens = self._shape.image_tokens + len(prompt_ids(TASKS["caption"], self._shape.vocab_size))
        length = max(16, round(80 * self._plan.length_scale))
        points = []
        for count in requests:
            if count > self._settings.max_batch_size:
                continue
            run = min((side.run(self._workload.equal(count, length)) for _ in range(2)), key=_decode_seconds)
            rows = run.counts["row_steps"] / run.counts["decode_steps"]
            modelled = step_seconds(
                bench.flops,
                self._peak,
                rows=rows,
                requests=rows / self._settings.num_beams,
                tokens=tokens,
                position=(length + 1) / 2,
                element_bytes=bench.element_bytes,
            )
            points.append(
                {
                    "requests": count,
                    "rows": rows,
                    "step_seconds": _decode_seconds(run) / run.counts["decode_steps"],
                    "roofline_step_seconds": modelled,
                    "tokens_per_second": run.counts["generated_tokens"] / _decode_seconds(run),
                    "items_per_second": run.throughput,
                    "host_syncs_per_token": run.counts["host_syncs"] / run.counts["generated_tokens"],
                }
            )
        self._report.add_sweep(self._prefix, capture, points)

    def _measure_tower(self, bench: _Bench) -> None:
        """Measures the engine's image tower and transformers', each alone and interleaved."""
        encoder = ImageEncoder(
            bench.loaded, bench.image, backend=self._settings.vision_backend, compile=self._settings.compile_vision
        )
        for count in (1, 8) if self._device.type == "cuda" else (1,):
            images = [draw_image(number, self._shape.image_size, self._settings.seed) for number in range(count)]
            pixels = torch.from_numpy(np.stack(images)).to(self._device)
            normalised = torch.randn(
                (count, 3, self._shape.image_size, self._shape.image_size), device=self._device, dtype=self._dtype
            )
            features = bench.loaded.model.model.get_image_features
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(1 + max(3, self._plan.repeats)):
                ours.append(self._seconds(encoder.encode, pixels))
                theirs.append(self._seconds(features, normalised))
            # The first ones warm up, or compile.
            named = {"ours": statistics.median(ours[1:]), "transformers": statistics.median(theirs[1:])}
            self._report.add_tower(self._prefix, count, named, bench.flops.image)

    @torch.inference_mode()
    def _seconds(self, function: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
        synchronize(self._device)
        start = time.perf_counter()
        function(images)
        synchronize(self._device)
        return time.perf_counter() - start

    def _compare_captures(self, bench: _Bench) -> None:
        """Measures the full decode step eager and captured."""
        for capture in _CAPTURES:
            engine = bench.make_engine(capture)
            try:
                side = bench.engine_side_of(engine)
                side.run(self._workload.equal(self._settings.max_batch_size, 16))  # captures
                self._sweep(side, bench, capture, (self._settings.max_batch_size,))
            finally:
                engine.close()

    def _compare_precisions(self) -> None:
        """Counts how often half precision gives float32's tokens, on either side."""
        load = self._workload.mixed(self._plan.requests)
        with _bench(self._settings, self._shape, torch.float32, self._device, self._workload) as bench:
            truth = bench.static_side("arrival").run(load).answers
            for dtype in _HALVES:
                with _bench(self._settings, self._shape, dtype, self._device, self._workload) as half:
                    ours = half.engine_side.run(load).answers
                    theirs = half.static_side("arrival").run(load).answers
                pairs = {"ours_vs_generate": (ours, theirs), "ours_vs_float32": (ours, truth)}
                pairs["generate_vs_float32"] = (theirs, truth)
                for name, (first, second) in pairs.items():
                    comparison = Comparison()
                    comparison.add(bench.baseline, load.items, first, second)
                    self._report.add_parity(f"{self._prefix}.{str(dtype).removeprefix('torch.')}.{name}", comparison)


def summarise(load: Load, runs: Sequence[Run]) -> Summary:
    """Returns the medians of one side's runs of a load, and the counts of its last."""
    last = runs[-1]
    seconds = statistics.median(run.seconds for run in runs)
    tasks = sorted({item.task.name for item in load.items})
    summary: Summary = {
        "seconds": seconds,
        "all_seconds": [run.seconds for run in runs],
        "items": len(last.answers),
        "clients": sum(stream.clients for stream in load.streams),
        "items_per_second": len(last.answers) / seconds,
        "latency": _percentiles([latency for run in runs for latency in run.latencies(load)]),
        "counts": last.counts,
        "useful_share": last.counts["useful_row_steps"] / max(1.0, last.counts["row_steps"]),
        "flops": asdict(last.flops) | {"total": last.flops.total},
        "achieved_flops": last.flops.total / seconds,
        "parts": {name: statistics.median(run.parts[name] for run in runs) for name in last.parts},
    }
    if len(tasks) > 1:
        summary["latency_by_task"] = {
            task: _percentiles([latency for run in runs for latency in run.latencies(load, task)]) for task in tasks
        }
    if "host_syncs" in last.counts:
        summary["host_syncs_per_token"] = last.counts["host_syncs"] / max(1.0, last.counts["generated_tokens"])
    if last.parts.get("vision_seconds"):  # on a GPU only until the work is queued
        summary["vision_share_of_seconds"] = summary["parts"]["vision_seconds"] / seconds
        summary["tower_flops_per_second"] = last.flops.tower / summary["parts"]["vision_seconds"]
    return summary


def ratios(key: str, load: Load, runs: Mapping[str, Sequence[Run]]) -> dict[str, float]:
    """Returns by how much ours is better than each baseline, by name; above 1 is faster, and shorter for latencies.

    Args:
        key: Name of profile and load, in front of each ratio's own.
        load: The load.
        runs: Runs by side; ``ours`` is the engine.
    """
    named: dict[str, float] = {}
    ours = runs["ours"]
    is_open = any(stream.arrivals for stream in load.streams)
    for name, theirs in runs.items():
        if name == "ours":
            continue
        if name == "generate":
            named[f"{key}.ratio"] = _median_latency(theirs, load) / _median_latency(ours, load)
            continue
        if not is_open:  # an open load comes at its own pace
            ratio = _throughput(ours) / _throughput(theirs)
            flop_ratio = theirs[-1].flops.total / ours[-1].flops.total
            named[f"{key}.ratio_vs_{name}"] = ratio
            suffix = "" if name == "arrival" else f"_vs_{name}"
            named[f"{key}.flop_ratio{suffix}"] = flop_ratio
            named[f"{key}.share_of_flop_ratio{suffix}"] = ratio / flop_ratio
        if is_open or len(load.streams) > 1:
            task = "caption" if len(load.streams) > 1 else None
            suffix = "" if name == "arrival" else f"_vs_{name}"
            for percent in (50, 95):
                own, other = (
                    statistics.median(np.percentile(run.latencies(load, task), percent) for run in side)
                    for side in (ours, theirs)
                )
                # The other way round: the share of the baseline's latency that is left.
                named[f"{key}.p{percent}_ratio{suffix}"] = float(own / other)
    return named


def _of_one_task(sides: Mapping[str, Side]) -> dict[str, Side]:
    """Leaves out the grouped baseline, which is the other one where all ask the same."""
    return {name: side for name, side in sides.items() if name != "grouped" or "arrival" not in sides}


def _throughput(runs: Sequence[Run]) -> float:
    return statistics.median(run.throughput for run in runs)


def _median_latency(runs: Sequence[Run], load: Load) -> float:
    return statistics.median(latency for run in runs for latency in run.latencies(load))


def _percentiles(latencies: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(latencies, percent)) for percent in (50, 95)}


def _decode_seconds(run: Run) -> float:
    return run.parts["decode_seconds"]
