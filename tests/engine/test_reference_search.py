"""The plain search equals transformers' ``generate``, on Florence-2's decoder and on a bare BART."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from florence2_kserve.benchmark.models import GENERATION
from florence2_kserve.weights import GenerationSettings
from tests.engine.parity import draw_requests, encoder_states, expect, image_features
from tests.engine.random_models import RandomModel, random_model
from tests.engine.reference_search import Found, Step, banned_tokens, search

LIMITS = (1, 2, 3, 12, 18, 18)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(seed=5)


@torch.inference_mode()
def step_of(model: torch.nn.Module, states: torch.Tensor) -> Step:
    """Returns a step that feeds all tokens anew, without any cache."""

    def step(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            output = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                decoder_input_ids=torch.tensor([tokens]),
                use_cache=False,
            )
        return output.logits[0, -1].float()

    return step


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_it_finds_what_generate_finds(model, early_stopping):
    model = model.with_early_stopping(early_stopping)
    rng = np.random.default_rng(int(early_stopping is True))
    requests = draw_requests(
        model,
        rng,
        20,
        limits=LIMITS,
        num_beams=(1, 2, 3, 5, None),
        length_penalties=(0.0, 0.5, 2.0, None),
        images=4,
        prompts=3,
    )
    lengths = []
    for request, expected in zip(requests, expect(model.loaded, model.image, requests), strict=True):
        with torch.inference_mode():
            features = image_features(model.loaded, model.image, request.pixel_values)
            states = encoder_states(model.loaded, [features], [request])
        found = search(
            step_of(model.loaded.model, states),
            model.loaded.generation,
            request.max_new_tokens,
            num_beams=request.num_beams,
            length_penalty=request.length_penalty,
        )
        assert found.tokens == expected.tokens, request
        assert found.score == pytest.approx(expected.score, abs=1e-4)
        assert found.token_logprobs == pytest.approx(expected.token_logprobs.tolist(), abs=1e-4)
        lengths.append(len(found.tokens) - 1 < request.max_new_tokens)
    assert sum(lengths) >= len(lengths) / 4


@pytest.fixture(scope="module")
def bart() -> BartForConditionalGeneration:
    """So small a vocabulary that ends, repetitions and bans come often."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=24,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.4,
        dropout=0.0,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config).double().eval()
    model.final_logits_bias[0, 2] = 4.0  # ends, now and then
    return model


CHANGES = {
    "as Florence-2": {},
    "no ban": {"no_repeat_ngram_size": 0},
    "single tokens banned": {"no_repeat_ngram_size": 1},
    "pairs banned": {"no_repeat_ngram_size": 2},
    "first token free": {"forced_bos_token_id": None},
    "last token free": {"forced_eos_token_id": None},
    "nothing forced, pairs banned": {
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "no_repeat_ngram_size": 2,
    },
    "another start": {"decoder_start_token_id": 5, "forced_bos_token_id": 7},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_it_finds_what_generate_finds_under_other_settings(bart, changes):
    early_ends = 0
    cases = list(itertools.product([True, False, "never"], [1, 2, 5], [0.0, 1.0, 2.0, -0.5]))
    for index, (early_stopping, num_beams, penalty) in enumerate(cases):
        limit = (1, 3, 9, 9)[(index + index // 4) % 4]
        settings = replace(
            GENERATION,
            **changes,
            early_stopping=early_stopping if num_beams > 1 else False,
            num_beams=num_beams,
            length_penalty=penalty,
        )
        found, expected = both(bart, settings, limit, seed=index)
        assert found.tokens == expected.tokens, settings
        assert found.score == pytest.approx(expected.score, abs=1e-4), settings
        early_ends += len(found.tokens) <= limit
    # The start token is the end token, which a ban of single tokens forbids for good.
    assert early_ends >= len(cases) / 4 or changes.get("no_repeat_ngram_size") == 1


@torch.inference_mode()
def both(bart: BartForConditionalGeneration, settings: GenerationSettings, limit: int, *, seed: int):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 5, 32, generator=generator, dtype=torch.float64)
    found = search(step_of(bart, states), settings, limit)
    output = bart.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=torch.ones(1, 5, dtype=torch.long),
        generation_config=GenerationConfig(**settings.to_transformers(), max_new_tokens=limit),
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = output.sequences[0].tolist()
    if settings.num_beams > 1:
        score = output.sequences_scores[0].item()
    else:
        logits = bart(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=torch.tensor([tokens[:-1]])
        ).logits
        logprobs = torch.log_softmax(logits[0].float(), dim=-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        if settings.forced_bos_token_id is not None:
            logprobs[0] = 0
        if settings.forced_eos_token_id is not None and len(tokens) - 1 == limit:
            logprobs[-1] = 0
        score = logprobs.sum().item() / (len(tokens) - 1) ** settings.length_penalty
    return found, Found(tokens, score, [], [])


@pytest.mark.parametrize(
    ("tokens", "size", "banned"),
    [
        ([2, 0, 5, 6, 7, 5, 6], 3, {7}),
        ([2, 0, 5, 6, 7, 5, 6, 8, 5, 6], 3, {7, 8}),
        ([2, 0, 5, 5, 5], 3, {5}),
        ([2, 0, 5, 5], 3, set()),
        ([2, 0], 3, set()),
        ([2], 3, set()),
        ([2, 0, 5, 0], 2, {5}),
        ([2, 0, 5], 1, {2, 0, 5}),
        ([2, 0, 5, 5, 5], 0, set()),
    ],
)
def test_only_completions_of_a_known_sequence_are_banned(tokens, size, banned):
    assert banned_tokens(tokens, size) == banned


def logits_of(table: dict[tuple[int, ...], dict[int, float]]) -> Step:
    """Returns a step over 8 tokens, with the probabilities that `table` gives for some of them."""

    def step(tokens: list[int]) -> torch.Tensor:
        rest = 1e-6
        given = table.get(tuple(tokens), {})
        probabilities = torch.tensor([given.get(token, rest) for token in range(8)])
        return (probabilities / probabilities.sum()).log()

    return step


def test_margins_tell_how_close_the_decisions_were():
    settings = replace(GENERATION, num_beams=1, no_repeat_ngram_size=0)
    step = logits_of({(2, 0): {4: 0.5, 5: 0.499}, (2, 0, 4): {6: 0.9, 5: 0.1}})
    found = search(step, settings, 4)
    assert found.tokens == [2, 0, 4, 6, 2]
    assert found.margins[0] == float("inf")
    assert found.margins[1] == pytest.approx(np.log(0.5 / 0.499), rel=1e-2)
    assert found.margins[2] == pytest.approx(np.log(9), rel=1e-2)
    beams = search(step, replace(settings, num_beams=2), 3)
    assert beams.tokens == [2, 0, 4, 2]
    # The winner's 0.5 against 0.499 for the other, divided by three tokens.
    assert min(beams.margins) == pytest.approx(np.log(0.5 / 0.499) / 3, rel=1e-2)
