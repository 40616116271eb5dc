"""What a sweep's trials are called, and in which order they come."""

from __future__ import annotations

from typing import Any

from florence2_kserve.settings import Settings
from florence2_loadtest import formats
from florence2_loadtest.results import Level, SweepResult, Trial
from florence2_loadtest.slo import Slo, parse_slo
from florence2_loadtest.sweep.confirmation import Decision, decide, is_reference, ranked_once, references
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
    return ranked_once(result.trials, list(result.space), objective_of(result))


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


def decision_of(result: SweepResult) -> Decision:
    """Returns what measuring again came to."""
    return decide(result.trials, list(result.space), objective_of(result))


def verdict(result: SweepResult) -> str:
    """Returns what is recommended, how far that can be believed, and why."""
    made = decision_of(result)
    if made.best is None:
        return "No configuration is admissible: nothing is recommended."
    is_default = is_reference(made.best, result.space)
    if not made.repeats:
        if is_default:
            return "Nothing did better than the defaults, which are recommended."
        return "The best were not measured again, and the best of many is lucky too: no gain is claimed."
    again = f"Measured {made.repeats} times more, in turn"
    if made.candidate is None:
        return f"{again}, only the defaults are admissible, and recommended."
    theirs = f"{formats.digits(made.score)} {unit_of(result)}"
    if made.default is None or made.gain is None:
        return f"{again}, the recommended values have {result.objective} {theirs}; the defaults aren't admissible."
    ours = f"{formats.digits(made.default)} {unit_of(result)}"
    spread = f"figures of one configuration differ by up to {formats.share(made.spread)}"
    better = f"{formats.share(made.gain)} better" if made.gain > 0 else "no better"
    if made.is_better:
        told = f"the recommended values have {result.objective} {theirs}, the defaults {ours}: {better}"
        return f"{again}, {told}, while {spread}."
    told = f"the best other values have {result.objective} {theirs}, the defaults {ours}: {better}"
    return f"{again}, {told}, while {spread}. The defaults are recommended."


def unsettled(result: SweepResult) -> list[Trial]:
    """Returns the trials whose figures come from a level that never settled."""
    levels = ((trial, representative(trial, result)) for trial in result.trials)
    return [trial for trial, level in levels if level is not None and level.stable is False]


def unit_of(result: SweepResult) -> str:
    """Returns the unit of its objective."""
    return "answers/s" if result.direction == "maximize" else "s"


def gain(trial: Trial, default: Trial | None) -> float | None:
    """Returns its score as a multiple of the default's."""
    if default is None or not default.score or trial.score is None:
        return None
    return trial.score / default.score
