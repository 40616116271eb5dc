"""Beam search over many requests at once, as pure functions on tensors.

The search is that of transformers' ``GenerationMixin._beam_search`` (and ``_sample`` without sampling for one
beam), operation by operation, so that even equal scores are ordered alike. There each batch runs until its last
item has ended; here every search has its own length, limit and length penalty, and leaves when it ends. That is
exact: an item that has ended is frozen there.

Q searches · B beams · V vocabulary · T width of the token buffers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from florence2_kserve.weights import GenerationSettings

NEVER = -1.0e9  # transformers' "minus infinity" for beams that must not win, finite so that sums stay finite


@dataclass(slots=True)
class BeamState:
    """Q searches of B beams each.

    Attributes:
        tokens: int64 [Q,B,T], running beams, best first, start token included; padding behind `lengths`.
        token_logprobs: float32 [Q,B,T], aligned with `tokens`.
        scores: float32 [Q,B], summed log-probabilities of the running beams.
        finished_tokens: int64 [Q,B,T], ended beams, best first.
        finished_logprobs: float32 [Q,B,T].
        finished_scores: float32 [Q,B], divided by generated length ** length_penalty.
        finished_lengths: int64 [Q,B], start token included.
        is_finished: bool [Q,B], whether there is an ended beam at this place.
        lengths: int64 [Q], tokens of the running beams, start token included.
        max_lengths: int64 [Q], tokens they may come to, start token included.
        length_penalties: float64 [Q].
    """

    tokens: torch.Tensor
    token_logprobs: torch.Tensor
    scores: torch.Tensor
    finished_tokens: torch.Tensor
    finished_logprobs: torch.Tensor
    finished_scores: torch.Tensor
    finished_lengths: torch.Tensor
    is_finished: torch.Tensor
    lengths: torch.Tensor
    max_lengths: torch.Tensor
    length_penalties: torch.Tensor

    @property
    def num_beams(self) -> int:
        """B."""
        return self.tokens.shape[1]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, index: torch.Tensor | slice) -> BeamState:
        """Returns the searches at `index`: int64 [n], or a slice, which copies nothing."""
        return BeamState(*(getattr(self, field.name)[index] for field in fields(self)))

    def resize(self, width: int, pad_token_id: int) -> BeamState:
        """Returns the same searches with T = `width`, which must hold what they have."""
        more = width - self.tokens.shape[2]

        def resized(tensor: torch.Tensor, value: float) -> torch.Tensor:
            return F.pad(tensor, (0, more), value=value) if more > 0 else tensor[..., :width].contiguous()

        return BeamState(
            resized(self.tokens, pad_token_id),
            resized(self.token_logprobs, 0),
            self.scores,
            resized(self.finished_tokens, pad_token_id),
            resized(self.finished_logprobs, 0),
            *(getattr(self, field.name) for field in fields(self)[5:]),
        )


@dataclass(slots=True)
class Step:
    """What one step did.

    Attributes:
        state: After it.
        parents: int64 [Q,B], which beam each running beam continues.
        done: bool [Q], whether the search has ended; its answer is the first of the finished beams.
        is_broken: bool [Q], whether the model gave NaN.
    """

    state: BeamState
    parents: torch.Tensor
    done: torch.Tensor
    is_broken: torch.Tensor


def concat(states: Sequence[BeamState]) -> BeamState:
    """Joins searches of equal B and T."""
    if len(states) == 1:
        return states[0]
    return BeamState(*(torch.cat([getattr(state, field.name) for state in states]) for field in fields(BeamState)))


def start(
    prompt: Sequence[int],
    num_beams: int,
    max_lengths: Sequence[int],
    length_penalties: Sequence[float],
    *,
    width: int,
    pad_token_id: int,
    device: torch.device,
) -> BeamState:
    """Begins searches, all with the same first tokens.

    Args:
        prompt: First tokens: the start token, and a forced first one where there is any.
        num_beams: B.
        max_lengths: Limit of each search, start token included.
        length_penalties: Of each search.
        width: T.
        pad_token_id: Fills what is not yet written.
        device: Where the state lives.
    """
    searches = len(max_lengths)
    tokens = torch.full((searches, num_beams, width), pad_token_id, dtype=torch.int64, device=device)
    for place, token in enumerate(prompt):
        tokens[:, :, place] = token
    zeros = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    # Only the first beam counts at first: the others hold the same tokens and would give each candidate again.
    scores = torch.full((searches, num_beams), NEVER, dtype=torch.float32, device=device)
    scores[:, 0] = 0
    return BeamState(
        tokens=tokens,
        token_logprobs=zeros,
        scores=scores,
        finished_tokens=tokens.clone(),
        finished_logprobs=zeros.clone(),
        finished_scores=torch.full_like(scores, NEVER),
        finished_lengths=torch.ones_like(scores, dtype=torch.int64),
        is_finished=torch.zeros_like(scores, dtype=torch.bool),
        lengths=torch.full((searches,), len(prompt), dtype=torch.int64, device=device),
        max_lengths=torch.tensor(max_lengths, dtype=torch.int64).to(device, non_blocking=True),
        length_penalties=torch.tensor(length_penalties, dtype=torch.float64).to(device, non_blocking=True),
    )


def advance(state: BeamState, logits: torch.Tensor, settings: GenerationSettings, *, forces: bool = True) -> Step:
    """Takes every search one token further.

    Args:
        state: Searches of B beams; B = 1 is greedy search.
        logits: float32 [Q,B,V], for the token behind each running beam; overwritten.
        settings: early_stopping, no_repeat_ngram_size and the forced tokens.
        forces: Whether a forced token may be due in any search; False spares looking.

    Returns:
        New state (`state` itself is left as it was) and what happened.
    """
    if state.num_beams == 1:
        return _advance_greedily(state, logits, settings, forces)
    log_probs = torch.log_softmax(logits, dim=-1)
    is_broken = log_probs[:, :, 0].isnan().any(dim=1)  # one NaN spreads over its row; a forced token would hide it
    log_probs = _constrain(log_probs, state, settings, forces)
    searches, beams, vocabulary = log_probs.shape
    lanes = torch.arange(searches, device=logits.device)[:, None]

    accumulated = (log_probs + state.scores[:, :, None]).view(searches, beams * vocabulary)
    # Twice as many as beams: each beam has one way to end, so that enough remain to go on.
    top_scores, top = accumulated.topk(2 * beams)  # [Q,2B]
    top_beams, top_tokens = top // vocabulary, top % vocabulary
    top_logprobs = log_probs.view(searches, -1).gather(1, top)
    ends = (top_tokens == settings.eos_token_id) | (state.lengths + 1 >= state.max_lengths)[:, None]
    place = state.lengths[:, None, None]

    # The best that haven't ended go on.
    running_scores = top_scores + ends.float() * NEVER
    chosen = running_scores.topk(beams).indices  # [Q,B]
    parents, new_tokens, new_logprobs = (each.gather(1, chosen) for each in (top_beams, top_tokens, top_logprobs))
    scores = running_scores.gather(1, chosen)
    tokens = state.tokens[lanes, parents].scatter_(2, place.expand(-1, beams, 1), new_tokens[:, :, None])
    token_logprobs = state.token_logprobs[lanes, parents].scatter_(
        2, place.expand(-1, beams, 1), new_logprobs[:, :, None]
    )

    # Of those that have ended, only the first B of the candidates count; the best of old and new are kept.
    finishes = ends.clone()
    finishes[:, beams:] = False
    divided = top_scores / _divisor(state.lengths, state.length_penalties)[:, None]
    merged_scores = torch.cat([state.finished_scores, divided + (~finishes).float() * NEVER], dim=1)  # [Q,3B]
    finished_scores, kept = merged_scores.topk(beams)
    is_finished = torch.cat([state.is_finished, finishes], dim=1).gather(1, kept)
    ended_at = (state.lengths + 1)[:, None].expand(-1, 2 * beams)
    finished_lengths = torch.cat([state.finished_lengths, ended_at], dim=1).gather(1, kept)
    # What is kept is either an old finished beam or a running one with a token appended.
    own = torch.arange(beams, device=logits.device).expand(searches, -1)
    source = torch.cat([own, top_beams + beams], dim=1).gather(1, kept)
    is_new = (kept >= beams)[:, :, None]
    newest = (kept - beams).clamp_(min=0)

    def finished(old: torch.Tensor, running: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        merged = torch.cat([old, running], dim=1)[lanes, source]  # [Q,B,T]
        index = place.expand(-1, beams, 1)
        last = torch.where(is_new, last.gather(1, newest)[:, :, None], merged.gather(2, index))
        return merged.scatter_(2, index, last)

    finished_tokens = finished(state.finished_tokens, state.tokens, top_tokens)
    finished_logprobs = finished(state.finished_logprobs, state.token_logprobs, top_logprobs)

    lengths = state.lengths + 1
    going_on = _can_improve(
        scores, finished_scores, is_finished, lengths, state.max_lengths, state.length_penalties, settings
    )
    if settings.early_stopping is True:
        going_on &= ~is_finished.all(dim=1)
    return Step(
        state=BeamState(
            tokens,
            token_logprobs,
            scores,
            finished_tokens,
            finished_logprobs,
            finished_scores,
            finished_lengths,
            is_finished,
            lengths,
            state.max_lengths,
            state.length_penalties,
        ),
        parents=parents,
        done=~going_on | ends.all(dim=1),
        is_broken=is_broken,
    )


def _advance_greedily(state: BeamState, logits: torch.Tensor, settings: GenerationSettings, forces: bool) -> Step:
    """The most probable token, by its logit: a log-probability may round two of them to one."""
    normaliser = logits.logsumexp(dim=-1)  # [Q,1]
    logits = _constrain(logits, state, settings, forces)
    new_tokens = logits.argmax(dim=-1)  # [Q,1]
    new_logprobs = logits.gather(2, new_tokens[:, :, None])[:, :, 0] - normaliser
    if forces:
        new_logprobs.masked_fill_(_is_forced(state, settings)[:, None], 0)
    place = state.lengths[:, None, None]
    tokens = state.tokens.scatter(2, place, new_tokens[:, :, None])
    token_logprobs = state.token_logprobs.scatter(2, place, new_logprobs[:, :, None])
    scores = state.scores + new_logprobs
    lengths = state.lengths + 1
    done = (new_tokens[:, 0] == settings.eos_token_id) | (lengths >= state.max_lengths)
    return Step(
        state=BeamState(
            tokens=tokens,
            token_logprobs=token_logprobs,
            scores=scores,
            finished_tokens=tokens,
            finished_logprobs=token_logprobs,
            finished_scores=scores / _divisor(state.lengths, state.length_penalties)[:, None],
            finished_lengths=lengths[:, None],
            is_finished=done[:, None],
            lengths=lengths,
            max_lengths=state.max_lengths,
            length_penalties=state.length_penalties,
        ),
        parents=torch.zeros_like(new_tokens),
        done=done,
        is_broken=~normaliser.isfinite().all(dim=1),
    )


def _divisor(lengths: torch.Tensor, length_penalties: torch.Tensor) -> torch.Tensor:
    """Returns float32 [Q]: generated length ** length_penalty, for beams of `lengths` without the start token."""
    return (lengths.double() ** length_penalties).float()


def _can_improve(
    scores: torch.Tensor,
    finished_scores: torch.Tensor,
    is_finished: torch.Tensor,
    lengths: torch.Tensor,
    max_lengths: torch.Tensor,
    length_penalties: torch.Tensor,
    settings: GenerationSettings,
) -> torch.Tensor:
    """Returns bool [Q]: whether the best running beam might still beat the worst finished one."""
    hypothetical = lengths - 1
    if settings.early_stopping == "never":
        hypothetical = torch.where(length_penalties > 0, max_lengths - 1, hypothetical)
    best = scores[:, :1] / _divisor(hypothetical, length_penalties)[:, None]
    worst = torch.where(is_finished, finished_scores.min(dim=1, keepdim=True).values, NEVER)  # [Q,B]
    return (best > worst).any(dim=1)


def _constrain(scores: torch.Tensor, state: BeamState, settings: GenerationSettings, forces: bool) -> torch.Tensor:
    """Sets what may not come next to -inf, in place: float32 [Q,B,V]. Nothing is renormalised."""
    if settings.no_repeat_ngram_size > 0:
        _ban_repeats(scores, state.tokens, state.lengths, settings.no_repeat_ngram_size)
    if forces:
        if settings.forced_bos_token_id is not None:
            _force(scores, state.lengths == 1, settings.forced_bos_token_id)
        if settings.forced_eos_token_id is not None:
            _force(scores, state.lengths == state.max_lengths - 1, settings.forced_eos_token_id)
    return scores


def _is_forced(state: BeamState, settings: GenerationSettings) -> torch.Tensor:
    """Returns bool [Q]: whether the next token is forced."""
    forced = torch.zeros_like(state.lengths, dtype=torch.bool)
    if settings.forced_bos_token_id is not None:
        forced |= state.lengths == 1
    if settings.forced_eos_token_id is not None:
        forced |= state.lengths == state.max_lengths - 1
    return forced


def _force(scores: torch.Tensor, where: torch.Tensor, token: int) -> None:
    scores.masked_fill_(where[:, None, None], -torch.inf)
    scores[:, :, token].masked_fill_(where[:, None], 0)


def _ban_repeats(scores: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, size: int) -> None:
    """Bans each token that would complete a sequence of `size` tokens which the beam already holds.

    Args:
        scores: float32 [Q,B,V], changed in place.
        tokens: int64 [Q,B,T].
        lengths: int64 [Q].
        size: Tokens in a sequence.
    """
    windows = tokens.shape[2] - size + 1
    if windows <= 0:
        return
    starts = torch.arange(windows, device=tokens.device)
    matches = (starts + size <= lengths[:, None])[:, None, :]  # [Q,1,W]
    for offset in range(size - 1):
        last = (lengths - (size - 1) + offset).clamp(min=0)[:, None, None].expand(-1, tokens.shape[1], 1)
        matches = matches & (tokens[:, :, offset : offset + windows] == tokens.gather(2, last))
    completing = tokens[:, :, size - 1 :]  # [Q,B,W]
    # The minimum with +inf leaves a score alone, so that no index has to be looked up on the host.
    bans = torch.where(matches, -torch.inf, torch.inf).to(scores.dtype).expand_as(completing)
    scores.scatter_reduce_(2, completing, bans, reduce="amin", include_self=True)
