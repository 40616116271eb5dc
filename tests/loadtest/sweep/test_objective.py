"""What a configuration is worth."""

from __future__ import annotations

import pytest

from florence2_loadtest.results import Trial
from florence2_loadtest.slo import parse_slo
from florence2_loadtest.sweep.objective import read_objective
from tests.loadtest.sweep.trials import level


def test_throughput_is_that_of_the_best_level_within_the_constraint() -> None:
    levels = [level(20, 0.5, concurrency=12), level(30, 1.5, concurrency=24), level(40, 2.5, concurrency=36)]
    free, bound = read_objective("throughput", None), read_objective("throughput", parse_slo("p95<2s"))
    assert free.judge(levels).score == 40
    assert (bound.judge(levels).score, bound.judge(levels).admissible) == (30, True)
    assert bound.judge(levels).level.concurrency == 24


def test_what_no_level_keeps_is_not_admissible_and_the_excess_says_by_how_much() -> None:
    objective = read_objective("throughput", parse_slo("p99<1s"))
    near, far = (objective.judge([level(20, p95_s)]) for p95_s in (0.6, 5.0))
    assert not near.admissible
    assert not far.admissible
    assert 0 < near.excess < far.excess
    kept = objective.judge([level(20, 0.4)])
    assert kept.admissible
    assert kept.excess == 0


def test_a_latency_is_that_of_the_worst_level() -> None:
    objective = read_objective("p95", None)
    verdict = objective.judge([level(p95_s=0.5, concurrency=12), level(p95_s=2.0, concurrency=24)])
    assert (verdict.score, verdict.admissible, objective.direction) == (2.0, True, "minimize")


def test_a_level_with_failures_is_not_admissible() -> None:
    failing = level(50, failed=1)
    assert read_objective("throughput", None).judge([failing, level(20)]).score == 20
    assert not read_objective("throughput", None).judge([failing]).admissible
    assert not read_objective("p95", None).judge([failing, level(20)]).admissible


def test_a_level_that_the_generator_set_is_not_admissible() -> None:
    limited = level(50)
    limited.generator.bottleneck = "it needed a whole processor"
    verdict = read_objective("throughput", None).judge([limited])
    assert not verdict.admissible
    assert verdict.excess > 0
    assert read_objective("throughput", None).judge([limited, level(20)]).score == 20


def test_nothing_answered_is_worth_nothing() -> None:
    with pytest.raises(ValueError, match="nothing was answered"):
        read_objective("throughput", None).judge([level(answered=0, failed=3)])


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="one of throughput, goodput, mean"):
        read_objective("speed", None)


def test_ranks_have_the_admissible_first_and_leave_out_what_failed() -> None:
    def trial(number: int, score: float | None, admissible: bool | None) -> Trial:
        return Trial.model_validate({"number": number, "settings": {}, "score": score, "admissible": admissible})

    trials = [trial(0, 5, True), trial(1, 9, False), trial(2, None, None), trial(3, 7, True), trial(4, 7, True)]
    assert [each.number for each in read_objective("throughput", None).rank(trials)] == [3, 4, 0, 1]
    assert [each.number for each in read_objective("p99", None).rank(trials)] == [0, 3, 4, 1]
