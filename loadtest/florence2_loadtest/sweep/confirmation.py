"""Measured again: whether the best of many is better than the defaults, or was only lucky.

The best of many equal configurations always looks better than the defaults, the more so the more there are. So a few
of the best and the defaults are measured again, in turn, and these figures alone decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from florence2_loadtest.results import Trial
from florence2_loadtest.sweep.objective import Objective

CANDIDATES = 3
FEWEST_REPEATS = 2  # one figure has no spread


@dataclass(frozen=True, slots=True)
class Decision:
    """What a sweep recommends, and why.

    Attributes:
        best: The recommended trial, None if nothing is admissible. Confirmed, it is the first with its settings.
        repeats: How often each was measured again; 0: it wasn't, so that nothing is known of a gain.
        candidate: The one that did best when measured again.
        score: The candidate's median.
        default: The defaults' median; None where they aren't admissible.
        gain: The share by which the candidate's median is better than the defaults'.
        spread: The largest share by which figures of one configuration differ.
    """

    best: Trial | None
    repeats: int = 0
    candidate: Trial | None = None
    score: float | None = None
    default: float | None = None
    gain: float | None = None
    spread: float = 0.0

    @property
    def is_better(self) -> bool:
        """Whether the candidate is better than the defaults by more than figures vary by themselves."""
        return self.gain is not None and self.gain > self.spread


def references(trials: Sequence[Trial], names: Sequence[str]) -> list[Trial]:
    """Returns the trials of the defaults, first and last, without those that confirm."""
    return [trial for trial in searched(trials) if is_reference(trial, names)]


def is_reference(trial: Trial, names: Iterable[str]) -> bool:
    """Whether a trial is of the defaults: none of the searched settings is given."""
    return trial.settings.keys().isdisjoint(names)


def searched(trials: Sequence[Trial]) -> list[Trial]:
    """Returns the trials without those that confirm."""
    return [trial for trial in trials if trial.confirms is None]


def confirmations(trials: Sequence[Trial]) -> list[Trial]:
    """Returns those that confirm what was measured before them; none where the search went on afterwards."""
    last = max((place for place, trial in enumerate(trials) if trial.confirms is None), default=-1)
    return list(trials[last + 1 :])


def ranked_once(trials: Sequence[Trial], names: Sequence[str], objective: Objective) -> list[Trial]:
    """Returns admissible trials, the best first; of the defaults' one alone."""
    repeats = {trial.number for trial in _scored(references(trials, names))[1:]}
    once = [trial for trial in searched(trials) if trial.number not in repeats]
    return [trial for trial in objective.rank(once) if trial.admissible is not False]


def to_confirm(trials: Sequence[Trial], names: Sequence[str], objective: Objective, repeats: int) -> list[Trial]:
    """Returns whose settings are to be measured again, in order; what was already is left out.

    The order turns with each round, so that a machine which becomes slower does so for all.
    """
    ranked = ranked_once(trials, names, objective)
    candidates = [trial for trial in ranked if not is_reference(trial, names)][:CANDIDATES]
    if not candidates:
        return []
    round_ = [*_scored(references(trials, names))[:1], *candidates]
    had = Counter(trial.confirms for trial in confirmations(trials))
    return [
        trial
        for index in range(repeats)
        for trial in (round_ if index % 2 == 0 else reversed(round_))
        if had[trial.number] <= index
    ]


def decide(trials: Sequence[Trial], names: Sequence[str], objective: Objective) -> Decision:
    """Returns what is to be recommended: the defaults, unless another was better each time by more than chance."""
    ranked = ranked_once(trials, names, objective)
    by_number = {trial.number: trial for trial in trials}
    repeats: dict[int, list[Trial]] = {}
    for trial in confirmations(trials):
        if trial.confirms in by_number:
            repeats.setdefault(trial.confirms, []).append(trial)
    repeats = {number: again for number, again in repeats.items() if len(again) >= FEWEST_REPEATS}
    defaults = references(trials, names)
    reference = next((trial for trial in defaults if trial.number in repeats), None)
    if not any(number != (reference and reference.number) for number in repeats):
        return Decision(ranked[0] if ranked else None)
    fewest = min(len(again) for again in repeats.values())
    medians = {
        number: median(trial.score or 0.0 for trial in again)
        for number, again in repeats.items()
        if all(trial.admissible for trial in again)
    }
    sign = -1 if objective.direction == "maximize" else 1
    default = medians.pop(reference.number, None) if reference is not None else None
    if not medians:
        return Decision(reference if default is not None else None, fewest, default=default)
    winner = min(medians, key=lambda number: (sign * medians[number], number))
    candidate, score = by_number[winner], medians[winner]
    if default is None or reference is None:
        return Decision(candidate, fewest, candidate, score)
    more, less = (score, default) if objective.direction == "maximize" else (default, score)
    gain = more / less - 1 if less else float(more > 0)
    kept = [[trial.score for trial in repeats[number]] for number in medians]
    # The defaults weren't chosen for their figures: their first and last ones count too.
    kept.append([trial.score for trial in (*repeats[reference.number], *defaults)])
    spread = max(max(scores) / min(scores) - 1 for given in kept if (scores := [score for score in given if score]))
    best = candidate if gain > spread else reference
    return Decision(best, fewest, candidate, score, default, gain, spread)


def _scored(trials: Sequence[Trial]) -> list[Trial]:
    """Returns those that were measured."""
    return [trial for trial in trials if trial.score is not None]
