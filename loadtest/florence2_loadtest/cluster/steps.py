"""Steps of a load that nobody planned: those of a trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from florence2_loadtest.results import Record

Counts = npt.NDArray[np.intp]  # of planned requests, by the second

# On either side of a step: seconds to tell it from chance; for where it is, and its rate.
_LOOK_S, _RATE_S = 10, 5
_STEP, _SIGMAS = 1.5, 4.0  # how much more has to be planned behind it, relatively and in deviations of a random rate


def detect_steps(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Returns when the planned rate went up for good, and to how many requests a second; the first one included."""
    if not records:
        return []
    planned = np.bincount([math.floor(record.planned_s) for record in records])
    first = int(np.flatnonzero(planned)[0])
    rises = [second for second in range(first + 1, len(planned)) if _is_rise(planned, first, second)]
    sharpest: list[int] = []
    # Around a rise many seconds look like one: it is where the least time tells it best.
    for second in sorted(rises, key=lambda second: -_rise(planned, first, second)):
        if all(abs(second - other) > _LOOK_S for other in sharpest):
            sharpest.append(second)
    sharpest.sort()
    begins = [first, *sharpest, len(planned)]
    return [
        (float(begin), float(planned[begin : min(end, begin + _RATE_S)].mean())) for begin, end in pairwise(begins)
    ]


def _is_rise(planned: Counts, first: int, second: int) -> bool:
    earlier, later = planned[max(first, second - _LOOK_S) : second], planned[second : second + _LOOK_S]
    before, after = float(earlier.mean()), float(later.mean())
    noise = _SIGMAS * math.sqrt(before / len(earlier) + after / len(later))
    return after >= _STEP * before and after - before >= noise


def _rise(planned: Counts, first: int, second: int) -> float:
    earlier, later = planned[max(first, second - _RATE_S) : second], planned[second : second + _RATE_S]
    return float(later.mean() - earlier.mean())
