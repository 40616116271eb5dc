"""What a beam search has found so far, for many requests at once.

Q searches · B beams · T width of the token buffers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

NEVER = -1.0e9  # transformers' "minus infinity" for beams that must not win, finite so that sums stay finite
_UNWRITTEN = float("inf")  # no log-probability

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class BeamState:
    """Q searches of B beams each.

    Attributes:
        beams: int64 [Q,2B,T,2], running beams, best first, then ended ones, best first; one beam is both, [Q,1,T,2].
            At each place are the token, start token first, and its log-probability, as the bits of a float64.
            Where nothing is written, padding and plus infinity.
        newest: int64 [Q,B], the last token of each running beam.
        scores: float32 [Q,B], summed log-probabilities of the running beams.
        finished_scores: float32 [Q,B], divided by generated length ** length_penalty.
        vacancies: float32 [Q,B], 0 where there is an ended beam at this place, ``NEVER`` where there is none.
        lengths: int64 [Q], on the host: tokens of the running beams, start token included.
        max_lengths: int64 [Q], on the host: tokens they may come to, start token included.
        length_penalties: float64 [Q], on the host.
    """

    beams: torch.Tensor
    newest: torch.Tensor
    scores: torch.Tensor
    finished_scores: torch.Tensor
    vacancies: torch.Tensor
    lengths: Array
    max_lengths: Array
    length_penalties: Array

    @property
    def num_beams(self) -> int:
        """B."""
        return self.scores.shape[1]

    @property
    def width(self) -> int:
        """T."""
        return self.beams.shape[2]

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [Q,B,T], of the running beams."""
        return self.beams[:, : self.num_beams, :, 0]

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, places: Array) -> BeamState:
        """Returns the searches at `places`, int64 [n]."""
        index = torch.from_numpy(places).to(self.beams.device, non_blocking=True)
        values = (getattr(self, field.name) for field in fields(self))
        return BeamState(*(value[index if isinstance(value, torch.Tensor) else places] for value in values))

    def resize(self, width: int, pad_token_id: int) -> BeamState:
        """Returns the same searches with T = `width`, which must hold what they have."""
        kept = min(width, self.width)
        beams = unwritten((*self.beams.shape[:2], width), pad_token_id, self.beams.device)
        beams[:, :, :kept] = self.beams[:, :, :kept]
        return BeamState(beams, *(getattr(self, field.name) for field in fields(self)[1:]))


class Ended(NamedTuple):
    """An ended beam.

    Attributes:
        tokens: int64 [length], start token first.
        token_logprobs: float32 [length].
    """

    tokens: Array
    token_logprobs: Array


def concat(states: Sequence[BeamState]) -> BeamState:
    """Joins searches of equal B and T."""
    if len(states) == 1:
        return states[0]
    columns: list[list[Any]] = [[getattr(state, field.name) for state in states] for field in fields(BeamState)]
    join: list[Any] = [torch.cat if isinstance(column[0], torch.Tensor) else np.concatenate for column in columns]
    return BeamState(*(each(column) for each, column in zip(join, columns, strict=True)))


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
    beams = unwritten((searches, num_beams if num_beams == 1 else 2 * num_beams, width), pad_token_id, device)
    for place, token in enumerate(prompt):
        written = beams[:, : None if place == 0 else num_beams, place]  # a beam that never ended has one token
        written[..., 0] = token
        written[..., 1] = 0
    # Only the first beam counts at first: the others hold the same tokens and would give each candidate again.
    scores = torch.full((searches, num_beams), NEVER, dtype=torch.float32, device=device)
    scores[:, 0] = 0
    return BeamState(
        beams=beams,
        newest=torch.full((searches, num_beams), prompt[-1], dtype=torch.int64, device=device),
        scores=scores,
        finished_scores=torch.full_like(scores, NEVER),
        vacancies=torch.full_like(scores, NEVER),
        lengths=np.full(searches, len(prompt), dtype=np.int64),
        max_lengths=np.array(max_lengths, dtype=np.int64),
        length_penalties=np.array(length_penalties, dtype=np.float64),
    )


def read_ended(state: BeamState, places: Array) -> list[Ended]:
    """Returns the first ended beam of the searches at `places`, int64 [n]; waits for the device."""
    index = torch.from_numpy(places).to(state.beams.device, non_blocking=True)
    rows = state.beams[index, -state.num_beams].cpu().numpy()
    tokens, logprobs = rows[..., 0], rows.view(np.float64)[..., 1]
    lengths = (logprobs != _UNWRITTEN).sum(axis=1)
    return [
        Ended(row_tokens[:length], row_logprobs[:length].astype(np.float32))
        for row_tokens, row_logprobs, length in zip(tokens, logprobs, lengths, strict=True)
    ]


def unwritten(shape: Sequence[int], pad_token_id: int, device: torch.device) -> torch.Tensor:
    """Returns int64 [*shape,2], places where nothing is written."""
    result = torch.full((*shape, 2), pad_token_id, dtype=torch.int64, device=device)
    result.view(torch.float64)[..., 1] = _UNWRITTEN
    return result
