"""Whether the best is better, or was lucky."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from florence2_loadtest.results import Trial
from florence2_loadtest.slo import parse_slo
from florence2_loadtest.sweep.confirmation import Decision, decide, to_confirm
from florence2_loadtest.sweep.loop import judge
from florence2_loadtest.sweep.objective import Objective, read_objective
from tests.loadtest.sweep.trials import level

NAMES = ["max_batch_size"]
THROUGHPUT = read_objective("throughput", None)


def sweep_of(
    searched: Sequence[float | None], again: Sequence[tuple[int, float | None]] = (), objective: Objective = THROUGHPUT
) -> list[Trial]:
    """Returns trials by throughput, latency being its inverse: the defaults at both ends, then those that confirm."""
    trials: list[Trial] = []
    last = len(searched) - 1
    for confirms, place, score in [
        *((None, place, score) for place, score in enumerate(searched)),
        *((place, place, score) for place, score in again),
    ]:
        given: dict[str, Any] = {"number": len(trials), "confirms": confirms}
        given["settings"] = {} if place in (0, last) else {"max_batch_size": place}
        given |= {"state": "failed", "error": "no"} if score is None else {"levels": [level(score, 10 / score)]}
        trial = Trial.model_validate(given)
        judge(trial, objective)
        trials.append(trial)
    return trials


def decided(*given: Any, objective: Objective = THROUGHPUT) -> Decision:
    return decide(sweep_of(*given, objective=objective), NAMES, objective)


def number(decision: Decision) -> int | None:
    return None if decision.best is None else decision.best.number


def test_a_gain_beyond_the_spread_is_recommended_by_the_medians_measured_again() -> None:
    made = decided([10, 14, 13, 10.2], [(0, 10), (1, 11), (2, 13), (2, 13.4), (1, 11.2), (0, 10.1)])
    assert number(made) == 2
    assert made.is_better
    assert made.gain == pytest.approx(13.2 / 10.05 - 1)
    assert made.spread == pytest.approx(13.4 / 13 - 1)


@pytest.mark.parametrize(
    "again",
    [
        [(0, 10), (1, 10.2), (1, 11), (0, 10)],  # its own figures differ by more than it gains
        [(0, 10), (1, 10.6), (1, 10.6), (0, 11.1)],  # the defaults' do
        [(0, 10), (1, 9), (1, 9), (0, 10)],  # it was lucky
        [(0, 10), (1, None), (1, 20), (0, 10)],
    ],
)
def test_otherwise_the_defaults_are(again: list[tuple[int, float | None]]) -> None:
    made = decided([10, 14, 10], again)
    assert number(made) == 0
    assert not made.is_better


def test_the_defaults_first_and_last_figures_count_as_spread() -> None:
    again = [(0, 10.0), (1, 11.0), (1, 11.0), (0, 10.0)]
    assert number(decided([10, 14, 10.5], again)) == 1
    assert number(decided([10, 14, 11.5], again)) == 0


def test_a_latency_is_better_when_it_is_less() -> None:
    p95 = read_objective("p95", None)
    made = decided([10, 14, 10], [(0, 10), (1, 14), (1, 14), (0, 10)], objective=p95)
    assert number(made) == 1
    assert made.gain == pytest.approx(0.4)
    assert number(decided([10, 14, 10], [(0, 10), (1, 9), (1, 9), (0, 10)], objective=p95)) == 0


def test_nothing_is_claimed_of_what_was_not_measured_again() -> None:
    for again in ([], [(0, 10.0), (1, 20.0)]):
        made = decided([10, 20, 10], again)
        assert (number(made), made.repeats, made.gain, made.is_better) == (1, 0, None, False)


def test_defaults_that_miss_the_constraint_need_no_gain() -> None:
    objective = read_objective("throughput", parse_slo("p95<800ms"))  # above 12.5 answers a second
    made = decided([10, 14, 10], [(0, 10), (1, 14), (1, 14), (0, 10)], objective=objective)
    assert (number(made), made.default, made.gain) == (1, None, None)
    assert number(decided([10, 14, 10], [(0, 10), (1, 12), (1, 14), (0, 10)], objective=objective)) is None


def test_where_the_defaults_never_started_the_others_are_compared() -> None:
    trials = sweep_of([None, 14, 15, None])
    assert [trial.number for trial in to_confirm(trials, NAMES, THROUGHPUT, 2)] == [2, 1, 1, 2]
    assert number(decided([None, 14, 15, None], [(2, 12), (1, 14), (1, 14), (2, 12)])) == 1


def test_of_equal_configurations_few_are_called_better() -> None:
    dice = random.Random(1)
    claimed = 0
    for _ in range(200):
        searched = [10 * dice.gauss(1, 0.03) for _ in range(38)]
        order = to_confirm(sweep_of(searched), NAMES, THROUGHPUT, 2)
        claimed += decided(searched, [(trial.number, 10 * dice.gauss(1, 0.03)) for trial in order]).is_better
    assert claimed < 0.1 * 200  # the best of 36 against the defaults' difference: 64 %
