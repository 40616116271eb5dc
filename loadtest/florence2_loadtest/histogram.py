"""Distributions of times by HdrHistogram: three significant digits, from a microsecond to an hour."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hdrh.histogram import HdrHistogram

from florence2_loadtest.results import Times

_MICROSECONDS = 1e6
_LONGEST_US = 3_600_000_000
_DIGITS = 3


# As dense as each part of the distribution needs it.
_CURVE = [
    *(float(step) for step in range(0, 90, 5)),
    *(90.0 + step for step in range(9)),
    *(round(99.0 + step / 10, 1) for step in range(9)),
    *(round(99.9 + step / 100, 2) for step in range(9)),
    *(round(99.99 + step / 1000, 3) for step in range(10)),
]
_NAMED = {"p50_s": 50.0, "p90_s": 90.0, "p95_s": 95.0, "p99_s": 99.0, "p999_s": 99.9}


def measure_times(seconds: Iterable[float]) -> Times:
    """Returns the distribution of `seconds`.

    Percentiles come from the histogram, hence within a thousandth, and are the smallest value that so many of a
    hundred don't exceed; mean, deviation, least and most are exact. Negative times count as none.
    """
    values = [max(0.0, value) for value in seconds]
    if not values:
        return Times()
    histogram = HdrHistogram(1, _LONGEST_US, _DIGITS)
    for value in values:
        histogram.record_value(min(_LONGEST_US, max(1, round(value * _MICROSECONDS))))
    # The library rounds to the nearest rank, which of few values leaves out the last: asked for is the next higher.
    count, mean = len(values), math.fsum(values) / len(values)
    ranks = {step: math.ceil(step * count / 100 - 1e-9) * 100 / count for step in (*_CURVE, *_NAMED.values())}
    at = histogram.get_percentile_to_value_dict(list(ranks.values()))
    least, most = min(values), max(values)
    # A bucket's bound may lie beyond all that is in it.
    found = {step: min(most, max(least, at[rank] / _MICROSECONDS)) for step, rank in ranks.items()}
    # Percentiles that so few values can't tell apart are left out of the curve.
    told = [step for step in _CURVE if (100.0 - step) * count >= 100.0]
    return Times(
        count=count,
        mean_s=mean,
        stdev_s=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / count),
        min_s=least,
        max_s=most,
        curve=[(step, found[step]) for step in told] + [(100.0, most)],
        **{name: found[percentile] for name, percentile in _NAMED.items()},
    )
