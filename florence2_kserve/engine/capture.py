"""Ways to run a decoder step: as it is, compiled, or recorded as a CUDA graph for each shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from florence2_kserve.engine.decoder import KeyValueStore, StepInputs

_MAX_RECORDINGS = 64

Capture = Literal["off", "compile", "cuda-graph"]
Step = Callable[[StepInputs, KeyValueStore], torch.Tensor]


def capture_step(step: Step, capture: Capture, device: torch.device, *, max_logits: int) -> Step:
    """Returns a function that does what `step` does.

    Args:
        step: ``Decoder.step``.
        capture: ``off`` runs it as it is. ``compile`` runs it through ``torch.compile``, with sizes as
            variables, so that it is compiled once. ``cuda-graph`` records it once for each combination of sizes,
            which have to be rounded up to few, and replays the recording, which spares the CPU's part.
        device: Where it runs.
        max_logits: Largest number of rows whose logits are asked for.

    Raises:
        ValueError: If the device can't do that.
        RuntimeError: If a compiler is missing.
    """
    if capture == "off":
        return step
    if capture == "cuda-graph":
        if device.type != "cuda":
            raise ValueError(f"decode_capture 'cuda-graph' needs a CUDA device, not {device}")
        return _GraphedStep(step, device, max_logits)
    require_compiler(device, "decoder steps")
    return torch.compile(step, dynamic=True)


def require_compiler(device: torch.device, what: str) -> None:
    """Makes sure that torch.compile can work for a device.

    Args:
        device: Where the code will run.
        what: What is to be compiled, for the message.

    Raises:
        RuntimeError: If what it needs is missing, by name.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise RuntimeError(f"compiling {what} for {device} needs Triton, which is missing or too old")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(f"compiling {what} needs a C++ compiler, such as g++; set CXX to one. {error}") from error


@dataclass(slots=True)
class _Recording:
    inputs: StepInputs
    graph: Any


class _GraphedStep:
    """Records `step` for each shape that comes along and replays it; keeps the recordings used last."""

    def __init__(self, step: Step, device: torch.device, max_logits: int) -> None:
        self._step = step
        self._max_logits = max_logits
        self._stream = torch.cuda.Stream(device)
        self._recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._logits: torch.Tensor | None = None  # of whichever recording ran last; each with its own would add up
        self._pool: Any = None

    def __call__(self, inputs: StepInputs, store: KeyValueStore) -> torch.Tensor:
        key = tuple(v.shape if isinstance(v, torch.Tensor) else v for _, v in _items(inputs))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._record(inputs, store)
            self._recordings[key] = recording
            if len(self._recordings) > _MAX_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        _copy(inputs, recording.inputs)
        recording.graph.replay()
        assert self._logits is not None
        return self._logits[: inputs.num_logits]

    def _record(self, inputs: StepInputs, store: KeyValueStore) -> _Recording:
        copies: dict[str, Any] = {name: v.clone() for name, v in _items(inputs) if isinstance(v, torch.Tensor)}
        own = replace(inputs, **copies)
        # Libraries set themselves up in the first run, which a recording mustn't contain. Running twice does no
        # harm: the same keys and values go to the same places.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            logits = self._step(own, store)
            if self._logits is None:
                self._logits = logits.new_zeros((self._max_logits, logits.shape[1]))
        torch.cuda.current_stream().wait_stream(self._stream)
        del logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._logits[: inputs.num_logits].copy_(self._step(own, store))
        self._pool = self._pool or graph.pool()
        return _Recording(own, graph)


def _copy(source: StepInputs, target: StepInputs) -> None:
    """Copies the tensors of `source` to those of `target`, which have the same shapes: a launch for each type."""
    by_type: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, value in _items(source):
        if isinstance(value, torch.Tensor):
            by_type.setdefault(value.dtype, []).append((getattr(target, name), value))
    for pairs in by_type.values():
        targets, values = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, values)


def _items(inputs: StepInputs) -> list[tuple[str, Any]]:
    return [(field.name, getattr(inputs, field.name)) for field in fields(inputs)]
