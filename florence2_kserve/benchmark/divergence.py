"""Compares the two sides' tokens, and says by how little the candidates differed where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from florence2_kserve.benchmark.baseline import StaticBaseline
from florence2_kserve.benchmark.sides import Answer
from florence2_kserve.benchmark.workload import Item

Array = np.ndarray[Any, Any]
_EXPLAINED_AT_MOST = 20


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two sequences for one request part.

    Attributes:
        index: The request's place in its load.
        position: The first token that differs, counted from the start token.
        margin: How far apart the two tokens' log-probabilities are there, after the same beginning. The search
            weighs whole beams, so a small margin is no must: see `score_gap`.
        score_gap: How far apart the two whole sequences' scores are, in the baseline's own eyes.
    """

    index: int
    position: int
    margin: float
    score_gap: float


@dataclass(slots=True)
class Comparison:
    """How many of a load's sequences agree.

    Attributes:
        compared: Sequences compared.
        identical: Those that are the same token for token.
        divergences: The first few of the others.
    """

    compared: int = 0
    identical: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Share of sequences that agree."""
        return self.identical / max(1, self.compared)

    def add(
        self, baseline: StaticBaseline, items: Sequence[Item], ours: Sequence[Answer], theirs: Sequence[Answer]
    ) -> None:
        """Compares one run's answers, by index of the request."""
        for item, own, other in zip(items, ours, theirs, strict=True):
            self.compared += 1
            if np.array_equal(own.sequence, other.sequence):
                self.identical += 1
            elif len(self.divergences) < _EXPLAINED_AT_MOST:
                self.divergences.append(explain(baseline, item, own.sequence, other.sequence))

    def to_json(self) -> dict[str, Any]:
        """Returns counts, rate and divergences."""
        return asdict(self) | {"rate": self.rate}


def explain(baseline: StaticBaseline, item: Item, ours: Array, theirs: Array) -> Divergence:
    """Scores two differing sequences for one request with the baseline's model."""
    common = min(len(ours), len(theirs))
    differing = np.flatnonzero(ours[:common] != theirs[:common])
    position = int(differing[0]) if len(differing) else common - 1
    scores = []
    at_position = []
    for sequence in (ours, theirs):
        logprobs = baseline.logprobs(item, sequence)  # [T-1,V]
        chosen = logprobs.gather(1, logprobs.new_tensor(sequence[1:]).long()[:, None])[:, 0]
        chosen[0] = 0.0  # the forced first token
        if len(sequence) - 1 == item.length:
            chosen[-1] = 0.0  # the forced last one
        scores.append(float(chosen.sum()) / (len(sequence) - 1))
        at_position.append(float(logprobs[position - 1, int(sequence[position])]))
    return Divergence(item.index, position, abs(at_position[0] - at_position[1]), abs(scores[0] - scores[1]))
