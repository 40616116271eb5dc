"""What a sweep's trials are called, and in which order they come."""

from __future__ import annotations

from typing import Any

from florence2_kserve.settings import Settings
from florence2_loadtest import formats
from florence2_loadtest.results import Level, SweepResult, Trial
from florence2_loadtest.slo import Slo, parse_slo
from florence2_loadtest.sweep.loop import noise, references
from florence2_loadtest.sweep.objective import Objective, read_objective


def objective_of(result: SweepResult) -> Objective:
    """Returns what trials were judged by.

    Raises:
        ValueError: If there is no such objective.
    """
    return read_objective(result.objective, slo_of(result))


def slo_of(result: SweepResult) -> Slo | None:
    """Returns the limit on latency, if there was one."""
    return parse_slo(result.constraint) if result.constraint else None


def ranked(result: SweepResult) -> list[Trial]:
    """Returns admissible trials, the best first; of the defaults' repeats the first alone."""
    repeats = references(result.trials, list(result.space))[1:]
    return [t for t in objective_of(result).rank(result.trials) if t.admissible is not False and t not in repeats]


def best_trial(result: SweepResult) -> Trial | None:
    """Returns the recommended one."""
    return next((trial for trial in result.trials if trial.number == result.best), None)


def default_trial(result: SweepResult) -> Trial | None:
    """Returns the first trial of the defaults that has a score."""
    return next((trial for trial in references(result.trials, list(result.space)) if trial.score is not None), None)


def varied_settings(result: SweepResult) -> list[str]:
    """Returns the settings that had more than one value."""
    values = {name: {repr(setting_of(trial, name)) for trial in result.trials} for name in result.space}
    return [name for name, found in values.items() if len(found) > 1] or list(values)


def setting_of(trial: Trial, name: str) -> Any:
    """Returns the value of a setting: the trial's, or what it is when nobody sets it."""
    known = Settings.model_fields.get(name)
    return trial.settings.get(name, known.default if known else None)


def label(trial: Trial, result: SweepResult) -> str:
    """Returns its settings, without those that all trials share."""
    varied = varied_settings(result)
    return formats.settings({name: value for name, value in trial.settings.items() if name in varied})


def representative(trial: Trial, result: SweepResult) -> Level | None:
    """Returns the level that made its score; None where nothing was answered."""
    if not any(level.answered for level in trial.levels):
        return None
    return objective_of(result).judge(trial.levels).level


def noise_of(result: SweepResult) -> float | None:
    """Returns by which share the defaults' scores differ, measured first and last; None if that isn't known."""
    return noise(result.trials, list(result.space))


def unit_of(result: SweepResult) -> str:
    """Returns the unit of its objective."""
    return "answers/s" if result.direction == "maximize" else "s"


def gain(trial: Trial, default: Trial | None) -> float | None:
    """Returns its score as a multiple of the default's."""
    if default is None or not default.score or trial.score is None:
        return None
    return trial.score / default.score
