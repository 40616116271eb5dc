"""The engine gives exactly what transformers' ``generate`` gives: random weights in float64, all kinds at once."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from florence2_kserve.engine.engine import InflightEngine
from florence2_kserve.engine.interface import GenerationRequest
from tests.engine.parity import (
    differences,
    draw_requests,
    expect,
    report,
    share_of_early_ends,
    submit_in_bursts,
)
from tests.engine.random_models import RandomModel, random_image, random_model, random_prompt

LIMITS = (1, 2, 3, 16, 20, 24, 28, 32, 32, 36, 40, 48)
ENGINES: dict[Any, tuple[int, dict[str, Any]]] = {  # a stopping rule: seed of the weights, sizes of the engine
    True: (5, {"max_batch_size": 36}),
    False: (5, {"max_batch_size": 7, "max_rows": 20, "vision_batch_size": 3}),
    "never": (9, {"max_batch_size": 16, "feature_cache_bytes": 0}),
}


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(seed=5)


@pytest.fixture(scope="module", params=list(ENGINES), ids=lambda mode: f"early_stopping={mode}")
def comparison(request):
    """Requests of all kinds with what transformers and the engine make of them."""
    seed, sizes = ENGINES[request.param]
    model = random_model(seed=seed, early_stopping=request.param)
    requests = draw_requests(model, np.random.default_rng(seed), 100, limits=LIMITS)
    expected = expect(model.loaded, model.image, requests)
    with closing(InflightEngine(model.loaded, model.image, **sizes)) as engine:
        run = submit_in_bursts(engine, requests, seed)
    return model, requests, expected, run


def test_all_is_as_transformers_has_it(comparison):
    _, requests, expected, run = comparison
    found = differences(expected, run.results, requests)
    assert not found, report(found)


def test_the_comparison_is_worth_something(comparison):
    model, requests, expected, run = comparison
    assert share_of_early_ends(expected) >= 0.5
    assert run.overtakings >= len(requests) / 10
    assert len({tuple(answer.tokens) for answer in expected}) >= len(requests) / 3
    unbanned = replace(model.loaded, generation=replace(model.loaded.generation, no_repeat_ngram_size=0))
    some = range(0, len(requests), 4)
    freely = expect(unbanned, model.image, [requests[index] for index in some])
    changed = sum(free.tokens != expected[index].tokens for free, index in zip(freely, some, strict=True))
    assert changed >= len(some) / 10


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 0},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "early_stopping": False},
        {"no_repeat_ngram_size": 5, "num_beams": 1},
        {"forced_bos_token_id": None},
        {"forced_eos_token_id": None, "early_stopping": "never"},
        {"forced_bos_token_id": None, "forced_eos_token_id": None, "early_stopping": False},
        {"forced_bos_token_id": 7, "decoder_start_token_id": 0, "num_beams": 5, "length_penalty": -0.5},
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
)
def test_a_checkpoints_other_settings_are_followed(settings: dict[str, Any]):
    model = random_model(seed=1, **settings)
    requests = draw_requests(
        model, np.random.default_rng(3), 16, limits=(1, 2, 3, 12, 20, 30), num_beams=(1, 2, 4, None)
    )
    expected = expect(model.loaded, model.image, requests)
    with closing(InflightEngine(model.loaded, model.image, max_batch_size=8)) as engine:
        run = submit_in_bursts(engine, requests, 3)
    found = differences(expected, run.results, requests)
    assert not found, report(found)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_length_penalties_may_be_zero_or_favour_short_answers(model, early_stopping):
    model = model.with_early_stopping(early_stopping)
    requests = draw_requests(
        model,
        np.random.default_rng(4),
        24,
        limits=(2, 16, 30),
        num_beams=(1, 2, 3),
        length_penalties=(0.0, -1.0),
    )
    expected = expect(model.loaded, model.image, requests)
    with closing(InflightEngine(model.loaded, model.image, max_batch_size=12)) as engine:
        run = submit_in_bursts(engine, requests, 4)
    found = differences(expected, run.results, requests)
    assert not found, report(found)


def test_an_answer_may_fill_all_positions_of_the_decoder():
    model = random_model(seed=2, end_share=0.0, early_stopping=False)
    full = model.loaded.max_target_positions
    requests = draw_requests(
        model, np.random.default_rng(2), 6, limits=(full,), num_beams=(1, 3), length_penalties=(1.0, 2.0)
    )
    expected = expect(model.loaded, model.image, requests)
    assert max(len(answer.tokens) for answer in expected) == full + 1
    with closing(InflightEngine(model.loaded, model.image, max_batch_size=4)) as engine:
        run = submit_in_bursts(engine, requests, 2)
    found = differences(expected, run.results, requests)
    assert not found, report(found)


def test_those_who_leave_early_change_nothing_for_the_others(model):
    requests = draw_requests(model, np.random.default_rng(7), 56, limits=(24, 32, 40), num_beams=(1, 3, 5, 8))
    expected = expect(model.loaded, model.image, requests)
    leaving = range(0, len(requests), 4)
    with closing(InflightEngine(model.loaded, model.image, max_batch_size=12)) as engine:
        futures = engine.submit(requests)
        cancelled = set()
        for index in leaving:
            # Neighbours finish at about the same time, so that this one is likely to run by now.
            futures[max(index - 3, 0)].result(300)
            if futures[index].cancel():
                cancelled.add(index)
        staying = [index for index in range(len(requests)) if index not in cancelled]
        results = [futures[index].result(300) for index in staying]
    assert len(cancelled) >= 3
    found = differences([expected[index] for index in staying], results, [requests[index] for index in staying])
    assert not found, report(found)


def test_what_is_expected_is_what_the_whole_model_says(model):
    """The oracle puts image and prompt together itself; here transformers does, from placeholders on."""
    requests = draw_requests(model, np.random.default_rng(5), 6, limits=(20,), num_beams=(3,), length_penalties=(1.0,))
    image, transformer = model.image, model.loaded.model
    for request, expected in zip(requests, expect(model.loaded, image, requests), strict=True):
        pixels = (request.pixel_values / 255 - image.mean) / image.std
        placeholders = [transformer.config.image_token_id] * image.image_seq_length
        with torch.inference_mode():
            output = transformer.generate(
                input_ids=torch.tensor([[*placeholders, *request.input_ids.tolist()]]),
                pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None],
                max_new_tokens=20,
                return_dict_in_generate=True,
                output_scores=True,
            )
        assert output.sequences[0].tolist() == expected.tokens
        assert output.sequences_scores[0].item() == pytest.approx(expected.score, abs=1e-4)


def test_the_answer_depends_on_the_image_and_on_the_prompt(model):
    rng = np.random.default_rng(6)
    images, prompts = (
        [random_image(rng, model.image) for _ in range(4)],
        [random_prompt(rng, model.loaded, 6) for _ in range(4)],
    )
    requests = [
        GenerationRequest(pixel_values=picture, image_key=bytes([index]), input_ids=prompt, max_new_tokens=30)
        for index, picture in enumerate(images)
        for prompt in prompts
    ]
    answers = [tuple(answer.tokens) for answer in expect(model.loaded, model.image, requests)]
    assert len({answers[4 * index] for index in range(4)}) > 1
    assert len(set(answers[:4])) > 1
