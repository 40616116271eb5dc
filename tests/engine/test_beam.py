"""The search by itself, on a language model made of random numbers: many searches at once against one at a time."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from florence2_kserve.benchmark.models import GENERATION
from florence2_kserve.engine import beam
from florence2_kserve.engine.beam_state import BeamState, concat, read_ended, start
from florence2_kserve.weights import GenerationSettings

from .reference_search import search

VOCABULARY, START, BOS, EOS, PAD = 40, 2, 0, 2, 1


def settings(**changes) -> GenerationSettings:
    return replace(GENERATION, **changes)


def language(seed: int, sharpness: float = 2.0) -> Callable[[list[int]], torch.Tensor]:
    """Returns a model whose next token depends on the last two and on how many there are."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn((2 * VOCABULARY, VOCABULARY), generator=generator) * sharpness
    ends = torch.linspace(-2, 4, 30)

    def logits(tokens: list[int]) -> torch.Tensor:
        before = tokens[-2] if len(tokens) > 1 else PAD
        result = table[tokens[-1]] + table[VOCABULARY + before]
        result[EOS] += ends[min(len(tokens), 29)]
        return result

    return logits


@dataclass
class Search:
    max_new_tokens: int
    length_penalty: float
    starts_at: int
    answer: tuple[list[int], float, list[float]] | None = None


def advance(state: BeamState, logits: torch.Tensor, chosen: GenerationSettings) -> tuple[BeamState, beam.Verdict]:
    step = beam.advance(state, logits, torch.from_numpy(beam.plan(state, chosen)), chosen)
    return step.state, beam.judge(step.state, step.report.numpy(), chosen)


def run(
    searches: list[Search], num_beams: int, model: Callable[[list[int]], torch.Tensor], chosen: GenerationSettings
) -> None:
    """Runs all, each joining at its step and leaving when it ends."""
    state: BeamState | None = None
    inside: list[Search] = []
    step = 0
    while inside or any(each.starts_at >= step for each in searches):
        joining = [each for each in searches if each.starts_at == step]
        if joining:
            new = start(
                (START,),
                num_beams,
                [1 + each.max_new_tokens for each in joining],
                [each.length_penalty for each in joining],
                width=40,
                pad_token_id=PAD,
                device=torch.device("cpu"),
            )
            state = new if state is None else concat([state, new])
            inside.extend(joining)
        step += 1
        if state is None or not inside:
            continue
        logits = torch.stack(
            [
                torch.stack([model(row[:length].tolist()) for row in rows])
                for rows, length in zip(state.tokens, state.lengths.tolist(), strict=True)
            ]
        )
        old, before = state, copy.deepcopy(state)
        state, verdict = advance(state, logits, chosen)
        for each in fields(BeamState):  # a pure function: a step that failed can be taken again
            assert (getattr(before, each.name) == getattr(old, each.name)).all()
        assert not verdict.is_broken.any()
        over = np.flatnonzero(verdict.done)
        for place, ended in zip(over, read_ended(state, over), strict=True):
            inside[place].answer = (
                ended.tokens.tolist(),
                float(verdict.scores[place]),
                ended.token_logprobs.tolist(),
            )
        kept = np.flatnonzero(~verdict.done)
        inside = [inside[place] for place in kept]
        state = state.select(kept)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("num_beams", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_repeat_ngram_size": 0},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"forced_bos_token_id": None},
        {"forced_eos_token_id": None},
        {"forced_bos_token_id": None, "forced_eos_token_id": None, "no_repeat_ngram_size": 0},
    ],
    ids=str,
)
def test_many_searches_at_once_find_what_each_finds_alone(early_stopping, num_beams, changes):
    chance = random.Random(f"{early_stopping} {num_beams} {changes}")
    chosen = settings(early_stopping=early_stopping, **changes)
    model = language(chance.randrange(1000))
    searches = [
        Search(chance.choice((1, 2, 3, 8, 30)), chance.choice((0.0, 0.5, 1.0, 2.0, -1.0)), chance.randrange(12))
        for _ in range(12)
    ]
    run(searches, num_beams, model, chosen)
    for each in searches:
        found = search(model, chosen, each.max_new_tokens, num_beams=num_beams, length_penalty=each.length_penalty)
        assert each.answer is not None
        tokens, score, logprobs = each.answer
        assert tokens == found.tokens
        assert score == pytest.approx(found.score, rel=1e-5, abs=1e-5)
        assert logprobs == pytest.approx(found.token_logprobs, rel=1e-5, abs=1e-5)


def test_the_model_of_these_tests_ends_early_and_repeats_itself():
    """Else they would prove little."""
    model, lengths, differ = language(3), [], 0
    for limit in range(5, 30):
        with_ban = search(model, settings(no_repeat_ngram_size=2), limit)
        differ += with_ban.tokens != search(model, settings(no_repeat_ngram_size=0), limit).tokens
        lengths.append(len(with_ban.tokens) - 1 < limit)
    assert sum(lengths) > 5
    assert differ > 0


@pytest.mark.parametrize("num_beams", [1, 3])
def test_nan_is_reported_and_stays_in_its_search(num_beams):
    state = start((START, BOS), num_beams, [20] * 3, [1.0] * 3, width=20, pad_token_id=PAD, device=torch.device("cpu"))
    logits = torch.randn((3, num_beams, VOCABULARY), generator=torch.Generator().manual_seed(0))
    clean, _ = advance(state, logits.clone(), settings())
    logits[1, 0, 7] = torch.nan
    result, verdict = advance(state, logits, settings())
    assert verdict.is_broken.tolist() == [False, True, False]
    for place in (0, 2):
        assert torch.equal(result.beams[place], clean.beams[place])
        assert torch.equal(result.scores[place], clean.scores[place])


def test_buffers_can_be_made_wider_and_narrower():
    state = start((START, BOS), 3, [9], [1.0], width=8, pad_token_id=PAD, device=torch.device("cpu"))
    wider = state.resize(16, PAD)
    assert wider.tokens.shape == (1, 3, 16)
    assert (wider.tokens[:, :, 2:] == PAD).all()
    narrow = wider.resize(4, PAD)
    assert narrow.tokens[0, 0].tolist() == [START, BOS, PAD, PAD]
    assert torch.equal(narrow.scores, state.scores)


def test_the_best_is_kept_of_what_ended_before_and_now():
    chosen = settings(no_repeat_ngram_size=0, early_stopping=False)
    state = start((START, BOS), 2, [9], [1.0], width=8, pad_token_id=PAD, device=torch.device("cpu"))
    logits = torch.full((1, 2, VOCABULARY), -20.0)
    logits[:, :, [5, EOS]] = torch.tensor([1.0, 0.0])
    state, verdict = advance(state, logits.clone(), chosen)
    assert not verdict.done.any()
    (first,) = read_ended(state, np.array([0]))
    assert first.tokens.tolist() == [START, BOS, EOS]
    logits[:, 0, [5, EOS]] = torch.tensor([0.0, 5.0])
    state, verdict = advance(state, logits, chosen)
    (better,) = read_ended(state, np.array([0]))
    assert better.tokens.tolist() == [START, BOS, 5, EOS]
    assert verdict.scores[0] == pytest.approx(sum(better.token_logprobs) / 3)
    assert state.vacancies.tolist() == [[0, 0]]
    assert state.beams[0, 3, :3, 0].tolist() == [START, BOS, EOS]


def test_a_search_that_never_ended_has_its_first_token_alone():
    state = start((START, BOS), 3, [9], [1.0], width=8, pad_token_id=PAD, device=torch.device("cpu"))
    (ended,) = read_ended(state, np.array([0]))
    assert ended.tokens.tolist() == [START]
    assert ended.token_logprobs.tolist() == [0]
