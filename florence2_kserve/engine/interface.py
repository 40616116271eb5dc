"""What every engine takes and gives; the seam between serving and generating.

Nothing here knows of kserve, HTTP or gRPC, and nothing behind it may.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from florence2_kserve.engine.metrics import EngineMetrics

FinishReason = Literal["stop", "length"]


class QueueFull(RuntimeError):
    """As many rows wait as may; nothing was queued."""


class DeadlineExceeded(TimeoutError):
    """The request's deadline passed before its answer was there."""


class EngineStopped(RuntimeError):
    """The engine is closed, or closed while the request waited."""


class OutOfMemory(RuntimeError):
    """The device has no room for the request at the moment; others go on."""


class NonFiniteOutput(RuntimeError):
    """The model gave NaN for the request; others go on."""


class InvalidRequest(ValueError):
    """The model can't take the request.

    Attributes:
        field: The field of GenerationRequest that is wrong.
        row: Which of the requests submitted together it is.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.row = 0


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One row: a prompt about an image.

    Attributes:
        pixel_values: uint8 [H,W,3], resized to the model's size, not normalised.
        image_key: Hash of the image's content; equal keys share image features, so whoever fills it in
            must have made it from the pixels.
        input_ids: int64 [L], the prompt alone, without image placeholders.
        max_new_tokens: Bound on generated tokens, the forced first and last included.
        num_beams: Beams, 1 for greedy search; None takes the checkpoint's.
        length_penalty: None takes the checkpoint's.
        deadline: ``time.monotonic()`` after which the answer is worthless; None for never.
    """

    pixel_values: np.ndarray[Any, Any]
    image_key: bytes
    input_ids: np.ndarray[Any, Any]
    max_new_tokens: int
    num_beams: int | None = None
    length_penalty: float | None = None
    deadline: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GenerationResult:
    """One row's answer.

    Attributes:
        sequence: int64 [T], start token kept, no padding.
        score: Summed log-probability divided by generated length ** length_penalty.
        token_logprobs: float32 [T], aligned with `sequence`; 0 for the start token and forced tokens.
        finish_reason: ``stop`` at the end token, ``length`` where max_new_tokens cut it off.
        queue_seconds: Time waited.
        generate_seconds: Time from leaving the queue to the answer.
    """

    sequence: np.ndarray[Any, Any]
    score: float
    token_logprobs: np.ndarray[Any, Any]
    finish_reason: FinishReason
    queue_seconds: float
    generate_seconds: float


class Engine(ABC):
    """Generates for many requests at once; all methods may be called from any thread.

    Attributes:
        metrics: What it counts and measures.
    """

    metrics: EngineMetrics

    @abstractmethod
    def submit(self, requests: list[GenerationRequest]) -> list[Future[GenerationResult]]:
        """Queues requests, all or none.

        Cancelling a future drops its request, waiting or running.

        Args:
            requests: Rows, answered independently of each other.

        Returns:
            A future for each; it may raise DeadlineExceeded, EngineStopped, OutOfMemory or NonFiniteOutput.

        Raises:
            InvalidRequest: If the model can't take one of them; nothing is queued.
            QueueFull: If the queue can't take all of them; nothing is queued.
            EngineStopped: If the engine is closed.
        """

    @property
    @abstractmethod
    def is_healthy(self) -> bool:
        """Whether requests can still be answered."""

    @abstractmethod
    def close(self) -> None:
        """Stops; requests that wait or run get EngineStopped."""
