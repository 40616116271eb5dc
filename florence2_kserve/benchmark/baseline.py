"""What the engine is compared with: transformers' ``generate`` on static batches.

A batch is whatever waits, up to a limit, as a dynamic batcher in front of ``generate`` collects it. Every row
is one image and one prompt, as users call it; the image is encoded for each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from florence2_kserve.benchmark.workload import Item, draw_image, prompt_ids
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel

Array = np.ndarray[Any, Any]
BatchPolicy = Callable[[Sequence[Item], int], list[Item]]


def in_arrival_order(waiting: Sequence[Item], max_batch_size: int) -> list[Item]:
    """Returns the requests that have waited longest."""
    return list(waiting[:max_batch_size])


def grouped_by_task(waiting: Sequence[Item], max_batch_size: int) -> list[Item]:
    """Returns requests of the task of which most wait; of equals, the one that has waited longest."""
    (task, _), *_ = Counter(item.task.name for item in waiting).most_common(1)  # ties: first seen first
    return [item for item in waiting if item.task.name == task][:max_batch_size]


POLICIES: dict[str, BatchPolicy] = {"arrival": in_arrival_order, "grouped": grouped_by_task}


class EndRowsAtTheirLength(LogitsProcessor):
    """Forces the end token on each row at its own length, where the real model would have ended it by itself.

    Args:
        lengths: Tokens each row of the batch may generate.
        num_beams: Beams a row; the beams of one row follow each other.
        eos_token_id: The end token.
        device: Where logits are.
    """

    def __init__(self, lengths: Sequence[int], num_beams: int, eos_token_id: int, device: torch.device) -> None:
        self._lengths = torch.tensor(lengths, device=device).repeat_interleave(num_beams)[:, None]  # [B*K,1]
        self._eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The start token isn't generated: the next token is the one number `input_ids.shape[1]`.
        ends = self._lengths == input_ids.shape[1]
        is_eos = torch.arange(scores.shape[1], device=scores.device) == self._eos_token_id
        return scores.masked_fill(ends & ~is_eos, -torch.inf).masked_fill(ends & is_eos, 0.0)


@dataclass(frozen=True, slots=True)
class BatchCost:
    """What one static batch computes.

    Attributes:
        rows: Requests in it.
        beams: Beams a request.
        encoder_tokens: Tokens a row in the encoder, padding included.
        steps: Decoder steps.
        useful_steps: Steps that its rows needed, summed.
    """

    rows: int
    beams: int
    encoder_tokens: int
    steps: int
    useful_steps: int


class StaticBaseline:
    """Answers one batch at a time.

    Args:
        loaded: The model.
        image: Its image settings.
        seed: Seed of the images' pixels.
        num_beams: Beams of every request.
    """

    def __init__(self, loaded: LoadedModel, image: ImageSettings, *, seed: int, num_beams: int) -> None:
        self._model, self._generation = loaded.model, loaded.generation
        self._device, self._dtype = loaded.device, loaded.dtype
        self._vocab_size = loaded.vocab_size
        self._image = image
        self._seed = seed
        self._num_beams = num_beams
        scaled = torch.arange(256, dtype=torch.float64) * image.rescale_factor
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (image.mean, image.std))
        # [3,256]; float32 steps as the image processor takes them, looked up.
        self._normalised = ((scaled.float() - mean.float()) / std.float()).to(self._device)

    @torch.inference_mode()
    def generate(self, items: Sequence[Item]) -> tuple[list[Array], BatchCost]:
        """Returns each request's token ids, int64 [T] from start token to end token, and what the batch cost."""
        input_ids, mask = self._inputs(items)
        lengths = [item.length for item in items]
        eos = self._generation.eos_token_id
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=self._pixel_values(items),
            num_beams=self._num_beams,
            max_new_tokens=max(lengths),
            logits_processor=[EndRowsAtTheirLength(lengths, self._num_beams, eos, self._device)],
        )
        sequences = [_without_padding(row, eos) for row in output.cpu().numpy()]  # waits for the device
        steps = [len(sequence) - 1 for sequence in sequences]
        cost = BatchCost(len(items), self._num_beams, input_ids.shape[1], max(steps), sum(steps))
        return sequences, cost

    @torch.inference_mode()
    def logprobs(self, item: Item, sequence: Array) -> torch.Tensor:
        """Returns float32 [T-1,V]: all candidates for each token behind the start token, nothing forced or banned."""
        input_ids, mask = self._inputs([item])
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=self._pixel_values([item]),
            decoder_input_ids=torch.from_numpy(sequence[:-1])[None].to(self._device),
            use_cache=False,
        )
        return torch.log_softmax(output.logits[0].float(), dim=-1).cpu()

    def _inputs(self, items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [prompt_ids(item.task, self._vocab_size) for item in items]
        width = self._image.image_seq_length + max(map(len, prompts))
        ids = np.full((len(items), width), self._generation.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the right, as the processor does
            end = self._image.image_seq_length + len(prompt)
            ids[row, : self._image.image_seq_length] = self._model.config.image_token_id
            ids[row, self._image.image_seq_length : end] = prompt
            mask[row, :end] = 1
        return torch.from_numpy(ids).to(self._device), torch.from_numpy(mask).to(self._device)

    def _pixel_values(self, items: Sequence[Item]) -> torch.Tensor:
        pixels = np.stack([draw_image(item.image, self._image.height, self._seed) for item in items])
        values = torch.from_numpy(pixels).to(self._device).int()  # [B,H,W,3]
        channels = [self._normalised[channel][values[..., channel]] for channel in range(3)]
        return torch.stack(channels, dim=1).to(self._dtype)


def _without_padding(tokens: Array, eos: int) -> Array:
    ends = np.flatnonzero(tokens[1:] == eos)  # the start token is the end token, too
    return tokens[: int(ends[0]) + 2] if len(ends) else tokens
