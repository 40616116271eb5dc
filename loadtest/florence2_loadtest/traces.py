"""Traces of requests that came to some service once, to be replayed.

A trace has a request a line: JSON objects (JSONL), or CSV with a header or of times alone. Its time is in
seconds, or a date of ISO 8601, under the first of `NAMES` that is there; the records that our own runs write
are traces too. Order doesn't matter, and only distances do.
"""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

NAMES = ("planned_s", "time", "timestamp", "start", "t")


def read_trace(path: Path) -> npt.NDArray[np.float64]:
    """Reads the times of a trace.

    Returns:
        float64 [N], seconds from the first request on, ascending.

    Raises:
        ValueError: If it can't be read; names the file and the line.
    """
    try:
        lines = [(number, line) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text") from None
    if not lines:
        raise ValueError(f"{path}: there is no request in it")
    times = _of_json(path, lines) if lines[0][1].lstrip().startswith("{") else _of_csv(path, lines)
    if not times:
        raise ValueError(f"{path}: there is no request in it")
    starts = np.sort(np.array(times, dtype=np.float64))
    if not np.isfinite(starts).all():
        raise ValueError(f"{path}: a time isn't finite")
    return starts - starts[0]


def _of_json(path: Path, lines: list[tuple[int, str]]) -> list[float]:
    times = []
    for number, line in lines:
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        name = next((name for name in NAMES if isinstance(entry, dict) and name in entry), None)
        if name is None:
            raise ValueError(f"{path}, line {number}: none of {', '.join(NAMES)} is there")
        times.append(_seconds(path, number, entry[name]))
    return times


def _of_csv(path: Path, lines: list[tuple[int, str]]) -> list[float]:
    rows = list(csv.reader(line for _, line in lines))
    column, first = 0, 0
    if named := [name for name in NAMES if name in (cell.strip() for cell in rows[0])]:
        column, first = [cell.strip() for cell in rows[0]].index(named[0]), 1
    return [
        _seconds(path, number, row[column] if column < len(row) else "")
        for (number, _), row in zip(lines[first:], rows[first:], strict=True)
    ]


def _seconds(path: Path, number: int, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        date = datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise ValueError(f"{path}, line {number}: {str(value)[:60]!r} is no time") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
