"""The sweep itself, with trials that take no time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from florence2_loadtest.results import Level, Trial
from florence2_loadtest.slo import parse_slo
from florence2_loadtest.sweep.confirmation import confirmations, decide
from florence2_loadtest.sweep.loop import Budget, Sweep, TrialFailed, without_retried
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
    best = decide(trials, list(GRID.parameters), THROUGHPUT).best
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
    best = decide(trials, list(WIDE.parameters), THROUGHPUT).best
    assert best is not None
    assert best.score is not None
    assert best.score > 0.95 * 200
    assert best.settings["dtype"] == "bfloat16"
    assert abs(best.settings["max_batch_size"] - 40) <= 5


def test_optuna_stays_within_the_constraint() -> None:
    objective = read_objective("throughput", parse_slo("p95<1s"))  # fewer than 20 rows
    trials = run(WIDE, Tpe(WIDE, objective, seed=1), Hill(), Memory(), objective, budget=Budget(trials=60))
    best = decide(trials, list(WIDE.parameters), objective).best
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
    best = decide(trials, list(WIDE.parameters), THROUGHPUT).best
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
    best = decide(again, list(WIDE.parameters), latency).best
    assert best is not None
    assert best.settings["max_batch_size"] == min(trial.settings.get("max_batch_size", 36) for trial in trials)


def test_nothing_inadmissible_is_recommended() -> None:
    objective = read_objective("throughput", parse_slo("p95<1ms"))
    trials = run(GRID, Grid(GRID), Hill(), Memory(), objective)
    assert decide(trials, list(GRID.parameters), objective).best is None


def test_the_three_best_and_the_defaults_are_measured_again_in_turn() -> None:
    hill = Hill()
    trials = run(GRID, Grid(GRID), hill, Memory(), confirm=2)
    names = list(GRID.parameters)
    again = confirmations(trials)
    assert [trial.number for trial in trials] == list(range(6 + 8))
    assert hill.asked[6:] == [trial.settings for trial in again]
    assert all(trial.settings == trials[trial.confirms or 0].settings for trial in again)
    order = [trial.confirms for trial in again]
    assert order[0] == order[-1] == 0
    assert order[:4] == order[:3:-1]
    assert len(set(order)) == 4
    assert decide(trials, names, THROUGHPUT).repeats == 2


@pytest.mark.parametrize("ended_after", range(6, 15))
def test_a_confirmation_that_was_cut_off_goes_on(ended_after: int) -> None:
    whole = run(GRID, Grid(GRID), Hill(), Memory(), confirm=2)
    hill = Hill()
    trials = run(GRID, Grid(GRID), hill, Memory(whole[:ended_after]), confirm=2)
    assert [trial.confirms for trial in trials] == [trial.confirms for trial in whole]
    assert hill.asked == [trial.settings for trial in whole[ended_after:]]


def test_a_search_that_went_on_is_confirmed_anew() -> None:
    first = run(GRID, Grid(GRID), Hill(), Memory(), budget=Budget(trials=1), confirm=2)
    more = run(GRID, Grid(GRID), Hill(), Memory(first), budget=Budget(trials=2), confirm=2)
    assert [trial.confirms for trial in more] == [None] * 3 + [0, 1, 1, 0] + [None] * 2 + [0, *_by_score(more), 0]
    assert len(confirmations(more)) == 6


def _by_score(trials: list[Trial]) -> list[int]:
    """Returns the two configurations' first trials as the two rounds between the defaults have them."""
    best = sorted((trials[1], trials[7]), key=lambda trial: -(trial.score or 0))
    return [trial.number for trial in (*best, *reversed(best))]


def test_what_failed_is_measured_again_when_asked_for_and_stands_no_longer_as_failed() -> None:
    broken = {"is": True}

    def measure(settings: Mapping[str, Any]) -> list[Level]:
        if broken["is"] and settings.get("max_batch_size") == 6:
            raise TrialFailed("the port was taken")
        return [level()]

    first = run(GRID, Grid(GRID), measure, Memory())
    broken["is"] = False
    assert len(run(GRID, Grid(GRID), measure, Memory(first))) == len(first)
    again = run(GRID, Grid(GRID), measure, Memory(first), retry_failed=True)
    assert [trial.settings for trial in again[6:]] == [*(first[n].settings for n in (1, 2)), {}]
    kept = without_retried(again, list(GRID.parameters))
    assert {trial.state for trial in kept} == {"done"}
    assert [trial.number for trial in kept] == [0, 3, 4, 5, 6, 7, 8]
    assert len(run(GRID, Grid(GRID), measure, Memory(again), retry_failed=True)) == len(again)


def test_a_confirmation_that_failed_is_done_anew_when_asked_for() -> None:
    asked: list[dict[str, Any]] = []

    def measure(settings: Mapping[str, Any]) -> list[Level]:
        asked.append(dict(settings))
        if len(asked) == 8:
            raise TrialFailed("the port was taken")
        return [level()]

    first = run(GRID, Grid(GRID), measure, Memory(), confirm=2)
    assert [trial.state for trial in confirmations(first)].count("failed") == 1
    again = run(GRID, Grid(GRID), measure, Memory(first), confirm=2, retry_failed=True)
    assert len(again) == len(first) + 1 + 8
    assert {trial.state for trial in confirmations(again)} == {"done"}


def test_servers_get_secrets_and_the_ledger_does_not() -> None:
    asked = []

    def measure(settings: Mapping[str, Any]) -> list[Level]:
        asked.append(settings["env.HF_TOKEN"])
        raise TrialFailed("401 for hf_verysecret")

    trials = run(GRID, Grid(GRID), measure, Memory(), fixed={"env.HF_TOKEN": "hf_verysecret", "env.A": "1"})
    assert set(asked) == {"hf_verysecret"}
    assert "verysecret" not in "".join(trial.model_dump_json() for trial in trials)
    assert trials[0].settings == {"env.HF_TOKEN": "***", "env.A": "1"}
    assert trials[0].error == "401 for ***"
