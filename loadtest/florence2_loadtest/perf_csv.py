"""Levels as the CSV that perf_analyzer writes, for scripts and spreadsheets that read it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from florence2_loadtest.results import Level, ServerSide

_LOAD = {"closed": "Concurrency", "open": "Request Rate"}
_SERVER = (
    "Network+Server Send/Recv",
    "Server Queue",
    "Server Compute Input",
    "Server Compute Infer",
    "Server Compute Output",
)
_PERCENTILES = ("p50 latency", "p90 latency", "p95 latency", "p99 latency")
_VERBOSE = ("Avg latency", "request/response", "response wait")


def write_csv(levels: Sequence[Level], path: Path, *, verbose: bool = False) -> list[Path]:
    """Writes a row for each level, by throughput, with times in whole microseconds.

    As perf_analyzer, it leaves the server's columns out where no server told anything, and writes 0 where it told
    nothing of one level. Percentiles and the average are of the latency from the intended start, the parts of it of
    the time from sending, which is the same in a closed loop.

    Args:
        levels: All closed, or all open. Levels that measure one load for several tasks go into a file for each task,
            as perf_analyzer would be run: ``perf.csv`` becomes ``CAPTION.perf.csv``.
        path: The file.
        verbose: Whether to add what ``--verbose-csv`` adds.

    Returns:
        The files written.

    Raises:
        ValueError: If there is no level, or some are closed and some open.
    """
    modes = {level.mode for level in levels}
    if len(modes) != 1:
        raise ValueError("a CSV of perf_analyzer is of closed levels or of open ones, of at least one")
    path.parent.mkdir(parents=True, exist_ok=True)
    files: dict[Path, list[Level]] = {}
    is_ambiguous = max(Counter(map(_load, levels)).values()) > 1
    for level in levels:
        prefix = f"{'+'.join(task.strip('<>') for task in level.tasks)}." if is_ambiguous and level.tasks else ""
        files.setdefault(path.with_name(prefix + path.name), []).append(level)
    for file, chosen in files.items():
        _write(chosen, file, verbose)
    return list(files)


def _write(levels: Sequence[Level], path: Path, verbose: bool) -> None:
    with_server = any(_phases(level.server) for level in levels)
    header = [_LOAD[levels[0].mode], "Inferences/Second", "Client Send"]
    header += [*(_SERVER if with_server else ()), "Client Recv", *_PERCENTILES, *(_VERBOSE if verbose else ())]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(level) for level in sorted(levels, key=lambda level: level.throughput))


def _row(level: Level) -> dict[str, str | int]:
    latency, wait_s = level.latency, level.service.mean_s - level.send_s - level.receive_s
    phases = _phases(level.server) or (0.0, 0.0, 0.0, 0.0)
    percentiles = (latency.p50_s, latency.p90_s, latency.p95_s, latency.p99_s)
    return {
        _LOAD[level.mode]: f"{_load(level):.6g}",
        "Inferences/Second": f"{level.throughput:.6g}",
        "Client Send": _us(level.send_s),
        # By different clocks: the server's part may exceed the whole by a little.
        **dict(zip(_SERVER, map(_us, (max(0.0, wait_s - sum(phases)), *phases)), strict=True)),
        "Client Recv": _us(level.receive_s),
        **dict(zip(_PERCENTILES, map(_us, percentiles), strict=True)),
        "Avg latency": _us(latency.mean_s),
        "request/response": _us(level.send_s) + _us(level.receive_s),
        "response wait": _us(wait_s),
    }


def _load(level: Level) -> float:
    return (level.concurrency if level.mode == "closed" else level.rate) or 0


def _phases(server: ServerSide | None) -> tuple[float, float, float, float] | None:
    """Returns queue, input, inference and output, if the server told of them."""
    if server is None or server.generate_s is None:
        return None
    return server.queue_s or 0.0, server.preprocess_s or 0.0, server.generate_s, server.postprocess_s or 0.0


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
