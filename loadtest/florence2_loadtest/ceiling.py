"""``florence2 loadtest ceiling``: how many requests a second the generator itself can make."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from florence2_kserve.protocol import wire
from florence2_kserve.protocol.public import INPUT_IMAGE, TASK_PROMPT
from florence2_kserve.protocol.tensors import Tensor, bytes_array
from florence2_loadtest.generator import run_closed
from florence2_loadtest.results import Target
from florence2_loadtest.scenario import ClosedLoad
from florence2_loadtest.summary import summarise
from florence2_loadtest.transport import open_transport
from florence2_loadtest.workload import Prepared, Workload, json_body

Protocol = Literal["rest", "grpc"]
_TASK = "<CAPTION>"


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the generator makes of one kind of request.

    Attributes:
        protocol: What is spoken.
        keep_alive: Whether connections are kept.
        size: Bytes of a request's body.
        throughput: Answers a second.
        latency_s: Their mean.
        cpu_share: The generator's share of a processor.
    """

    protocol: Protocol
    keep_alive: bool
    size: int
    throughput: float
    latency_s: float
    cpu_share: float


def ceiling(
    sizes: Annotated[str, typer.Option(help="Bytes of a request's body, several joined by commas.")] = "1000,100000",
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1, max=1000)] = 32,
    seconds: Annotated[float, typer.Option(help="Time for each.", min=0.1, max=60)] = 3.0,
) -> None:
    """Measure the load generator itself: requests a second to a server that answers at once.

    What a service is measured at has to stay well below: `loadtest run` says so where it doesn't.
    """
    try:
        bytes_each = [int(size) for size in sizes.split(",")]
        if not all(0 < size <= 50_000_000 for size in bytes_each):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"has to look like 1000,100000, not {sizes!r}", param_hint="--sizes") from None
    table = Table("protocol", "connections", "body", "requests/s", "mean", "CPU of the generator")
    protocols: Sequence[Protocol] = ("rest", "grpc")
    for protocol in protocols:
        for keep_alive in (True, False):
            for size in bytes_each:
                found = asyncio.run(measure_ceiling(protocol, size, keep_alive, concurrency, seconds))
                kept, cpu = "kept" if keep_alive else "new each", f"{found.cpu_share:.0%}"
                row = (f"{found.size:,} B", f"{found.throughput:.0f}", f"{found.latency_s * 1000:.1f} ms", cpu)
                table.add_row(protocol, kept, *row)
    Console(highlight=False).print(table)


async def measure_ceiling(
    protocol: Protocol, size: int, keep_alive: bool, concurrency: int, seconds: float
) -> Ceiling:
    """Measures the generator against a trivial server in a process of its own.

    Args:
        protocol: What is spoken.
        size: Bytes of a request's body, about.
        keep_alive: Whether connections are kept.
        concurrency: Requests in flight.
        seconds: How long.
    """
    with _canned_server(protocol) as address:
        url = f"{'http' if protocol == 'rest' else 'grpc'}://{address}"
        target = Target(url=url, protocol=protocol, keep_alive=keep_alive, model=None)
        prepared = _prepare(protocol, size)
        load = ClosedLoad(window_s=seconds, max_windows=1, warmup_s=min(0.5, seconds))
        async with open_transport(target, connections=concurrency) as transport:
            measured = await run_closed(transport, Workload([[prepared]], [1.0], 0), load, concurrency, 30.0, 0)
    level = summarise("", measured)
    if level.failed or not level.answered:
        raise RuntimeError(f"the trivial server didn't answer: {level.statuses}")
    share = level.generator.cpu_share
    return Ceiling(protocol, keep_alive, prepared.size, level.throughput, level.latency.mean_s, share)


def _prepare(protocol: Protocol, size: int) -> Prepared:
    if protocol == "rest":
        empty = len(json_body("0", {INPUT_IMAGE: "", TASK_PROMPT: _TASK}, {}))
        body = json_body("0", {INPUT_IMAGE: "A" * max(0, size - empty), TASK_PROMPT: _TASK}, {})
        return Prepared(_TASK, body, {"Content-Type": "application/json"}, len(body))
    tensors = [Tensor(INPUT_IMAGE, bytes_array([b"A" * size])), Tensor(TASK_PROMPT, bytes_array([_TASK.encode()]))]
    body = wire.infer_request("florence2", tensors).SerializeToString()
    return Prepared(_TASK, body, {}, len(body))


@contextmanager
def _canned_server(protocol: Protocol) -> Iterator[str]:
    """Starts the trivial server; yields its address."""
    command = [sys.executable, "-m", "florence2_loadtest.canned_server", protocol]
    # It ends with its standard input, so with this process, however that ends.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError("the trivial server didn't start")
            yield address
        finally:
            process.terminate()
