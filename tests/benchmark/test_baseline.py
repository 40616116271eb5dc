"""The baseline's batches, and that rows of one batch end where they would alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from florence2_kserve.benchmark.baseline import (
    EndRowsAtTheirLength,
    StaticBaseline,
    grouped_by_task,
    in_arrival_order,
)
from florence2_kserve.benchmark.models import build_model, find_shape, image_settings
from florence2_kserve.benchmark.workload import TASKS, Item, Workload, prompt_ids

SHAPE = replace(find_shape("quick", "decode-bound"), d_model=64, heads=4, vocab_size=512, image_size=96)


def items_of(*names):
    return [Item(index, TASKS[name], index, 5) for index, name in enumerate(names)]


@pytest.fixture(scope="module")
def loaded():
    return build_model(SHAPE, seed=2, dtype=torch.float64, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def baseline(loaded):
    return StaticBaseline(loaded, image_settings(SHAPE), seed=2, num_beams=3)


def test_arrival_order_takes_the_first():
    waiting = items_of("ocr", "od", "ocr", "caption")
    assert in_arrival_order(waiting, 3) == waiting[:3]


def test_grouping_takes_the_largest_group():
    waiting = items_of("ocr", "od", "caption", "od", "ocr", "od")
    assert [item.index for item in grouped_by_task(waiting, 36)] == [1, 3, 5]
    assert [item.index for item in grouped_by_task(waiting, 2)] == [1, 3]


def test_grouping_takes_the_longest_waiting_of_equal_groups():
    assert [item.index for item in grouped_by_task(items_of("ocr", "od", "od", "ocr"), 36)] == [0, 3]


def test_the_end_is_forced_on_each_row_at_its_own_length():
    force = EndRowsAtTheirLength([3, 5], num_beams=2, eos_token_id=2, device=torch.device("cpu"))
    scores = torch.randn(4, 6)
    assert torch.equal(force(torch.zeros(4, 2, dtype=torch.long), scores), scores)
    forced = force(torch.zeros(4, 3, dtype=torch.long), scores)
    assert torch.equal(forced[2:], scores[2:])
    assert torch.equal(forced[:2, 2], torch.zeros(2))
    assert torch.isinf(forced[:2, [0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_of_a_mixed_batch_get_the_tokens_they_get_alone(loaded, num_beams):
    baseline = StaticBaseline(loaded, image_settings(SHAPE), seed=2, num_beams=num_beams)
    items = Workload(seed=5, length_scale=0.1, concurrency=9).mixed(18).items
    assert len({item.length for item in items}) > 5
    assert len({len(item.task.prompt_ids) for item in items}) > 3  # so that there is padding
    together, cost = baseline.generate(items)
    for item, sequence in zip(items, together, strict=True):
        ((alone,), _) = baseline.generate([item])
        assert np.array_equal(sequence, alone)
        assert len(sequence) == item.length + 1  # and the start token
        assert sequence[-1] == loaded.generation.eos_token_id
    lengths = [item.length for item in items]
    assert (cost.rows, cost.beams, cost.steps, cost.useful_steps) == (18, num_beams, max(lengths), sum(lengths))
    assert cost.encoder_tokens == SHAPE.image_tokens + max(len(item.task.prompt_ids) for item in items)


@pytest.mark.parametrize("profile", ["decode-bound", "vision-bound"])
def test_answers_depend_on_image_and_prompt(profile):
    # Otherwise equal tokens would not show that both sides took the right ones.
    shape = find_shape("quick", profile)
    loaded = build_model(shape, seed=3, dtype=torch.float32, device=torch.device("cpu"))
    baseline = StaticBaseline(loaded, image_settings(shape), seed=1, num_beams=3)
    by_image, _ = baseline.generate([Item(index, TASKS["od"], index, 14) for index in range(6)])
    by_task, _ = baseline.generate([Item(index, task, 0, 14) for index, task in enumerate(TASKS.values())])
    assert len({tuple(sequence) for sequence in by_image}) == 6
    assert len({tuple(sequence) for sequence in by_task}) >= 8


def test_logprobs_are_the_models_own(loaded, baseline):
    item = Item(0, TASKS["ocr"], 4, 6)
    ((sequence,), _) = baseline.generate([item])
    logprobs = baseline.logprobs(item, sequence)
    assert logprobs.shape == (len(sequence) - 1, SHAPE.vocab_size)
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(len(logprobs)))
    assert len(prompt_ids(item.task, SHAPE.vocab_size)) == 10
    other = baseline.logprobs(replace(item, image=5), sequence)
    assert not torch.allclose(other, logprobs)
