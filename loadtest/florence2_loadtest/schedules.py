"""When requests of an open loop are to be sent, made beforehand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from florence2_loadtest.traces import read_trace

_MOST_STARTS = 2_000_000
_LONGEST_S = 24 * 3600.0
_KINDS = ("constant", "poisson", "ramp", "steps", "spike", "replay")
_RATE = r"(\d+(?:\.\d+)?)"
_PART = re.compile(rf"{_RATE}(?:-{_RATE})?/(s|min)\s*,\s*{_RATE}(ms|s|min|h)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_FORMS = (
    "constant:50/s,60s, poisson:50/s,60s, ramp:0-100/s,60s, steps:10/s,30s;50/s,30s, "
    "spike:5/s,20s;100/s,5s;5/s,20s or replay:FILE"
)

Starts = npt.NDArray[np.float64]


class RatePart(NamedTuple):
    """A part of a schedule, and what it plans.

    Attributes:
        begin_s: Seconds from the schedule's beginning.
        first_rate: Requests a second, as it begins.
        last_rate: As it ends; another one of a ramp alone.
    """

    begin_s: float
    first_rate: float
    last_rate: float


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """When requests are to be sent.

    Attributes:
        name: As it was asked for.
        starts: float64 [N], seconds from the beginning, ascending.
        seconds: How long it lasts.
        parts: In their order; empty of a trace, whose rate nobody planned.
    """

    name: str
    starts: Starts
    seconds: float
    parts: tuple[RatePart, ...] = ()

    @property
    def rate(self) -> float:
        """Mean of planned requests a second."""
        return len(self.starts) / self.seconds

    @property
    def rises(self) -> list[tuple[float, float]]:
        """When the planned rate rises, the first request included, and to how much; a ramp from its beginning on."""
        rises, before = [], 0.0
        for part in self.parts:
            most = max(part.first_rate, part.last_rate)
            if most > before and not math.isclose(most, before):  # 60/min is 1/s
                rises.append((part.begin_s, most))
            before = part.last_rate
        return rises


@dataclass(frozen=True, slots=True)
class _Part:
    kind: str
    first_rate: float
    last_rate: float
    seconds: float


def parse_schedule(text: str, seed: int) -> Schedule:
    """Makes a schedule of its description.

    ``constant:50/s,60s`` sends at equal distances, ``poisson:50/s,60s`` at random, as independent users do,
    ``ramp:0-100/s,60s`` ever faster. ``steps:`` and ``spike:`` are parts joined by ``;``, of which each may name a
    kind of its own, ``spike:poisson:5/s,20s;100/s,5s``; else it is of the kind before it, at first and behind a ramp
    constant.
    ``0/s,30s`` is a pause. ``replay:FILE`` repeats a trace (see `florence2_loadtest.traces`).

    Args:
        text: The description.
        seed: Of what is random in it.

    Raises:
        ValueError: If it can't be read; says which part and what was expected.
    """
    kind, colon, rest = text.strip().partition(":")
    if not colon or kind not in _KINDS:
        raise ValueError(f"a schedule looks like {_FORMS}, not {text!r}")
    if kind == "replay":
        return _replay(text, Path(rest))
    parts = _parts(text, rest, kind)
    random = np.random.default_rng(seed)
    starts, rates, begin = [], [], 0.0
    for part in parts:
        starts.append(begin + _MAKERS[part.kind](part, random))
        rates.append(RatePart(begin, part.first_rate, part.last_rate))
        begin += part.seconds
    return Schedule(text.strip(), np.concatenate(starts), begin, tuple(rates))


def _parts(text: str, rest: str, kind: str) -> list[_Part]:
    kind = "constant" if kind in ("steps", "spike") else kind
    parts: list[_Part] = []
    for piece in rest.split(";"):
        name, colon, values = piece.strip().rpartition(":")
        if colon:
            kind = name.strip()
        form = _PART.fullmatch(values.strip())
        if kind == "ramp" and not colon and parts:  # behind a ramp it goes on steadily
            kind = "constant"
        if form is None or kind not in _MAKERS or (form[2] is not None) is not (kind == "ramp"):
            expected = "ramp:0-100/s,60s" if kind == "ramp" else "50/s,60s, perhaps behind constant: or poisson:"
            raise ValueError(f"schedule {text!r}: {piece.strip()!r} has to look like {expected}")
        scale, seconds = 1 / _SECONDS[form[3]], float(form[4]) * _SECONDS[form[5]]
        first = float(form[1]) * scale
        parts.append(_Part(kind, first, float(form[2]) * scale if form[2] else first, seconds))
    total = sum(part.seconds for part in parts)
    planned = sum((part.first_rate + part.last_rate) / 2 * part.seconds for part in parts)
    if not 0 < total <= _LONGEST_S or planned > _MOST_STARTS:
        raise ValueError(
            f"schedule {text!r}: {planned:.0f} requests in {total:g} s; it may have {_MOST_STARTS} in {_LONGEST_S:g} s"
        )
    return parts


def _constant(part: _Part, random: np.random.Generator) -> Starts:
    count = round(part.first_rate * part.seconds)
    return np.arange(count) / part.first_rate if count else np.empty(0)


def _poisson(part: _Part, random: np.random.Generator) -> Starts:
    # Given their number, the events of a Poisson process lie uniformly.
    return np.sort(random.uniform(0, part.seconds, random.poisson(part.first_rate * part.seconds)))


def _ramp(part: _Part, random: np.random.Generator) -> Starts:
    """Sends the k-th request when the integral of the rate, first·t + slope·t²/2, reaches k."""
    count = round((part.first_rate + part.last_rate) / 2 * part.seconds)
    slope = (part.last_rate - part.first_rate) / part.seconds
    k = np.arange(count, dtype=np.float64)
    if slope == 0:
        return _constant(part, random)
    root = np.sqrt(np.maximum(part.first_rate**2 + 2 * slope * k, 0.0))
    return np.minimum((root - part.first_rate) / slope, part.seconds)


_MAKERS: dict[str, Callable[[_Part, np.random.Generator], Any]] = {
    "constant": _constant,
    "poisson": _poisson,
    "ramp": _ramp,
}


def _replay(text: str, path: Path) -> Schedule:
    starts = read_trace(path)
    if len(starts) > _MOST_STARTS:
        raise ValueError(f"{path}: {len(starts)} requests; at most {_MOST_STARTS} are replayed")
    seconds = float(starts[-1])
    if seconds > _LONGEST_S:
        raise ValueError(f"{path}: lasts {seconds:g} s; at most {_LONGEST_S:g} s are replayed")
    # The last request's second is part of the schedule: a trace says nothing of when it ended.
    return Schedule(text.strip(), starts, max(1.0, float(np.ceil(seconds + 1e-9))))
