"""Ways to run a decoder step: as it is, compiled, or recorded as a CUDA graph for each shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from florence2_kserve.engine.decoder import KeyValueStore, StepInputs

Step = Callable[[StepInputs, KeyValueStore], torch.Tensor]


def capture_step(step: Step, capture: Literal["off", "compile", "cuda-graph"], device: torch.device) -> Step:
    """Returns a function that does what `step` does.

    Args:
        step: ``Decoder.step``.
        capture: ``off`` runs it as it is. ``compile`` runs it through ``torch.compile``, with sizes as
            variables, so that it is compiled once. ``cuda-graph`` records it once for each combination of sizes,
            which have to be rounded up to few, and replays the recording, which spares the CPU's part.
        device: Where it runs.

    Raises:
        ValueError: If the device or machine can't do that.
    """
    if capture == "off":
        return step
    if capture == "cuda-graph":
        if device.type != "cuda":
            raise ValueError(f"decode_capture 'cuda-graph' needs a CUDA device, not {device}")
        return _GraphedStep(step)
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ValueError("decode_capture 'compile' needs a C++ compiler on a CPU; none was found")
    return torch.compile(step, dynamic=True)


@dataclass(slots=True)
class _Recording:
    inputs: StepInputs
    logits: torch.Tensor
    graph: Any


class _GraphedStep:
    """Records `step` for each shape that comes along and replays it."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._pool: Any = None

    def __call__(self, inputs: StepInputs, store: KeyValueStore) -> torch.Tensor:
        key = tuple(v.shape if isinstance(v, torch.Tensor) else v for _, v in _items(inputs))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(inputs, store)
        for name, value in _items(inputs):
            if isinstance(value, torch.Tensor):
                getattr(recording.inputs, name).copy_(value)
        recording.graph.replay()
        return recording.logits

    def _record(self, inputs: StepInputs, store: KeyValueStore) -> _Recording:
        copies: dict[str, Any] = {name: v.clone() for name, v in _items(inputs) if isinstance(v, torch.Tensor)}
        own = replace(inputs, **copies)
        # Libraries set themselves up in the first run, which a recording mustn't contain. Running twice does no
        # harm: the same keys and values go to the same places.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(own, store)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(own, store)
        self._pool = self._pool or graph.pool()
        return _Recording(own, logits, graph)


def _items(inputs: StepInputs) -> list[tuple[str, Any]]:
    return [(field.name, getattr(inputs, field.name)) for field in fields(inputs)]
