"""Beam search over many requests at once, as pure functions.

The search is that of transformers' ``GenerationMixin._beam_search`` (and ``_sample`` without sampling for one
beam), number by number, so that even equal scores are ordered alike. There each batch runs until its last
item has ended; here every search has its own length, limit and length penalty, and leaves when it ends. That is
exact: an item that has ended is frozen there.

A step is three calls: ``plan`` says on the host what is known beforehand, ``advance`` does all that needs the
logits on the device, and ``judge`` tells on the host from a few numbers which searches have ended. Every
operation on a device costs a launch, whatever its size, so what is known on the host is computed there.

Q searches · B beams · V vocabulary · P columns of a plan
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from florence2_kserve.engine.beam_state import NEVER, BeamState, unwritten
from florence2_kserve.weights import GenerationSettings

# Columns of a plan; the places of the last tokens follow.
_PLACE, _DIVISOR, _IS_FIRST, _IS_DUE, _LAST_PLACES = range(5)

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Step:
    """What one step did.

    Attributes:
        state: After it.
        parents: int64 [Q,B], which beam each running beam continues.
        report: float32 [Q,2B+2], for ``judge``: score of the best running beam, finished scores, vacancies, and a
            number that is broken where the model gave NaN.
    """

    state: BeamState
    parents: torch.Tensor
    report: torch.Tensor


class Verdict(NamedTuple):
    """How searches stand after a step.

    Attributes:
        done: bool [Q], whether the search has ended; its answer is the first of the ended beams.
        is_broken: bool [Q], whether the model gave NaN.
        scores: float32 [Q], of the first of the ended beams.
    """

    done: Array
    is_broken: Array
    scores: Array


def plan(state: BeamState, settings: GenerationSettings) -> Array:
    """Returns what the next step must know of its searches: int64 [Q,P], to be moved to the device."""
    before_last = np.arange(min(1 - settings.no_repeat_ngram_size, 0), 0)
    result = np.zeros((len(state), _LAST_PLACES + len(before_last)), dtype=np.int64)
    result[:, _PLACE] = state.lengths
    result.view(np.float32)[:, 2 * _DIVISOR] = _divisor(state.lengths, state.length_penalties)
    result[:, _IS_FIRST] = state.lengths == 1
    result[:, _IS_DUE] = _is_due(state)
    result[:, _LAST_PLACES:] = np.maximum(state.lengths[:, None] + before_last, 0)
    return result


def advance(state: BeamState, logits: torch.Tensor, planned: torch.Tensor, settings: GenerationSettings) -> Step:
    """Takes every search one token further.

    Args:
        state: Searches of B beams; B = 1 is greedy search.
        logits: float32 [Q,B,V], for the token behind each running beam; overwritten.
        planned: What ``plan`` gives for `state`, on its device.
        settings: no_repeat_ngram_size, and the tokens that end, are forced and pad.

    Returns:
        New state (`state` itself is left as it was) and what happened.
    """
    if state.num_beams == 1:
        return _advance_greedily(state, logits, planned, settings)
    log_probs = torch.log_softmax(logits, dim=-1)
    probe = log_probs[:, :, 0].sum(dim=1, keepdim=True)  # one NaN spreads over its row; a forced token would hide it
    _constrain(log_probs, state, planned, settings)
    searches, beams, vocabulary = log_probs.shape
    constants = _constants(beams, settings.pad_token_id, log_probs.device)

    accumulated = (log_probs + state.scores[:, :, None]).view(searches, beams * vocabulary)
    # Twice as many as beams: each beam has one way to end, so that enough remain to go on.
    top_scores, top = accumulated.topk(2 * beams)  # [Q,2B]
    top_beams, top_tokens = top // vocabulary, top % vocabulary
    top_logprobs = log_probs.view(searches, -1).gather(1, top)
    ends = top_tokens == settings.eos_token_id
    if _is_due(state).any():
        ends |= _flags(planned, _IS_DUE)[:, None]

    # The best that haven't ended go on.
    scores, chosen = torch.add(top_scores, ends, alpha=NEVER).topk(beams)  # [Q,B]

    # Of those that have ended, only the first B of the candidates count; the best of old and new are kept.
    vacancies = torch.where(ends, constants.late, constants.never)
    divided = top_scores / _floats(planned, _DIVISOR)[:, None]
    finished_scores, kept = torch.cat([state.finished_scores, divided + vacancies], dim=1).topk(beams)
    vacancies = torch.cat([state.vacancies, vacancies], dim=1).gather(1, kept)

    # Every new beam is an old one, either left as it is or a running one with a token appended.
    own, padding, no_logprob = (row.expand(searches, -1) for row in constants.ended)
    logprob_bits = top_logprobs.double().view(torch.int64)
    candidates = torch.cat([own, top_beams, padding, top_tokens, no_logprob, logprob_bits], dim=1)
    picked = torch.cat([chosen + beams, kept], dim=1)[:, None].expand(-1, 3, -1)
    new = candidates.view(searches, 3, 3 * beams).gather(2, picked)  # [Q,3,2B]: source, token, log-probability

    return Step(
        state=BeamState(
            _grow(state.beams, planned, new),
            new[:, 1, :beams],
            scores,
            finished_scores,
            vacancies,
            state.lengths + 1,
            state.max_lengths,
            state.length_penalties,
        ),
        parents=new[:, 0, :beams],
        report=torch.cat([scores[:, :1], finished_scores, vacancies, probe], dim=1),
    )


def judge(state: BeamState, report: Array, settings: GenerationSettings) -> Verdict:
    """Tells which searches have ended.

    Args:
        state: After the step.
        report: Of the step, on the host.
        settings: early_stopping.
    """
    beams = state.num_beams
    finished_scores, vacancies, probe = report[:, 1 : 1 + beams], report[:, 1 + beams : -1], report[:, -1]
    # Each beam has one way to end, so that some always goes on before the last token.
    is_over = state.lengths >= state.max_lengths
    if beams == 1:
        return Verdict((vacancies[:, 0] == 0) | is_over, ~np.isfinite(probe), finished_scores[:, 0])
    # Whether the best running beam might still beat the worst finished one.
    hypothetical = state.lengths - 1
    if settings.early_stopping == "never":
        hypothetical = np.where(state.length_penalties > 0, state.max_lengths - 1, hypothetical)
    with np.errstate(all="ignore"):
        best = report[:, :1] / _divisor(hypothetical, state.length_penalties)[:, None]
    worst = np.where(vacancies == 0, finished_scores.min(axis=1, keepdims=True), np.float32(NEVER))
    goes_on = (best > worst).any(axis=1) & ~is_over
    if settings.early_stopping is True:
        goes_on &= (vacancies != 0).any(axis=1)
    return Verdict(~goes_on, np.isnan(probe), finished_scores[:, 0])


def _advance_greedily(
    state: BeamState, logits: torch.Tensor, planned: torch.Tensor, settings: GenerationSettings
) -> Step:
    """The most probable token, by its logit: a log-probability may round two of them to one."""
    normaliser = logits.logsumexp(dim=-1)  # [Q,1]
    is_forced = _constrain(logits, state, planned, settings)
    new_tokens = logits.argmax(dim=-1)  # [Q,1]
    new_logprobs = logits.gather(2, new_tokens[:, :, None])[:, :, 0] - normaliser
    if is_forced is not None:
        new_logprobs.masked_fill_(is_forced[:, None], 0)
    new = torch.stack([new_tokens, new_logprobs.double().view(torch.int64)], dim=-1)  # [Q,1,2]
    scores = state.scores + new_logprobs
    finished_scores = scores / _floats(planned, _DIVISOR)[:, None]
    constants = _constants(1, settings.pad_token_id, logits.device)
    vacancies = torch.where(new_tokens == settings.eos_token_id, constants.late[:1], constants.never)
    return Step(
        state=BeamState(
            state.beams.scatter(2, _places(planned, state.beams), new[:, :, None]),
            new_tokens,
            scores,
            finished_scores,
            vacancies,
            state.lengths + 1,
            state.max_lengths,
            state.length_penalties,
        ),
        parents=torch.zeros_like(new_tokens),
        report=torch.cat([scores, finished_scores, vacancies, normaliser], dim=1),
    )


def _grow(beams: torch.Tensor, planned: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns the beams that `new`, [Q,3,2B], names first, with the tokens and log-probabilities that follow there."""
    grown = beams[_numbers(len(new), beams.device)[:, None], new[:, 0]]
    return grown.scatter_(2, _places(planned, grown), new[:, 1:].transpose(1, 2)[:, :, None])


def _divisor(lengths: Array, length_penalties: Array) -> Array:
    """Returns float32 [Q]: generated length ** length_penalty, for beams of `lengths` without the start token."""
    with np.errstate(all="ignore"):
        return (lengths.astype(np.float64) ** length_penalties).astype(np.float32)


def _is_due(state: BeamState) -> Array:
    """Returns bool [Q]: whether the next token is the last one that there is room for."""
    return state.lengths + 1 >= state.max_lengths


def _constrain(
    scores: torch.Tensor, state: BeamState, planned: torch.Tensor, settings: GenerationSettings
) -> torch.Tensor | None:
    """Sets what may not come next to -inf, in place: float32 [Q,B,V]. Nothing is renormalised.

    Returns:
        bool [Q], whether the next token is forced; None where none is.
    """
    if settings.no_repeat_ngram_size > 0:
        _ban_repeats(scores, state, planned, settings.no_repeat_ngram_size)
    is_forced: torch.Tensor | None = None
    for token, column, applies in (
        (settings.forced_bos_token_id, _IS_FIRST, state.lengths == 1),
        (settings.forced_eos_token_id, _IS_DUE, _is_due(state)),
    ):
        if token is not None and applies.any():
            where = _flags(planned, column)
            scores.masked_fill_(where[:, None, None], -torch.inf)
            scores[:, :, token].masked_fill_(where[:, None], 0)
            is_forced = where if is_forced is None else is_forced | where
    return is_forced


def _ban_repeats(scores: torch.Tensor, state: BeamState, planned: torch.Tensor, size: int) -> None:
    """Bans each token that would complete a sequence of `size` tokens which the beam already holds.

    Args:
        scores: float32 [Q,B,V], changed in place.
        state: The searches.
        planned: Their plan.
        size: Tokens in a sequence.
    """
    longest = int(state.lengths.max(initial=0))
    windows = longest - size + 1
    if windows <= 0:
        return
    tokens = state.tokens[:, :, :longest]
    last = tokens.gather(2, planned[:, None, _LAST_PLACES:].expand(-1, tokens.shape[1], -1))  # [Q,B,size-1]
    ends = _numbers(longest + 1, tokens.device)[size:]
    matches = (ends <= planned[:, _PLACE, None])[:, None]  # [Q,1,W]
    for offset in range(size - 1):
        matches = matches & (tokens[:, :, offset : offset + windows] == last[:, :, offset, None])
    completing = tokens[:, :, size - 1 :]  # [Q,B,W]
    # The minimum with +inf leaves a score alone, so that no index has to be looked up on the host.
    banned, allowed = _infinities(scores.device)
    bans = torch.where(matches, banned, allowed).expand_as(completing)
    scores.scatter_reduce_(2, completing, bans, reduce="amin", include_self=True)


# Views of a plan: the bytes of a number are another one, or a truth value, on machines that put the lowest first.


def _floats(planned: torch.Tensor, column: int) -> torch.Tensor:
    return planned.view(torch.float32)[:, 2 * column]


def _flags(planned: torch.Tensor, column: int) -> torch.Tensor:
    return planned.view(torch.bool)[:, 8 * column]


def _places(planned: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """Returns int64 [Q,beams,1,2], where the next token of each search goes."""
    return planned[:, _PLACE, None, None, None].expand(-1, beams.shape[1], 1, 2)


# What never changes is made once for each device.


class _Constants(NamedTuple):
    late: torch.Tensor  # float32 [2B], what an ending candidate's score loses: the second half doesn't count
    never: torch.Tensor  # float32 []
    ended: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # int64 [1,B], what appending nothing to an ended beam is


@lru_cache(maxsize=64)
def _constants(beams: int, pad_token_id: int, device: torch.device) -> _Constants:
    padding, no_logprob = unwritten((1, beams), pad_token_id, device).unbind(dim=-1)
    return _Constants(
        late=torch.tensor([0.0] * beams + [NEVER] * beams, dtype=torch.float32, device=device),
        never=torch.tensor(NEVER, dtype=torch.float32, device=device),
        ended=(torch.arange(beams, 2 * beams, device=device)[None], padding, no_logprob),
    )


@lru_cache(maxsize=8)
def _infinities(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    negative, positive = torch.tensor([-torch.inf, torch.inf], dtype=torch.float32, device=device)
    return negative, positive


def _numbers(count: int, device: torch.device) -> torch.Tensor:
    """Returns int64 [count], counting from 0."""
    return _first_numbers(max(64, 1 << (count - 1).bit_length()), device)[:count]


@lru_cache(maxsize=64)
def _first_numbers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)
