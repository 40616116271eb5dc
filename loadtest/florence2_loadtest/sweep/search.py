"""Which configuration is measured next."""

from __future__ import annotations

import random
from typing import Any, Protocol

from florence2_loadtest.results import Trial
from florence2_loadtest.sweep.objective import Objective
from florence2_loadtest.sweep.space import Space

_RANDOM_TRIALS = 8  # before the estimator has something to go by
_EXCESS = "excess"
_MOST_REPEATS = 200  # of configurations known already, after which a space counts as searched


class Search(Protocol):
    """A way through a space.

    Trials that a sweep knows already are told first, as if they had just been measured.
    """

    def next(self) -> dict[str, Any] | None:
        """Returns a configuration that wasn't told yet, None if there is none."""
        ...

    def tell(self, configuration: dict[str, Any], trial: Trial) -> None:
        """Takes note of a configuration's trial."""
        ...


class Grid:
    """All configurations, each once: brute force.

    Args:
        space: Of values, or of ranges with a step.
        shuffle: Seed of a random order; None for the space's own, the last setting changing fastest.

    Raises:
        ValueError: If a range has no step.
    """

    def __init__(self, space: Space, shuffle: int | None = None) -> None:
        self._left = list(space.configurations())
        if shuffle is not None:
            random.Random(shuffle).shuffle(self._left)

    def __len__(self) -> int:
        return len(self._left)

    def next(self) -> dict[str, Any] | None:
        """Returns the first that is left."""
        return self._left[0] if self._left else None

    def tell(self, configuration: dict[str, Any], trial: Trial) -> None:
        """Crosses it out."""
        self._left = [other for other in self._left if other != configuration]


class Tpe:
    """optuna's tree-structured Parzen estimator, which tries more of what did well.

    A restarted search takes another way than an unbroken one would have, but knows all that was measured.

    Args:
        space: What is searched.
        objective: What is to be best; trials that aren't admissible teach the search to stay away.
        seed: Of its choices.
    """

    def __init__(self, space: Space, objective: Objective, seed: int = 0) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._objective = space, objective
        self._sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)
        self._study = optuna.create_study(sampler=self._sampler, direction=objective.direction)
        self._known: dict[tuple[tuple[str, Any], ...], Trial] = {}
        self._asked: Any = None

    def next(self) -> dict[str, Any] | None:
        """Asks optuna for a configuration that wasn't told yet."""
        for _ in range(_MOST_REPEATS):
            self._asked = self._study.ask()
            configuration = self._space.suggest(self._asked)
            trial = self._known.get(_key(configuration))
            if trial is None:
                return configuration
            self._answer(self._asked, trial)
        return None

    def tell(self, configuration: dict[str, Any], trial: Trial) -> None:
        """Hands the trial on to optuna."""
        self._known[_key(configuration)] = trial
        asked, self._asked = self._asked, None
        if asked is None:  # measured before this search began
            self._study.enqueue_trial(configuration)
            asked = self._study.ask()
            self._space.suggest(asked)
        self._answer(asked, trial)

    def _answer(self, asked: Any, trial: Trial) -> None:
        from optuna.trial import TrialState

        if trial.score is None:
            self._study.tell(asked, state=TrialState.FAIL)
            return
        asked.set_constraint(_EXCESS, self._objective.judge(trial.levels).excess)
        self._study.tell(asked, trial.score)


def _key(configuration: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(configuration.items())
