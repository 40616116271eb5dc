"""A limit that a task's answers are to keep: ``p95<2s``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from florence2_loadtest.results import Times

_FIELDS = {
    "mean": "mean_s",
    "min": "min_s",
    "p50": "p50_s",
    "p90": "p90_s",
    "p95": "p95_s",
    "p99": "p99_s",
    "p99.9": "p999_s",
    "max": "max_s",
}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_FORM = re.compile(r"\s*([a-z]+[\d.]*)\s*<\s*(\d+(?:\.\d+)?)\s*([a-zµ]+)\s*")


@dataclass(frozen=True, slots=True)
class Slo:
    """A limit on a statistic of the latency.

    Attributes:
        statistic: ``mean``, ``min``, ``p50``, ``p90``, ``p95``, ``p99``, ``p99.9`` or ``max``.
        limit_s: What it has to stay below.
    """

    statistic: str
    limit_s: float

    def is_met(self, times: Times) -> bool:
        """Whether a distribution keeps it; one of nothing doesn't."""
        return times.count > 0 and float(getattr(times, _FIELDS[self.statistic])) < self.limit_s

    def meets(self, seconds: float) -> bool:
        """Whether a single answer is within the limit, as goodput counts them."""
        return seconds < self.limit_s


def parse_slo(text: str) -> Slo:
    """Reads ``p95<2s``, ``p99<800ms``, ``mean<1.5s``.

    Raises:
        ValueError: If it isn't of that form.
    """
    form = _FORM.fullmatch(text)
    if form is None or form[1] not in _FIELDS or form[3] not in _SECONDS:
        raise ValueError(f"an SLO looks like p95<2s (one of {', '.join(_FIELDS)}; ms, s or min), not {text!r}")
    return Slo(form[1], float(form[2]) * _SECONDS[form[3]])
