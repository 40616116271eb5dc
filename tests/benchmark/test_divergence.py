"""What is said of differing tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from florence2_kserve.benchmark.divergence import Comparison, explain
from florence2_kserve.benchmark.sides import Answer
from florence2_kserve.benchmark.workload import TASKS, Item

ITEM = Item(0, TASKS["caption"], 0, 5)


class FixedBaseline:
    """Gives token t the log-probability -t, wherever it stands."""

    def logprobs(self, item, sequence):
        return -torch.arange(20, dtype=torch.float32).repeat(len(sequence) - 1, 1)


def answers(*sequences):
    return [Answer(np.array(sequence), 1.0) for sequence in sequences]


def test_equal_sequences_need_no_explanation():
    comparison = Comparison()
    same = [2, 0, 7, 8, 9, 2]
    comparison.add(FixedBaseline(), [ITEM], answers(same), answers(same))
    assert (comparison.compared, comparison.identical, comparison.rate, comparison.divergences) == (1, 1, 1.0, [])


def test_differing_ones_are_counted_and_explained():
    comparison = Comparison()
    items = [ITEM, Item(1, TASKS["caption"], 1, 5)]
    ours, theirs = answers([2, 0, 7, 8, 9, 2], [2, 0, 7, 8, 9, 2]), answers([2, 0, 7, 8, 9, 2], [2, 0, 7, 11, 9, 2])
    comparison.add(FixedBaseline(), items, ours, theirs)
    (divergence,) = comparison.divergences
    assert (comparison.compared, comparison.identical) == (2, 1)
    assert (divergence.index, divergence.position) == (1, 3)
    assert divergence.margin == pytest.approx(3)
    assert divergence.score_gap == pytest.approx(3 / 5)
    assert comparison.to_json()["rate"] == 0.5


def test_forced_tokens_score_nothing():
    # Only the second ends by itself, so that its end token counts.
    divergence = explain(FixedBaseline(), ITEM, np.array([2, 0, 7, 8, 9, 2]), np.array([2, 0, 7, 8, 2]))
    assert divergence.position == 4
    assert divergence.margin == pytest.approx(9 - 2)
    assert divergence.score_gap == pytest.approx(abs((7 + 8 + 9) / 5 - (7 + 8 + 2) / 4))
