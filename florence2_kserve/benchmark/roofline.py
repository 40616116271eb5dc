"""What the machine can do at best, measured, and how long a decode step would take at that."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from florence2_kserve.benchmark.flops import ModelFlops

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Peak:
    """What a device reached in the simplest programs.

    Attributes:
        flops: Operations a second in a large matrix product.
        bandwidth: Bytes a second in a large copy, read and write counted.
    """

    flops: float
    bandwidth: float


def measure_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Measures a device; takes a second or two."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1536
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copied = torch.ones(2**28 if on_gpu else 2**25, device=device, dtype=torch.float32)
    target = torch.empty_like(copied)
    return Peak(
        flops=2 * side**3 / _best_seconds(lambda: torch.mm(left, right), device),
        bandwidth=2 * 4 * copied.numel() / _best_seconds(lambda: target.copy_(copied), device),
    )


def step_seconds(
    flops: ModelFlops, peak: Peak, *, rows: float, requests: float, tokens: int, position: float, element_bytes: int
) -> float:
    """Returns how long a decode step takes at least: its operations or its bytes, whichever takes longer.

    Args:
        flops: The model's costs.
        peak: The device.
        rows: Beams in flight.
        requests: Requests in flight; their beams share cross-attention keys and values.
        tokens: Encoder tokens of a request.
        position: Tokens decoded so far, on average.
        element_bytes: Bytes of one number.
    """
    operations = rows * flops.decode_step(tokens, position)
    moved = (
        flops.decoder_weight_bytes(element_bytes)
        + requests * flops.cross_kv_bytes(tokens, element_bytes)
        + rows * flops.self_kv_bytes(position, element_bytes)
    )
    return max(operations / peak.flops, moved / peak.bandwidth)


def describe_machine(device: torch.device, dtype: torch.dtype, peak: Peak) -> dict[str, Any]:
    """Returns what a reader must know of the machine to make sense of a timing."""
    model, features = read_cpu()
    machine: dict[str, Any] = {
        "cpu": model,
        "cpu_features": [name for name in _CPU_FEATURES if name in features],
        "threads": torch.get_num_threads(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_gflops": peak.flops / 1e9,
        "peak_gbytes_per_second": peak.bandwidth / 1e9,
    }
    if device.type == "cuda":
        machine |= {
            "card": torch.cuda.get_device_name(device),
            "card_bytes": torch.cuda.get_device_properties(device).total_memory,
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return machine


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(function: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def read_cpu() -> tuple[str, set[str]]:
    """Returns the processor's name and what it can do, in the kernel's words; "" and nothing where it doesn't say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine(), set()
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())
