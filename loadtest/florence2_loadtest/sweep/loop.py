"""The sweep itself: the defaults, the search's configurations, the defaults again, and the best again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from florence2_loadtest.masking import hide, masked
from florence2_loadtest.results import Level, Trial
from florence2_loadtest.sweep.confirmation import confirmations, is_reference, references, searched, to_confirm
from florence2_loadtest.sweep.objective import Objective
from florence2_loadtest.sweep.search import Search
from florence2_loadtest.sweep.values import figures

_MOST_OF_AN_ERROR = 4000  # characters

Measure = Callable[[Mapping[str, Any]], Sequence[Level]]


class TrialFailed(Exception):
    """A configuration couldn't be measured; says why, with the end of the servers' logs."""


class Ledger(Protocol):
    """Where trials are noted, see `Checkpoint`."""

    trials: list[Trial]

    def add(self, trial: Trial) -> None:
        """Notes a trial that has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop; the defaults at both ends come on top, as does what is measured again.

    Attributes:
        trials: Most configurations.
        minutes: Time in trials after which no further one begins, earlier runs included.
    """

    trials: int | None = None
    minutes: float | None = None

    def allows_another(self, trials: int, seconds: float) -> bool:
        """Whether there is some left after that much."""
        if self.trials is not None and trials >= self.trials:
            return False
        return self.minutes is None or seconds < self.minutes * 60


@dataclass(slots=True)
class Sweep:
    """Measures one configuration after the other, and notes each as it ends.

    Attributes:
        names: The settings that are searched over.
        search: Which configuration comes next.
        objective: What trials are judged by.
        measure: Measures settings in fresh servers; raises TrialFailed.
        fixed: Settings of all trials; alone, they are the defaults that others are compared with. Secrets among them
            go to the servers and are noted nowhere.
        budget: When to stop.
        confirm: How often the best and the defaults are measured again.
        retry_failed: Whether to measure again what failed before.
        say: Tells of progress.
    """

    names: Sequence[str]
    search: Search
    objective: Objective
    measure: Measure
    fixed: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    confirm: int = 0
    retry_failed: bool = False
    say: Callable[[str], None] = print

    def run(self, ledger: Ledger) -> None:
        """Goes on where `ledger` ends, until the search or the budget does."""
        for trial in ledger.trials:
            judge(trial, self.objective)
        for trial in searched(ledger.trials):
            if not is_reference(trial, self.names):
                self.search.tell(self._configuration(trial), trial)
        if ledger.trials:
            self.say(f"going on after {len(ledger.trials)} trials")
            self._retry(ledger)
        else:
            self._try(ledger, {})
        while self._may_go_on(ledger) and (configuration := self.search.next()) is not None:
            self.search.tell(configuration, self._try(ledger, configuration))
        if not is_reference(searched(ledger.trials)[-1], self.names):
            self._try(ledger, {})
        for trial in to_confirm(ledger.trials, self.names, self.objective, self.confirm):
            self._try(ledger, self._configuration(trial), confirms=trial.number)

    def _retry(self, ledger: Ledger) -> None:
        if not self.retry_failed:
            return
        again = confirmations(ledger.trials)
        trials = without_retried(searched(ledger.trials), self.names)
        if (defaults := references(trials, self.names)) and all(trial.state == "failed" for trial in defaults):
            self._try(ledger, {})
        for trial in trials:
            if trial.state == "failed" and not is_reference(trial, self.names):
                configuration = self._configuration(trial)
                self.search.tell(configuration, self._try(ledger, configuration))
        if any(trial.state == "failed" for trial in again):
            self._try(ledger, {})  # after which all are measured again once more, in turn

    def _may_go_on(self, ledger: Ledger) -> bool:
        trials = searched(ledger.trials)
        configurations = [
            trial for trial in without_retried(trials, self.names) if not is_reference(trial, self.names)
        ]
        return self.budget.allows_another(len(configurations), sum(trial.seconds for trial in trials))

    def _configuration(self, trial: Trial) -> dict[str, Any]:
        return {name: trial.settings[name] for name in self.names if name in trial.settings}

    def _try(self, ledger: Ledger, configuration: Mapping[str, Any], confirms: int | None = None) -> Trial:
        settings = {**self.fixed, **configuration}
        trial = Trial.model_validate(
            {"number": len(ledger.trials), "settings": masked(settings), "confirms": confirms}
        )
        began = time.monotonic()
        try:
            trial.levels = list(self.measure(settings))
        except Exception as error:  # whatever it is, other configurations may do better
            trial.state = "failed"
            what = str(error) if isinstance(error, TrialFailed) else f"{type(error).__name__}: {error}"
            trial.error = hide(what, settings)[-_MOST_OF_AN_ERROR:]
        trial.seconds = time.monotonic() - began
        judge(trial, self.objective)
        ledger.add(trial)
        self.say(_line(trial, configuration))
        return trial


def judge(trial: Trial, objective: Objective) -> None:
    """Writes into a trial what it is worth; one without answers has failed."""
    trial.score = trial.admissible = None
    if trial.state == "failed":
        return
    try:
        verdict = objective.judge(trial.levels)
    except ValueError as error:
        trial.state, trial.error = "failed", str(error)
        return
    trial.score, trial.admissible = verdict.score, verdict.admissible


def without_retried(trials: Sequence[Trial], names: Sequence[str]) -> list[Trial]:
    """Returns trials without the failed ones whose configuration was tried again later."""
    last = {repr(trial.settings): trial.number for trial in searched(trials)}
    return [
        trial
        for trial in trials
        if trial.state == "done"
        or trial.confirms is not None
        or is_reference(trial, names)
        or last[repr(trial.settings)] == trial.number
    ]


def _line(trial: Trial, configuration: Mapping[str, Any]) -> str:
    what = describe(configuration) + ("" if trial.confirms is None else ", again")
    if trial.state == "failed":
        last = (trial.error or "").strip().splitlines()[-1:]
        return f"{trial.number}  {what}: failed: {' '.join(last)}"
    kept = "" if trial.admissible else ", not admissible"
    return f"{trial.number}  {what}: {figures(trial)}{kept} ({trial.seconds:.0f} s)"


def describe(configuration: Mapping[str, Any]) -> str:
    """Returns a configuration in words."""
    return " ".join(f"{name}={'unset' if value is None else value}" for name, value in configuration.items()) or (
        "the defaults"
    )
