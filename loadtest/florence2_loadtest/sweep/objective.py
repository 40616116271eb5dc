"""What a configuration is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from florence2_loadtest.results import Level, Trial
from florence2_loadtest.slo import Slo

RATES = ("throughput", "goodput")
LATENCIES = ("mean", "p50", "p90", "p95", "p99")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A configuration's worth.

    Attributes:
        score: The objective's value.
        admissible: Whether it keeps the constraint and answers everything.
        excess: How far it is from admissible, for the search: above 0 if it isn't.
        level: Where the score was measured.
    """

    score: float
    admissible: bool
    excess: float
    level: Level


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to be best, and what must be kept.

    Of several levels a rate is the best one's among those that are admissible, since a server need not be loaded
    further than that; a latency is the worst one's, and all of them have to be admissible. A level isn't if a request
    of it failed or was never sent, or if the load generator set its figures.

    Attributes:
        name: ``throughput``, ``goodput``, or a latency: ``mean``, ``p50``, ``p90``, ``p95``, ``p99``.
        constraint: A limit on the latency.
    """

    name: str
    constraint: Slo | None = None

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Which way is better."""
        return "maximize" if self.name in RATES else "minimize"

    def judge(self, levels: Sequence[Level]) -> Verdict:
        """Judges levels, at least one of which has answers.

        Raises:
            ValueError: If there are none.
        """
        verdicts = [self._of_level(level) for level in levels if level.answered]
        if not verdicts:
            raise ValueError("nothing was answered")
        if self.direction == "minimize":
            worst = max(verdicts, key=lambda verdict: verdict.score)
            admissible = len(verdicts) == len(levels) and all(verdict.admissible for verdict in verdicts)
            return Verdict(worst.score, admissible, max(verdict.excess for verdict in verdicts), worst.level)
        allowed = [verdict for verdict in verdicts if verdict.admissible]
        return max(allowed or verdicts, key=lambda verdict: (verdict.score, -verdict.excess))

    def rank(self, trials: Sequence[Trial]) -> list[Trial]:
        """Returns the trials that were measured, best first, admissible ones before the others."""
        sign = -1 if self.direction == "maximize" else 1
        done = [trial for trial in trials if trial.score is not None]
        return sorted(done, key=lambda trial: (not trial.admissible, sign * (trial.score or 0.0), trial.number))

    def _of_level(self, level: Level) -> Verdict:
        lost = (level.failed + level.unsent) / max(1, level.answered + level.failed + level.unsent)
        limit = self.constraint
        too_slow = 0.0 if limit is None else _statistic(level, limit.statistic) / limit.limit_s - 1
        limited = level.generator.bottleneck is not None
        admissible = lost == 0 and not limited and (limit is None or limit.is_met(level.latency))
        if self.name in RATES:
            score = level.throughput if self.name == "throughput" else level.goodput or 0.0
        else:
            score = _statistic(level, self.name)
        return Verdict(score, admissible, max(too_slow, 0.0) + lost + limited, level)


def read_objective(name: str, constraint: Slo | None) -> Objective:
    """Returns the objective called `name`.

    Raises:
        ValueError: If there is none.
    """
    if name not in (*RATES, *LATENCIES):
        raise ValueError(f"the objective is one of {', '.join((*RATES, *LATENCIES))}, not {name!r}")
    return Objective(name, constraint)


def _statistic(level: Level, name: str) -> float:
    return float(getattr(level.latency, f"{name.replace('.', '')}_s"))
