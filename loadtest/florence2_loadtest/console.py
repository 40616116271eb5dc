"""A run's figures on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from florence2_loadtest.results import Level, RunResult, Times

_WIDTH = 160  # where there is no terminal to ask
_TIMES = ("mean", "p50", "p95", "p99", "max")


def show(result: RunResult) -> None:
    """Prints a table of the levels, one of their tasks where there are several, and what to know of them."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    levels = result.levels
    has_slo = any(task.slo for level in levels for task in level.tasks.values())
    table = Table("load", "answers/s", *(("goodput/s",) if has_slo else ()), *_TIMES, "failed", "unsent", "reliable")
    for level in levels:
        goodput = ("–" if level.goodput is None else f"{level.goodput:.2f}",) if has_slo else ()
        counts = (str(level.failed), str(level.unsent))
        table.add_row(
            level.name, f"{level.throughput:.2f}", *goodput, *_times(level.latency), *counts, _reliable(level)
        )
    console.print(table)
    if any(len(level.tasks) > 1 for level in levels) or has_slo:
        console.print(_tasks(levels, has_slo))
    for line in remarks(result):
        console.print(line, markup=False, soft_wrap=True)


def remarks(result: RunResult) -> list[str]:
    """Returns what a reader of the figures has to know, a line each."""
    lines = []
    for level in result.levels:
        refusals = {status: count for status, count in level.statuses.items() if status != "ok"}
        if refusals:
            told = ", ".join(f"{count} × {status}" for status, count in refusals.items())
            lines.append(f"{level.name}: of {level.planned} requests {told}")
        if level.stable is False:
            lines.append(f"{level.name}: the last windows didn't agree, or held too few answers: measure for longer")
        if level.generator.bottleneck:
            lines.append(f"{level.name}: the load generator was the bottleneck: {level.generator.bottleneck}")
        if level.held_back:
            lines.append(
                f"{level.name}: {level.held_back} requests waited for others to be answered: as many as allowed were "
                "in flight, more than the service keeps up with or max_in_flight too low"
            )
        for task, of in level.tasks.items():
            if of.slo and not of.answered:
                asked = (
                    f"none of its {of.failed} requests was answered" if of.failed else "none of its requests was over"
                )
                lines.append(f"{level.name}: {task} misses its SLO: {asked}")
        if level.server and (share := level.server.cache_hits_share):
            lines.append(f"{level.name}: {share:.0%} of pictures were known to the predictor (feature cache)")
    return lines


def _tasks(levels: list[Level], has_slo: bool) -> Table:
    table = Table("load", "task", "answers/s", *_TIMES, "failed", *(("SLO",) if has_slo else ()))
    for level in levels:
        for task, of in sorted(level.tasks.items()):
            slo = (f"{of.slo} {'met' if of.slo_met else 'MISSED'}" if of.slo else "–",) if has_slo else ()
            table.add_row(level.name, task, f"{of.throughput:.2f}", *_times(of.latency), str(of.failed), *slo)
    return table


def _times(times: Times) -> list[str]:
    if not times.count:
        return ["–"] * len(_TIMES)
    return [f"{value:.3f} s" for value in (times.mean_s, times.p50_s, times.p95_s, times.p99_s, times.max_s)]


def _reliable(level: Level) -> str:
    """Whether the figures can be relied on."""
    return "no" if level.generator.bottleneck or level.stable is False else "yes"
