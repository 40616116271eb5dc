"""The plain engine: one batch at a time through transformers' ``generate``.

Rows that ask for the same search and have prompts of the same length run together, so that
no row is ever padded and its answer doesn't depend on its neighbours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.modeling_outputs import BaseModelOutput

from florence2_kserve.engine.interface import (
    DeadlineExceeded,
    Engine,
    EngineStopped,
    GenerationRequest,
    GenerationResult,
    InvalidRequest,
    QueueFull,
)
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Row:
    request: GenerationRequest
    future: Future[GenerationResult] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What rows of one batch have in common."""
        request = self.request
        return (len(request.input_ids), request.num_beams, request.length_penalty, request.max_new_tokens)

    def is_over(self) -> bool:
        """Whether nobody waits for the answer any more."""
        deadline = self.request.deadline
        return self.future.cancelled() or (deadline is not None and time.monotonic() >= deadline)


class _NobodyWaits(StoppingCriteria):
    """Ends a batch early once no row in it is wanted any more."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), all(row.is_over() for row in self._rows), device=input_ids.device)


class StaticBatchEngine(Engine):
    """An engine that hands whole batches to ``generate`` in a thread of its own.

    Args:
        loaded: The model, on its device.
        image: Image settings: size, scale, mean and standard deviation.
        max_batch_size: Rows in one batch.
        max_queue_size: Rows that may wait.

    Raises:
        ValueError: If the image settings don't fit the model.
    """

    def __init__(
        self, loaded: LoadedModel, image: ImageSettings, *, max_batch_size: int = 8, max_queue_size: int = 256
    ) -> None:
        tokens = loaded.image_seq_length(image.height, image.width)
        if tokens != image.image_seq_length:
            raise ValueError(
                f"the processor counts {image.image_seq_length} tokens for an image, the model makes {tokens}"
            )
        self._loaded = loaded
        self._image = image
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    def submit(self, requests: list[GenerationRequest]) -> list[Future[GenerationResult]]:
        for request in requests:
            self._check(request)
        rows = [_Row(request) for request in requests]
        with self._changed:
            if self._stopped:
                raise EngineStopped("the engine is stopped")
            if len(self._waiting) + len(rows) > self._max_queue_size:
                raise QueueFull(
                    f"{len(self._waiting)} rows wait, {len(rows)} more don't fit into {self._max_queue_size}"
                )
            self._waiting.extend(rows)
            self._changed.notify()
        return [row.future for row in rows]

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _check(self, request: GenerationRequest) -> None:
        # Ids or positions beyond their tables are asserts on a GPU that end the process.
        ids, loaded = request.input_ids, self._loaded
        room = loaded.max_source_positions - self._image.image_seq_length
        size, pixels = (self._image.height, self._image.width, 3), request.pixel_values
        if pixels.shape != size or pixels.dtype != np.uint8:
            raise InvalidRequest(
                "pixel_values", f"expected uint8 {list(size)}, got {pixels.dtype} {list(pixels.shape)}"
            )
        if not 1 <= len(ids) <= room:
            raise InvalidRequest(
                "input_ids", f"prompt has {len(ids)} tokens; this model takes 1 to {room} beside the image"
            )
        if ids.min() < 0 or ids.max() >= loaded.vocab_size:
            raise InvalidRequest("input_ids", f"prompt has an id outside 0 to {loaded.vocab_size - 1}")
        if not 1 <= request.max_new_tokens <= loaded.max_target_positions:
            raise InvalidRequest(
                "max_new_tokens", f"expected 1 to {loaded.max_target_positions}, got {request.max_new_tokens}"
            )

    def _loop(self) -> None:
        try:
            while batch := self._next_batch():
                try:
                    self._answer(batch)
                except Exception:
                    logger.exception("a batch of %d rows failed; its rows are tried one by one", len(batch))
                    for row in batch:
                        self._answer_alone(row)
        finally:
            with self._changed:
                self._stopped = True
                left, self._waiting = self._waiting, deque()
            for row in left:
                _fail(row, EngineStopped("the engine was stopped"))

    def _next_batch(self) -> list[_Row]:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return []
                batch: list[_Row] = []
                left: deque[_Row] = deque()
                for row in self._waiting:
                    if row.is_over():
                        _fail(row, DeadlineExceeded("the deadline passed while the request waited"))
                    elif len(batch) < self._max_batch_size and (not batch or row.kind == batch[0].kind):
                        batch.append(row)
                    else:
                        left.append(row)
                self._waiting = left
                if batch:
                    return batch

    def _answer_alone(self, row: _Row) -> None:
        try:
            self._answer([row])
        except Exception as error:
            logger.exception("a row failed")
            _fail(row, error)

    def _answer(self, batch: list[_Row]) -> None:
        started = time.monotonic()
        sequences, logprobs = self._generate(batch)
        seconds = time.monotonic() - started
        for row, sequence, token_logprobs in zip(batch, sequences, logprobs, strict=True):
            request = row.request
            if row.is_over():
                _fail(row, DeadlineExceeded("the deadline passed while the answer was generated"))
                continue
            penalty = self._loaded.generation.length_penalty
            if request.length_penalty is not None:
                penalty = request.length_penalty
            generated = len(sequence) - 1
            _succeed(
                row,
                GenerationResult(
                    sequence=sequence,
                    score=float(token_logprobs.sum()) / generated**penalty,
                    token_logprobs=token_logprobs,
                    finish_reason="length" if generated >= request.max_new_tokens else "stop",
                    queue_seconds=started - row.queued_at,
                    generate_seconds=seconds,
                ),
            )

    @torch.inference_mode()
    def _generate(self, batch: list[_Row]) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
        model, generation = self._loaded.model, self._loaded.generation
        request = batch[0].request
        encoder_states = self._encode([row.request for row in batch])
        mask = torch.ones(encoder_states.shape[:2], dtype=torch.long, device=encoder_states.device)
        config = GenerationConfig(
            **(
                generation.to_transformers()
                | {"max_new_tokens": request.max_new_tokens}
                | ({} if request.num_beams is None else {"num_beams": request.num_beams})
                | ({} if request.length_penalty is None else {"length_penalty": request.length_penalty})
            )
        )
        tokens = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_states),
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=[_NobodyWaits(batch)],
        )
        sequences = [_without_padding(row, generation.eos_token_id) for row in tokens.cpu().numpy()]
        logprobs = [
            self._token_logprobs(states[None], sequence, request.max_new_tokens)
            for states, sequence in zip(encoder_states, sequences, strict=True)
        ]
        return sequences, logprobs

    def _encode(self, requests: list[GenerationRequest]) -> torch.Tensor:
        """Returns the text encoder's states [B, image tokens + L, d]; each distinct image goes through once."""
        florence = self._loaded.model.model
        device, dtype = self._loaded.model.device, self._loaded.model.dtype
        images: list[np.ndarray[Any, Any]] = []
        index_of: dict[bytes, int] = {}
        positions = []
        for request in requests:
            index = index_of.get(request.image_key)
            # The key is the caller's word; another's features are shared only where the pixels agree.
            if index is None or not np.array_equal(images[index], request.pixel_values):
                index = index_of[request.image_key] = len(images)
                images.append(request.pixel_values)
            positions.append(index)
        pixels = torch.from_numpy(np.stack(images)).to(device)
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self._image.mean, self._image.std))
        # Looked up, so that it is rounded once from float64, as the image processor in numpy does.
        scaled = (torch.arange(256, dtype=torch.float64) * self._image.rescale_factor).float().to(device)
        normalised = (scaled[pixels.int()].permute(0, 3, 1, 2) - mean) / std
        features = florence.get_image_features(normalised.to(dtype)).pooler_output  # [I, S, d]
        input_ids = torch.from_numpy(np.stack([request.input_ids for request in requests])).to(device)
        text = florence.get_input_embeddings()(input_ids)  # [B, L, d]
        states = florence.language_model.encoder(inputs_embeds=torch.cat([features[positions], text], dim=1))
        return states.last_hidden_state

    def _token_logprobs(
        self, encoder_states: torch.Tensor, sequence: np.ndarray[Any, Any], max_new_tokens: int
    ) -> np.ndarray[Any, Any]:
        """Returns float32 [T]: one decoder pass over the finished sequence instead of keeping every step's logits."""
        model, generation = self._loaded.model, self._loaded.generation
        tokens = torch.from_numpy(sequence)[None].to(encoder_states.device)
        output = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_states),
            decoder_input_ids=tokens[:, :-1],
            use_cache=False,
        )
        steps = torch.log_softmax(output.logits[0].float(), dim=-1).gather(1, tokens[0, 1:, None])[:, 0]
        logprobs = np.zeros(len(sequence), dtype=np.float32)
        logprobs[1:] = steps.cpu().numpy()
        if generation.forced_bos_token_id is not None:
            logprobs[1] = 0
        if len(sequence) - 1 == max_new_tokens and generation.forced_eos_token_id is not None:
            logprobs[-1] = 0
        return logprobs


def _without_padding(tokens: np.ndarray[Any, Any], eos: int) -> np.ndarray[Any, Any]:
    # The start token is the end token too, so the search begins behind it.
    ends = np.flatnonzero(tokens[1:] == eos)
    return tokens[: int(ends[0]) + 2] if len(ends) else tokens


def _succeed(row: _Row, result: GenerationResult) -> None:
    if not row.future.done() and row.future.set_running_or_notify_cancel():
        row.future.set_result(result)


def _fail(row: _Row, error: Exception) -> None:
    if not row.future.done() and row.future.set_running_or_notify_cancel():
        row.future.set_exception(error)
