"""Ends each row of a batch at its own length."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class EndRowsAtTheirLength(LogitsProcessor):
    """Leaves rows that have reached their limit no token but the end.

    ``generate`` has one limit for the whole batch, requests have their own.

    Args:
        limits: Tokens each row may generate, the end token counted.
        num_beams: Beams a row, which follow each other.
        eos_token_id: The end token.
        device: Where logits are.
    """

    def __init__(self, limits: list[int], num_beams: int, eos_token_id: int, device: torch.device) -> None:
        self._limits = torch.tensor(limits, device=device).repeat_interleave(num_beams)  # [B*K]
        self._eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Returns `scores`, float [B*K,V], with rows that end at this token changed."""
        ended = self._limits <= input_ids.shape[1]  # the start token isn't counted, the token to come is
        only_end = torch.full_like(scores, -torch.inf)
        only_end[:, self._eos_token_id] = 0.0
        return torch.where(ended[:, None], only_end, scores)
