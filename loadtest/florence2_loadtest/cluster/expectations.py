"""What is expected of a run: ``first_answer<60s``, ``predictor.most_ready>=2``."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from florence2_loadtest.cluster.service import COMPONENTS

# Findings that are one number: those of the whole, and those of each component.
NUMBERS = (
    "sent_share", "failures", "first_answer_s", "held", "held_longest_s", "panics", "back_s", "gone_s", "enough_s",
)  # fmt: skip
COMPONENT_NUMBERS = (
    "most_ready", "most_desired", "pods_created", "enough_s", "panics", "replica_s", "surplus_replica_s",
    "surplus_share", "activator_s", "back_s", "gone_s",
)  # fmt: skip

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "%": 0.01}
_FORM = re.compile(r"\s*([a-z_.]+)\s*(<=|>=|==|<|>)\s*(\d+(?:\.\d+)?)\s*([a-z%]*)\s*")


@dataclass(frozen=True, slots=True)
class Expectation:
    """A bound on one finding.

    Attributes:
        text: As it was given.
        path: Where the finding is, from the outside in.
        relation: ``<``, ``<=``, ``>``, ``>=`` or ``==``.
        bound: In the finding's unit.
    """

    text: str
    path: tuple[str, ...]
    relation: str
    bound: float

    def problem(self, findings: Mapping[str, Any]) -> str | None:
        """Returns what is wrong, or None where it is met."""
        value: Any = findings
        for step in self.path:
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is None:
            return f"{self.text}: it wasn't seen"
        return None if _COMPARE[self.relation](value, self.bound) else f"{self.text}: it is {value:.6g}"


def parse_expectation(text: str) -> Expectation:
    """Reads ``NAME<VALUE``; names are those of findings, without ``_s`` if one likes, values may have a unit.

    Raises:
        ValueError: If it isn't of that form or names no finding.
    """
    form = _FORM.fullmatch(text)
    if form is None or form[4] not in _UNITS:
        raise ValueError(f"an expectation looks like first_answer<60s or predictor.most_ready>=2, not {text!r}")
    outer, dot, inner = form[1].rpartition(".")
    names = COMPONENT_NUMBERS if dot else NUMBERS
    name = next((name for name in (inner, f"{inner}_s") if name in names), None)
    if name is None or (dot and outer not in COMPONENTS):
        known = ", ".join([*NUMBERS, *(f"COMPONENT.{name}" for name in COMPONENT_NUMBERS)])
        raise ValueError(f"{form[1]!r} is no finding that is a number; those are {known}")
    return Expectation(text.strip(), (outer, name) if dot else (name,), form[2], float(form[3]) * _UNITS[form[4]])


def parse_replicas(text: str) -> Expectation:
    """Reads ``predictor>=2``: how many replicas have to be ready at a time, at least once.

    Raises:
        ValueError: If it isn't of that form.
    """
    form = _FORM.fullmatch(text)
    if form is None or form[1] not in COMPONENTS or form[4]:
        raise ValueError(f"expected replicas look like predictor>=2, not {text!r}")
    return Expectation(text.strip(), (form[1], "most_ready"), form[2], float(form[3]))


def problems(expectations: Sequence[Expectation], findings: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong, in a line each."""
    return [problem for expectation in expectations if (problem := expectation.problem(findings)) is not None]
