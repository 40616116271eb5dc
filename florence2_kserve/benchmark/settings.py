"""What a benchmark is asked to do, and what it does where nothing is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SizeName = Literal["quick", "base", "large"]
ProfileName = Literal["decode-bound", "vision-bound"]
LoadName = Literal[
    "single",
    "mixed",
    "tasks",
    "nine_tasks",
    "unique",
    "caption_beside_od",
    "open",
    "tower",  # the image tower by itself, against the device's peak
    "capture",  # decode steps eager and captured
    "precision",  # tokens in half precision against float32's
]
PolicyName = Literal["arrival", "grouped"]
DtypeName = Literal["float32", "float16", "bfloat16"]
CaptureName = Literal["off", "compile", "cuda-graph"]
BackendName = Literal["auto", "transformers", "timm"]


@dataclass(frozen=True, slots=True)
class BenchmarkSettings:
    """What is run.

    Attributes:
        profiles: ``decode-bound`` has a narrow tower and a thin encoder before the full decoder, as a GPU sees the
            model; ``vision-bound`` is the model as it is.
        size: ``base`` or ``large``, or ``quick``: a small model and few requests, inside a minute.
        loads: Which loads; None for the profile's own (`plan`).
        baselines: Order in which the static batches take what waits; None for the profile's own.
        requests: Requests of each load; None for what the device can do in a quarter of an hour.
        repeats: Interleaved repetitions, of which medians are taken; None for the device's own.
        length_scale: Factor on the table's output lengths; None for 1, or less where that takes hours.
        concurrency: Clients of the closed loops.
        max_batch_size: Requests decoded together, on both sides.
        num_beams: Beams of every request.
        rate: Requests a second of the open load; None for 0.8 times what the slowest side answered of ``mixed``.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        dtype: Data type of the weights on both sides.
        tf32: Whether a GPU may round float32 products to TF32.
        threads: Threads of a CPU; None leaves torch's choice.
        seed: Seed of weights, pixels, lengths, orders and arrivals.
        vision_backend: The engine's tower.
        compile_vision: Whether the engine compiles it.
        decode_capture: How the engine captures its decode steps.
        sweep: Whether to measure decode steps by rows in flight, beside the roofline.
        json: File for all figures, rewritten after each load.
        plot: PNG for the ratios and the sweep.
    """

    profiles: tuple[ProfileName, ...] = ("decode-bound", "vision-bound")
    size: SizeName = "base"
    loads: tuple[LoadName, ...] | None = None
    baselines: tuple[PolicyName, ...] | None = None
    requests: int | None = None
    repeats: int | None = None
    length_scale: float | None = None
    concurrency: int = 36
    max_batch_size: int = 36
    num_beams: int = 3
    rate: float | None = None
    device: str = "auto"
    dtype: DtypeName = "float32"
    tf32: bool = False
    threads: int | None = None
    seed: int = 0
    vision_backend: BackendName = "auto"
    compile_vision: bool = False
    decode_capture: CaptureName = "off"
    sweep: bool = False
    json: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How one profile is run: settings with nothing left open.

    Attributes:
        loads: In the order they are run.
        baselines: Baselines.
        requests: Requests of a load over many tasks.
        unique_requests: Requests of a load of captions.
        rounds: Requests of each client of ``caption_beside_od``.
        repeats: Repetitions.
        single_repeats: Repetitions of single requests.
        length_scale: Factor on lengths.
    """

    loads: tuple[LoadName, ...]
    baselines: tuple[PolicyName, ...]
    requests: int
    unique_requests: int
    rounds: int
    repeats: int
    single_repeats: int
    length_scale: float


def plan(settings: BenchmarkSettings, profile: ProfileName, *, on_gpu: bool) -> Plan:
    """Decides what the settings leave open, so that a profile takes a quarter of an hour at most.

    A static batch of 36 requests and 3 beams takes about a second a step at base size on two cores, and
    its longest row takes 300 of them at the table's lengths. A CPU therefore gets half the lengths and few loads;
    ``loads``, ``requests``, ``repeats`` and ``length_scale`` give it all of them.
    """
    decode_bound = profile == "decode-bound"
    loads: tuple[LoadName, ...]
    if on_gpu:
        loads = ("single", "mixed", "tasks", "nine_tasks", "unique", "caption_beside_od", "open")
        loads += ("capture", "precision") if decode_bound else ("tower",)
        requests, unique, rounds, repeats, scale = 144, 144, 3, 3, 1.0
    elif settings.size == "quick":
        loads = ("single", "mixed", "caption_beside_od") if decode_bound else ("tower", "unique", "nine_tasks")
        requests, unique, rounds, repeats, scale = (36 if decode_bound else 18), 8, 1, 2, 0.15
    elif decode_bound:
        loads = ("single", "mixed", "caption_beside_od")
        requests, unique, rounds, repeats, scale = 72, 72, 2, 1, 0.5
    else:
        loads = ("tower", "single", "unique", "nine_tasks")
        requests, unique, rounds, repeats, scale = 36, 12, 1, 1, 0.5
    baselines: tuple[PolicyName, ...] = ("arrival", "grouped")
    if not decode_bound and not on_gpu and settings.size != "quick":
        baselines = ("arrival",)  # each encodes every image nine times
    loads = settings.loads or loads
    if "open" in loads and settings.rate is None and "mixed" not in loads:
        loads = ("mixed", *loads)  # says how many requests a second both sides bear
    repeats = settings.repeats or repeats
    return Plan(
        loads=tuple(sorted(loads, key=lambda name: name == "open")),
        baselines=settings.baselines or baselines,
        requests=settings.requests or requests,
        unique_requests=settings.requests or unique,
        rounds=rounds,
        repeats=repeats,
        single_repeats=max(3, repeats),
        length_scale=settings.length_scale or scale,
    )
