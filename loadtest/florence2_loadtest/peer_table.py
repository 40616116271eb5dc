"""Services beside each other on the terminal, and why one of them is slower where that can be known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from florence2_loadtest.console import remarks
from florence2_loadtest.results import Level, PeersResult, ServerSide

_WIDTH = 180  # where there is no terminal to ask
_BUSY = 0.75  # of the time: what keeps a service from more
_SLOWER = 0.98  # of the other's throughput


def show(result: PeersResult) -> None:
    """Prints one table with ratios for each service beside the first, and what to know of it."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    for name, run in result.runs.items():
        console.print(f"{name}: {run.target.note or run.target.model}", markup=False)
        if name != result.baseline:
            console.print(_table(result, name))
            for line in explain(result, name):
                console.print(line, markup=False, soft_wrap=True)
        for line in remarks(run):
            console.print(f"{name}: {line}", markup=False, soft_wrap=True)


def explain(result: PeersResult, name: str) -> list[str]:
    """Returns a line for each load under which a service is slower than the first, with what it waits for."""
    base = {level.name: level for level in result.runs[result.baseline].levels}
    lines = []
    for level in result.runs[name].levels:
        other = base.get(level.name)
        if other is not None and level.throughput < _SLOWER * other.throughput:
            lines.append(f"{level.name}: slower than {result.baseline}: {_reason(level.server)}")
    return lines


def _reason(server: ServerSide | None) -> str:
    """Says what a service spent its time on."""
    if server is None:
        return "its metrics weren't read"
    shares = {
        "the image tower": server.vision_busy_share,
        "the text encoder": server.prefill_busy_share,
        "the decoder": server.decode_busy_share,
    }
    known = {part: share for part, share in shares.items() if share is not None}
    if not known:
        return "its metrics don't say why"
    part = max(known, key=lambda key: known[key])
    busy = ", ".join(f"{name} {share:.0%}" for name, share in known.items())
    if sum(known.values()) < _BUSY:
        return f"the model had nothing to do for {1 - sum(known.values()):.0%} of the time ({busy})"
    rows = f", {server.batch_rows:.0f} rows in a pass" if server.batch_rows and part == "the decoder" else ""
    return f"most of the time went to {part} ({busy}{rows})"


def _table(result: PeersResult, name: str) -> Table:
    base = result.baseline
    table = Table(title=f"{name} ÷ {base}", title_justify="left")
    table.add_column("load", no_wrap=True)
    for what in _FIGURES:
        for column in (f"{what}\n{base}", f"\n{name}", "\nratio"):
            table.add_column(column, justify="right")
    table.add_column("known\npictures", justify="right")
    others = {level.name: level for level in result.runs[base].levels}
    for level in result.runs[name].levels:
        if (other := others.get(level.name)) is not None:
            cells = [cell for what in _FIGURES for cell in _compared(what, level, other)]
            table.add_row(level.name, *cells, _known(level.server))
    return table


def _compared(what: str, level: Level, other: Level) -> tuple[str, str, str]:
    """Returns the other's figure, the level's, and their ratio."""
    figure, suffix = _FIGURES[what]
    one, two = figure(level), figure(other)
    return f"{two:.3g}{suffix}", f"{one:.3g}{suffix}", f"{one / two:.2f}" if two else "–"


_FIGURES: Mapping[str, tuple[Callable[[Level], float], str]] = {
    "answers/s": (lambda level: level.throughput, ""),
    "mean": (lambda level: level.latency.mean_s, " s"),
    "p95": (lambda level: level.latency.p95_s, " s"),
}


def _known(server: ServerSide | None) -> str:
    """Returns the share of pictures whose features were in the cache."""
    return "–" if server is None or server.cache_hits_share is None else f"{server.cache_hits_share:.0%}"
