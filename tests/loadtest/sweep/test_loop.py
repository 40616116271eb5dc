"""The sweep itself, with trials that take no time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from florence2_loadtest.results import Level, Trial
from florence2_loadtest.slo import parse_slo
from florence2_loadtest.sweep.loop import Budget, Sweep, TrialFailed, noise, recommend
from florence2_loadtest.sweep.objective import Objective, read_objective
from florence2_loadtest.sweep.search import Grid, Search, Tpe
from florence2_loadtest.sweep.space import Space, make_space
from tests.loadtest.sweep.trials import Memory, level

THROUGHPUT = read_objective("throughput", None)
GRID = make_space({"max_batch_size": "6,12", "vision_batch_size": "1,2"}, "predictor")
WIDE = make_space({"max_batch_size": "1:64", "feature_cache_mib": "0:512", "dtype": "float32,bfloat16"}, "predictor")


class Hill:
    """Throughput with its one best place at 40 rows, 300 MiB and bfloat16; latency grows with the rows."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, settings: Mapping[str, Any]) -> list[Level]:
        self.asked.append(dict(settings))
        batch, cache = settings.get("max_batch_size", 36), settings.get("feature_cache_mib", 256)
        distance = ((batch - 40) / 20) ** 2 + ((cache - 300) / 200) ** 2
        return [level(100 * math.exp(-distance) * (1 + (settings.get("dtype") == "bfloat16")), batch / 20)]


def run(
    space: Space, search: Search, measure: Any, ledger: Memory, objective: Objective = THROUGHPUT, **how: Any
) -> list[Trial]:
    Sweep(list(space.parameters), search, objective, measure, say=lambda text: None, **how).run(ledger)
    return ledger.trials


def test_the_defaults_are_measured_first_and_last() -> None:
    hill = Hill()
    trials = run(GRID, Grid(GRID), hill, Memory(), fixed={"dtype": "bfloat16"})
    assert [trial.settings for trial in trials] == hill.asked
    assert [trial.number for trial in trials] == list(range(6))
    assert trials[0].settings == trials[5].settings == {"dtype": "bfloat16"}
    assert [trial.settings for trial in trials[1:5]] == [
        {"dtype": "bfloat16", **configuration} for configuration in GRID.configurations()
    ]


def test_a_shuffled_grid_has_the_same_configurations_and_one_order_for_a_seed() -> None:
    space = make_space({"max_batch_size": "1:64:1"}, "predictor")

    def order(seed: int | None) -> list[int]:
        trials = run(space, Grid(space, seed), Hill(), Memory())
        return [trial.settings["max_batch_size"] for trial in trials[1:-1]]

    assert order(3) == order(3) != order(None)
    assert sorted(order(3)) == order(None) == list(range(1, 65))


def test_a_failed_configuration_is_recorded_and_the_sweep_goes_on() -> None:
    def measure(settings: Mapping[str, Any]) -> list[Level]:
        match settings.get("max_batch_size"):
            case 6:
                raise TrialFailed("--- predictor\nout of memory")
            case 12 if settings["vision_batch_size"] == 2:
                return [level(answered=0, failed=4)]
            case 12:
                raise KeyError("surprise")
        return [level()]

    trials = run(GRID, Grid(GRID), measure, Memory())
    assert [trial.state for trial in trials] == ["done", "failed", "failed", "failed", "failed", "done"]
    assert [trial.error for trial in trials[1:5]] == [
        "--- predictor\nout of memory",
        "--- predictor\nout of memory",
        "KeyError: 'surprise'",
        "nothing was answered",
    ]
    best = recommend(trials, list(GRID.parameters), THROUGHPUT)
    assert best is trials[0]


@pytest.mark.parametrize("ended_after", range(7))
def test_a_sweep_that_goes_on_measures_what_is_left_and_nothing_twice(ended_after: int) -> None:
    whole = run(GRID, Grid(GRID), Hill(), Memory())
    hill = Hill()
    trials = run(GRID, Grid(GRID), hill, Memory(whole[:ended_after]))
    assert [trial.settings for trial in trials] == [trial.settings for trial in whole]
    assert hill.asked == [trial.settings for trial in whole[ended_after:]]


def test_a_budget_of_trials_counts_earlier_runs_and_may_be_raised_later() -> None:
    first = run(GRID, Grid(GRID), Hill(), Memory(), budget=Budget(trials=2))
    assert len(first) == 1 + 2 + 1
    hill = Hill()
    more = run(GRID, Grid(GRID), hill, Memory(first), budget=Budget(trials=3))
    assert hill.asked == [{"max_batch_size": 12, "vision_batch_size": 1}, {}]
    assert [trial.number for trial in more] == list(range(6))


def test_a_budget_of_time_counts_the_time_in_trials() -> None:
    budget = Budget(minutes=1)
    assert budget.allows_another(1000, 59.9)
    assert not budget.allows_another(1, 60.0)


def test_optuna_finds_the_top_of_a_hill_whose_shape_is_known() -> None:
    trials = run(WIDE, Tpe(WIDE, THROUGHPUT, seed=1), Hill(), Memory(), budget=Budget(trials=60))
    best = recommend(trials, list(WIDE.parameters), THROUGHPUT)
    assert best is not None
    assert best.score is not None
    assert best.score > 0.95 * 200
    assert best.settings["dtype"] == "bfloat16"
    assert abs(best.settings["max_batch_size"] - 40) <= 5


def test_optuna_stays_within_the_constraint() -> None:
    objective = read_objective("throughput", parse_slo("p95<1s"))  # fewer than 20 rows
    trials = run(WIDE, Tpe(WIDE, objective, seed=1), Hill(), Memory(), objective, budget=Budget(trials=60))
    best = recommend(trials, list(WIDE.parameters), objective)
    assert best is not None
    assert 16 <= best.settings["max_batch_size"] < 20
    late = trials[-21:-1]
    assert sum(bool(trial.admissible) for trial in late) > len(late) / 2


def test_optuna_goes_on_from_a_checkpoint_without_asking_again() -> None:
    before = run(WIDE, Tpe(WIDE, THROUGHPUT, seed=1), Hill(), Memory(), budget=Budget(trials=30))
    hill = Hill()
    trials = run(WIDE, Tpe(WIDE, THROUGHPUT, seed=1), hill, Memory(before), budget=Budget(trials=60))
    assert len(hill.asked) == 30 + 1
    configurations = [tuple(trial.settings.items()) for trial in trials if trial.settings]
    assert len(set(configurations)) == len(configurations) == 60
    best = recommend(trials, list(WIDE.parameters), THROUGHPUT)
    assert best is not None
    assert best.score is not None
    assert best.score > 0.95 * 200


def test_optuna_ends_when_a_small_space_is_searched() -> None:
    def measure(settings: Mapping[str, Any]) -> list[Level]:
        if settings.get("max_batch_size") == 6:
            raise TrialFailed("no")
        return [level()]

    trials = run(GRID, Tpe(GRID, THROUGHPUT), measure, Memory(), budget=Budget(trials=100))
    configurations = sorted(str(trial.settings) for trial in trials if trial.settings)
    assert configurations == sorted(map(str, GRID.configurations()))


def test_another_objective_judges_the_same_trials_anew() -> None:
    trials = run(WIDE, Tpe(WIDE, THROUGHPUT, seed=1), Hill(), Memory(), budget=Budget(trials=20))
    latency = read_objective("p95", None)
    again = run(WIDE, Tpe(WIDE, latency), Hill(), Memory(trials), latency, budget=Budget(trials=20))
    assert len(again) == len(trials)
    best = recommend(again, list(WIDE.parameters), latency)
    assert best is not None
    assert best.settings["max_batch_size"] == min(trial.settings.get("max_batch_size", 36) for trial in trials)


def test_nothing_inadmissible_is_recommended() -> None:
    objective = read_objective("throughput", parse_slo("p95<1ms"))
    trials = run(GRID, Grid(GRID), Hill(), Memory(), objective)
    assert recommend(trials, list(GRID.parameters), objective) is None


def test_noise_is_the_difference_between_the_defaults_first_and_last() -> None:
    scores = iter([10.0, 50.0, 50.0, 50.0, 50.0, 11.0])
    trials = run(GRID, Grid(GRID), lambda settings: [level(next(scores))], Memory())
    assert noise(trials, list(GRID.parameters)) == pytest.approx(0.1)
    assert noise(trials[:-1], list(GRID.parameters)) is None
