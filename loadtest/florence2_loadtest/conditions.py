"""What a comparison may fail by: ``p95>+10%``, ``throughput<-5%``, ``failed>0``, ``OD.p95>2s``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from florence2_kserve.tasks import find_task
from florence2_loadtest.results import Level, ServerSide, TaskResult, Times

EACH_TASK = "*"
Figures = Mapping[str, float | None]
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
)
_STATISTICS: Mapping[str, str] = MappingProxyType(
    {name: f"{name.replace('.', '')}_s" for name in ("mean", "min", "p50", "p90", "p95", "p99", "p99.9", "max")}
)
_COUNTS = ("planned", "sent", "answered", "failed", "unsent", "retried")
_RATES = ("throughput", "goodput")
_SERVER = "server."
_NOT_FIGURES = {"sources", "counters", "problems"}
# What an unsigned number may be followed by, and what that is in the unit of results.
_UNITS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "seconds": {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0},
        "rate": {"/s": 1.0, "": 1.0},
        "share": {"%": 0.01, "": 1.0},
        "count": {"": 1.0},
    }
)
_FORM = re.compile(
    r"\s*(?:(?P<task><?[A-Z_]+>?|\*)\.)?(?P<name>[a-z][a-z0-9_.]*)\s*(?P<operator>[<>]=?)"
    r"\s*(?P<sign>[+-]?)(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-zµ%/]*)\s*"
)


def level_figures(level: Level) -> dict[str, float | None]:
    """Returns all that a level says in numbers, by the names that conditions use; None where it says nothing."""
    figures: dict[str, float | None] = {name: getattr(level, name) for name in (*_RATES, *_COUNTS)}
    figures |= _statistics(level.latency)
    for name in ("service", "slip"):
        figures |= {f"{name}.{statistic}": value for statistic, value in _statistics(getattr(level, name)).items()}
    server = level.server or ServerSide()
    for name, value in server.model_dump(exclude=_NOT_FIGURES).items():
        figures[_SERVER + (name if name.endswith("_per_s") else name.removesuffix("_s"))] = value
    return figures


def task_figures(result: TaskResult | None) -> dict[str, float | None]:
    """Returns the same of one task; of one that nothing was asked of, that nothing is known."""
    if result is None or not result.answered + result.failed:
        return dict.fromkeys((*_RATES, "answered", "failed", *_STATISTICS))
    counts = {name: getattr(result, name) for name in (*_RATES, "answered", "failed")}
    return counts | _statistics(result.latency)


def kind_of(name: str) -> str:
    """Returns what a figure is: ``seconds``, ``rate``, ``share`` or ``count``."""
    if name in _RATES or name.endswith("_per_s"):
        return "rate"
    if name.endswith("_share"):
        return "share"
    is_servers = f"{name.removeprefix(_SERVER)}_s" in ServerSide.model_fields
    return "seconds" if is_servers or name.removeprefix("service.").removeprefix("slip.") in _STATISTICS else "count"


def relative_change(a: float, b: float) -> float:
    """Returns by which share of `a` it has changed; infinite from 0 to anything else."""
    return (b - a) / abs(a) if a else (0.0 if not b else float("inf") * (1 if b > 0 else -1))


@dataclass(frozen=True, slots=True)
class Condition:
    """A limit that a figure is beyond, or its change from A to B.

    Attributes:
        text: As it was given.
        task: A task prompt, `EACH_TASK`, or None for the level as a whole.
        name: The figure's, as in `level_figures`.
        operator: ``>``, ``>=``, ``<`` or ``<=``.
        limit: What it is compared with.
        of: ``value`` of B, ``change`` from A to B, or ``relative`` change.
    """

    text: str
    task: str | None
    name: str
    operator: str
    limit: float
    of: str

    def holds(self, a: float | None, b: float | None) -> bool | None:
        """Whether it holds; None if that can't be known.

        What B can't tell though A could, as latencies where nothing is answered any more, holds: it must not pass.
        """
        if b is None:
            return None if a is None else True
        if self.of == "value":
            return _OPERATORS[self.operator](b, self.limit)
        if a is None:
            return None
        return _OPERATORS[self.operator](b - a if self.of == "change" else relative_change(a, b), self.limit)


def parse_condition(text: str) -> Condition:
    """Reads a condition.

    A sign makes it one on the change from A to B, of so many per cent or of so much: ``p95>+10%``, ``p95>+200ms``,
    ``failed>+0``. Without it, it is on B alone: ``p95>2s``, ``server.cache_hits_share<90%``. A task's name in front
    of it, or ``*`` for each, makes it one on that task.

    Raises:
        ValueError: If it isn't of that form, or there is no such figure, task or unit.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise ValueError(f"a condition looks like p95>+10%, throughput<-5%, failed>0 or OD.p95>2s, not {text!r}")
    task = form["task"]
    if task not in (None, EACH_TASK):
        try:
            task = find_task(task).name
        except KeyError as error:
            raise ValueError(f"{text}: {error.args[0]}") from None
    known = LEVEL_FIGURES if task is None else TASK_FIGURES
    name = form["name"] if form["name"] in known else _SERVER + form["name"]
    if name not in known:
        raise ValueError(f"{text}: there is no figure {form['name']}; there are {', '.join(known)}")
    number, unit, sign = float(form["number"]), form["unit"], form["sign"]
    if sign and unit == "%":
        return Condition(text, task, name, form["operator"], float(f"{sign}{number / 100}"), "relative")
    units = _UNITS[kind_of(name)]
    if unit == "%" and "%" not in units:
        raise ValueError(f"{text}: say whether it grows or falls by so many per cent: +{number:g}% or -{number:g}%")
    if unit not in units and not (unit == "" and number == 0):
        raise ValueError(f"{text}: {form['name']} takes {' or '.join(unit or 'no unit' for unit in units)}")
    limit = float(f"{sign}{number * units.get(unit, 1.0)}")
    return Condition(text, task, name, form["operator"], limit, "change" if sign else "value")


def _statistics(times: Times) -> dict[str, float | None]:
    return {name: getattr(times, field) if times.count else None for name, field in _STATISTICS.items()}


LEVEL_FIGURES = tuple(level_figures(Level(name="", mode="closed")))
TASK_FIGURES = tuple(task_figures(None))
