"""Samples for people: a table of what changed when, and all of them as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from florence2_loadtest.results import AutoscaleResult, Sample

COLUMNS = ("ready", "pending", "terminating", "desired", "activator_in_path", "panicking")
_TITLES = ("ready", "pend", "term", "want", "act", "panic")
_COUNTS = ("sent", "answered", "failed")
_UNKNOWN = "-"


def changes(result: AutoscaleResult) -> str:
    """Returns the samples in which something but the counts of requests so far changed, as a table with notes."""
    components = _components(result.samples)
    asked = [column for column in COLUMNS if any(_cells([s], components, column) for s in result.samples)]
    titles = [_TITLES[COLUMNS.index(column)] for column in asked]
    heads = ["second", *(title for _ in components for title in titles), "sent", "ok", "failed", "note"]
    groups = "".join(name.ljust(sum(len(title) + 2 for title in titles)) for name in components)
    lines = [" " * 8 + groups.rstrip(), "  ".join(heads)]
    last: list[Any] | None = None
    for index, (sample, counts) in enumerate(zip(result.samples, _counts(result), strict=True)):
        until = result.samples[index + 1].second if index + 1 < len(result.samples) else float("inf")
        begin = sample.second if index else float("-inf")
        notes = [text for second, text in result.notes if begin <= second < until]
        state = [sample.components.get(name, {}).get(column) for name in components for column in asked]
        if state != last or notes:
            cells = [str(round(sample.second)), *map(_shown, state), *map(str, counts)]
            lines.append("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads[:-1], strict=True)))
            lines[-1] = f"{lines[-1]}  {'; '.join(notes)}".rstrip()
        last = state
    return "\n".join(lines)


def write_csv(result: AutoscaleResult, path: Path) -> None:
    """Writes all samples, a line each, with the counts of requests so far; what isn't known is empty."""
    components = _components(result.samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["second", *(f"{n}_{c}" for n in components for c in COLUMNS), *_COUNTS])
        for sample, counts in zip(result.samples, _counts(result), strict=True):
            state = [sample.components.get(name, {}).get(column) for name in components for column in COLUMNS]
            values = ["" if value is None else f"{value:g}" for value in state]
            writer.writerow([f"{sample.second:.3f}", *values, *counts])


def findings_text(findings: dict[str, Any]) -> str:
    """Returns findings as lines of name and value."""
    return "\n".join(f"{name:34} {value}" for name, value in _flat(findings))


def _counts(result: AutoscaleResult) -> Iterator[list[int]]:
    """Yields, for each sample, how many requests were sent, answered and failed by then, to half a second."""
    sums, index, rows = dict.fromkeys(_COUNTS, 0), 0, result.level.per_second
    for sample in result.samples:
        while index < len(rows) and rows[index]["second"] + 0.5 <= sample.second:
            for key in _COUNTS:
                sums[key] += rows[index].get(key, 0)
            index += 1
        yield list(sums.values())


def _flat(findings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in findings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], dict)):  # steps stand in the table
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _UNKNOWN if value is None or value == [] else ", ".join(value) if isinstance(value, list) else str(value)


def _components(samples: Sequence[Sample]) -> list[str]:
    return list(dict.fromkeys(name for sample in samples for name in sample.components))


def _cells(samples: Sequence[Sample], components: Sequence[str], column: str) -> list[float]:
    values = (sample.components.get(name, {}).get(column) for sample in samples for name in components)
    return [value for value in values if value is not None]


def _shown(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:g}"
