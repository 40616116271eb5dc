"""Greedy and beam search written plainly: one request, Python lists, nothing fast.

An oracle beside transformers' ``generate``: it says in plain steps what a search does, so that a
difference can be traced to the step and the rule that caused it. `search` also tells how close
each step's decisions were, which rounding may turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from florence2_kserve.weights import GenerationSettings

Step = Callable[[list[int]], torch.Tensor]
"""Tokens so far, start token first, to float32 logits [V] of the next."""

# What an empty or ended place in a beam scores: worse than any sequence, but finite.
NOTHING = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        tokens: The best sequence, start token first, end token last where it has one.
        score: Its summed log-probability / generated length ** length_penalty.
        token_logprobs: Log-probability of each of `tokens`; 0 for the start token and forced ones.
        margins: For each step, the smallest difference between a score that was preferred and one
            that lost to it, wherever that decided what is kept, what ends or whether to go on;
            infinite where nothing was to be decided.
    """

    tokens: list[int]
    score: float
    token_logprobs: list[float]
    margins: list[float]


@dataclass(frozen=True, slots=True)
class _Beam:
    tokens: list[int]
    score: np.float32  # summed log-probability; of a finished one, divided by the length penalty
    token_logprobs: list[float] = field(default_factory=lambda: [0.0])

    def grown(self, token: int, score: np.float32, logprob: float) -> _Beam:
        return _Beam([*self.tokens, token], score, [*self.token_logprobs, logprob])


def search(
    step: Step,
    settings: GenerationSettings,
    max_new_tokens: int,
    *,
    num_beams: int | None = None,
    length_penalty: float | None = None,
) -> Found:
    """Generates for one request.

    Args:
        step: The model.
        settings: How the checkpoint wants to be decoded.
        max_new_tokens: Bound on generated tokens, at least 1.
        num_beams: 1 for greedy search; None takes that of `settings`.
        length_penalty: None takes that of `settings`.
    """
    settings = replace(
        settings,
        num_beams=settings.num_beams if num_beams is None else num_beams,
        length_penalty=settings.length_penalty if length_penalty is None else length_penalty,
    )
    if settings.num_beams == 1:
        return _greedy_search(step, settings, max_new_tokens)
    return _beam_search(step, settings, max_new_tokens)


def _greedy_search(step: Step, settings: GenerationSettings, max_new_tokens: int) -> Found:
    beam, margins = _Beam([settings.decoder_start_token_id], np.float32(0)), []
    while len(beam.tokens) <= max_new_tokens:
        logits = step(beam.tokens).float()
        allowed = _constrained(logits.numpy(), beam.tokens, settings, max_new_tokens)
        # The first of equals.
        best, second = np.argsort(-allowed, kind="stable")[:2]
        margins.append(_gap(allowed[best], allowed[second]))
        logprob = _log_softmax(logits)[best] if _forced(beam.tokens, settings, max_new_tokens) is None else 0.0
        beam = beam.grown(int(best), np.float32(beam.score + logprob), float(logprob))
        if best == settings.eos_token_id:
            break
    score = beam.score / np.float32((len(beam.tokens) - 1) ** settings.length_penalty)
    return Found(beam.tokens, float(score), beam.token_logprobs, margins)


def _beam_search(step: Step, settings: GenerationSettings, max_new_tokens: int) -> Found:
    width = settings.num_beams
    # All beams start alike; that all but one are nothing keeps them from growing alike.
    running = [
        _Beam([settings.decoder_start_token_id], np.float32(0) if index == 0 else NOTHING) for index in range(width)
    ]
    finished: list[_Beam] = []
    margins = []
    for length in range(1, max_new_tokens + 1):  # generated tokens after this step
        logprobs = np.stack(
            [
                _constrained(_log_softmax(step(beam.tokens).float()), beam.tokens, settings, max_new_tokens)
                for beam in running
            ]
        )
        totals = logprobs + np.array([beam.score for beam in running])[:, None]  # float32 [width, V]
        # As many again as there are beams, as each beam may propose its end, which can't go on.
        order = np.argsort(-totals, axis=None, kind="stable")[: 2 * width + 1]
        candidates = [
            running[index].grown(int(token), totals[index, token], float(logprobs[index, token]))
            for index, token in zip(*np.unravel_index(order, totals.shape), strict=True)
        ]
        ended = [beam.tokens[-1] == settings.eos_token_id or length == max_new_tokens for beam in candidates]
        margin = _margin_of_candidates(candidates, ended, width)

        # Only ends among the best few count; the others are worse than what goes on.
        penalty = np.float32(length**settings.length_penalty)
        best_few = zip(candidates[:width], ended[:width], strict=True)
        new = [replace(beam, score=beam.score / penalty) for beam, is_over in best_few if is_over]
        merged = sorted([*finished, *new], key=lambda beam: -beam.score)  # stable: older ones first
        finished = merged[:width]
        if new and len(merged) > width:
            margin = min(margin, _gap(merged[width - 1].score, merged[width].score))

        going_on = [beam for beam, is_over in zip(candidates[: 2 * width], ended, strict=False) if not is_over]
        running = going_on[:width]
        if not running:
            margins.append(_margin_of_winner(finished, margin))
            break
        is_full = len(finished) == width
        if is_full:
            hopeful_length = length
            if settings.early_stopping == "never" and settings.length_penalty > 0:
                hopeful_length = max_new_tokens
            hope = running[0].score / np.float32(hopeful_length**settings.length_penalty)
            worst = finished[-1].score
            if settings.early_stopping is True or hope <= worst:
                margins.append(_margin_of_winner(finished, margin))
                break
            margin = min(margin, _gap(hope, worst))
        margins.append(margin)
    best = finished[0]
    return Found(best.tokens, float(best.score), best.token_logprobs, margins)


def _log_softmax(logits: torch.Tensor) -> np.ndarray:
    return torch.log_softmax(logits, dim=-1).numpy()


def _forced(tokens: list[int], settings: GenerationSettings, max_new_tokens: int) -> int | None:
    """Returns the token that must follow `tokens`, None where any may; the last step's outdoes the first's."""
    if len(tokens) == max_new_tokens and settings.forced_eos_token_id is not None:
        return settings.forced_eos_token_id
    if len(tokens) == 1 and settings.forced_bos_token_id is not None:
        return settings.forced_bos_token_id
    return None


def _constrained(
    scores: np.ndarray, tokens: list[int], settings: GenerationSettings, max_new_tokens: int
) -> np.ndarray:
    """Returns `scores` of the next token, float32 [V], with what may not follow at minus infinity."""
    forced = _forced(tokens, settings, max_new_tokens)
    if forced is not None:
        only = np.full_like(scores, -math.inf)
        only[forced] = 0
        return only
    allowed = scores.copy()
    allowed[list(banned_tokens(tokens, settings.no_repeat_ngram_size))] = -math.inf
    return allowed


def banned_tokens(tokens: list[int], size: int) -> set[int]:
    """Returns what would complete a sequence of `size` tokens that occurs in `tokens` already."""
    if size == 0:
        return set()
    begun = tokens[len(tokens) - size + 1 :] if len(tokens) >= size - 1 else None
    return {tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == begun}


def _gap(preferred: np.float32, other: np.float32) -> float:
    """Returns by how much one score beats another; infinite where the other isn't a real one."""
    if not np.isfinite(other) or other <= NOTHING / 2:
        return math.inf
    return float(preferred) - float(other)


def _margin_of_candidates(candidates: list[_Beam], ended: list[bool], width: int) -> float:
    margin = math.inf
    # Which ones go on.
    going_on = [beam.score for beam, is_over in zip(candidates, ended, strict=True) if not is_over]
    if len(going_on) > width:
        margin = _gap(going_on[width - 1], going_on[width])
    # Which ends are among the best few.
    if ended[width - 1] or ended[width]:
        margin = min(margin, _gap(candidates[width - 1].score, candidates[width].score))
    return margin


def _margin_of_winner(finished: list[_Beam], margin: float) -> float:
    return min(margin, _gap(finished[0].score, finished[1].score)) if len(finished) > 1 else margin
