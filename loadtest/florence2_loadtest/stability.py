"""When a closed loop has been measured long enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

from florence2_loadtest.results import Window


def fewest_answers(concurrency: int, tolerance: float) -> int:
    """Returns how many answers a window must hold to be judged.

    As many as there are clients, so that each has been through about one whole request, and so many that one answer
    more or less doesn't move the throughput by more than the tolerance.
    """
    return max(concurrency, math.ceil(1 / tolerance))


def is_stable(windows: Sequence[Window], *, stable_windows: int, tolerance: float, fewest: int) -> bool:
    """Whether the last windows agree.

    Args:
        windows: All windows so far, in order.
        stable_windows: How many of them have to agree.
        tolerance: How far each may lie from their mean, in throughput and in mean latency.
        fewest: Answers that each must hold; windows of fewer agree or not by chance.
    """
    last = windows[-stable_windows:]
    if len(last) < stable_windows or any(round(w.throughput * w.seconds) < fewest for w in last):
        return False
    return _agree([w.throughput for w in last], tolerance) and _agree([w.latency_s for w in last], tolerance)


def _agree(values: Sequence[float], tolerance: float) -> bool:
    mean = math.fsum(values) / len(values)
    return all(abs(value - mean) <= tolerance * mean for value in values)
