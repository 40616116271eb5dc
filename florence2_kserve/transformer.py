"""The transformer: images and task prompts in, structured answers out; it never loads weights."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from kserve import Model
from kserve.protocol.infer_type import InferRequest, InferResponse

from florence2_kserve import errors
from florence2_kserve.answers import generated_text, parse_answer, region_text
from florence2_kserve.images import ImageError, ImageTooLarge, decode_image, resize_image
from florence2_kserve.model_files import EMBEDDED, locate_model
from florence2_kserve.predictor_client import PredictorClient
from florence2_kserve.processor import Processor
from florence2_kserve.protocol.internal import GenerateCall, GenerateResult
from florence2_kserve.protocol.public import (
    EMBEDDED_PLATFORM,
    GENERATED_TEXT,
    INPUT_IMAGE,
    PLATFORM,
    TEXT_PROMPT,
    Bounds,
    InferenceCall,
    Row,
    RowAnswer,
    describe_inputs,
    describe_outputs,
    read_call,
    write_answer,
)
from florence2_kserve.settings import Settings
from florence2_kserve.tasks import TaskInput


@dataclass(slots=True)
class _Work:
    """What one request carries through preprocess, predict and postprocess."""

    call: InferenceCall
    deadline: float
    generate: GenerateCall
    image_sizes: list[tuple[int, int]]  # (width, height) as sent
    timings: dict[str, int] = field(default_factory=dict)
    result: GenerateResult | None = None


class Florence2Transformer(Model):
    """Answers the public contract of ``protocol/public.py`` with the help of a predictor."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.model_name)
        self._settings = settings
        files = locate_model(settings.model, revision=settings.model_revision, with_weights=False)
        self._processor = Processor.load(files)
        self._predictor = PredictorClient(settings, self._processor.pad_token_id)
        self._bounds = Bounds(settings.max_rows, settings.max_num_beams, self._processor.max_target_tokens)
        # Decoded images are large: no more at once than there are processors to decode them.
        self._preparing = asyncio.Semaphore(settings.max_asyncio_workers or os.cpu_count() or 1)
        self.ready = True

    @property
    def platform(self) -> str:
        """What model metadata says of the model's kind."""
        return EMBEDDED_PLATFORM if self._settings.model == EMBEDDED else PLATFORM

    def load(self) -> bool:
        """Does nothing: all there is to load was loaded when the object was made."""
        return self.ready

    async def healthy(self) -> bool:
        """Whether requests can be read; the predictor counts only if `enable_predictor_health_check` is set."""
        if self._settings.enable_predictor_health_check:
            return await self._predictor.is_ready(self.name)
        return self.ready

    async def close(self) -> None:
        """Closes the connection to the predictor."""
        await self._predictor.close()

    def get_input_types(self) -> list[dict[str, Any]]:
        """Returns the inputs for V2 metadata."""
        return describe_inputs()

    def get_output_types(self) -> list[dict[str, Any]]:
        """Returns the outputs for V2 metadata."""
        return describe_outputs()

    def validate(self, payload: Any) -> Any:
        """Passes what preprocess made on to predict; it has been checked there."""
        return payload

    async def preprocess(self, payload: Any, headers: dict[str, str] | None = None) -> Any:
        """Reads the request, decodes and resizes its images and tokenises its prompts, in a thread.

        Raises:
            BadRequest: If the request is wrong; the message names the tensor and the row.
            TooLarge: If an image is over the limits.
        """
        if not isinstance(payload, InferRequest):
            raise errors.BadRequest("this model speaks the V2 protocol only: POST /v2/models/<model>/infer")
        started = time.monotonic()
        nobody_waits = threading.Event()
        try:
            async with self._preparing:
                work = await asyncio.to_thread(self._prepare, payload, started, nobody_waits)
        finally:
            nobody_waits.set()
        work.timings["preprocess_us"] = _microseconds_since(started)
        return work

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> Any:
        """Asks the predictor.

        Raises:
            ServiceError: What the predictor said, 503 where it is away, 504 where time ran out.
        """
        work: _Work = payload
        work.result = await self._predictor.generate(
            self.name, work.generate, deadline=work.deadline, request_id=work.call.id, headers=headers or {}
        )
        work.timings |= work.result.timings
        return work

    async def postprocess(
        self, result: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> InferResponse:
        """Turns token sequences into the answers asked for, in a thread."""
        return await asyncio.to_thread(self._finish, result)

    def _prepare(self, request: InferRequest, started: float, nobody_waits: threading.Event) -> _Work:
        call = read_call(request, self._bounds)
        seconds = call.options.timeout_seconds(self._settings.request_timeout_seconds)
        pixel_values, sizes = [], []
        for row, data in enumerate(call.images):
            if time.monotonic() >= started + seconds or nobody_waits.is_set():
                raise errors.DeadlineExceeded(f"time ran out while images were decoded, before row {row}")
            pixels, size = self._read_image(data, row)
            pixel_values.append(pixels)
            sizes.append(size)
        generate = GenerateCall(
            pixel_values=np.stack(pixel_values),
            image_keys=[hashlib.blake2b(pixels.tobytes(), digest_size=16).digest() for pixels in pixel_values],
            input_ids=[self._input_ids(row, sizes[row.image]) for row in call.rows],
            image_index=[row.image for row in call.rows],
            max_new_tokens=[
                min(call.options.max_new_tokens or row.task.max_new_tokens, self._bounds.max_new_tokens)
                for row in call.rows
            ],
            options=call.options.model_copy(update={"max_new_tokens": None}),
        )
        return _Work(call, started + seconds, generate, sizes)

    def _read_image(self, data: bytes, row: int) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
        if len(data) > self._settings.max_image_bytes:
            raise errors.TooLarge(
                f"{INPUT_IMAGE}, row {row}: {len(data)} bytes are over the limit of {self._settings.max_image_bytes}"
            )
        try:
            image = decode_image(data, max_pixels=self._settings.max_image_pixels)
        except ImageTooLarge as error:
            raise errors.TooLarge(f"{INPUT_IMAGE}, row {row}: {error}") from None
        except ImageError as error:
            raise errors.BadTensor(INPUT_IMAGE, str(error), row=row) from None
        return resize_image(image, self._processor.image), image.size

    def _input_ids(self, row: Row, image_size: tuple[int, int]) -> np.ndarray[Any, Any]:
        text = row.text
        try:
            if row.task.takes is TaskInput.REGION:
                text = region_text(text, image_size)
            elif text:
                self._processor.check_user_text(text)
        except ValueError as error:
            raise errors.BadTensor(TEXT_PROMPT, f"{row.task.name}: {error}", row=row.label) from None
        input_ids = self._processor.input_ids(row.task.prompt(text))
        if len(input_ids) > self._processor.max_text_tokens:
            raise errors.BadTensor(
                TEXT_PROMPT,
                f"{row.task.name}: the prompt has {len(input_ids)} tokens, "
                f"the model takes {self._processor.max_text_tokens} beside the image",
                row=row.label,
            )
        return input_ids

    def _finish(self, work: _Work) -> InferResponse:
        assert work.result is not None
        started = time.monotonic()
        answers = []
        for row, sequence, score in zip(work.call.rows, work.result.sequences, work.result.scores, strict=True):
            tokens = [int(token) for token in sequence]
            answers.append(
                RowAnswer(
                    value=parse_answer(row.task, tokens, self._processor, work.image_sizes[row.image]),
                    text=generated_text(tokens, self._processor) if GENERATED_TEXT in work.call.outputs else "",
                    score=score,
                )
            )
        work.timings["postprocess_us"] = _microseconds_since(started)
        return write_answer(work.call, answers, work.timings)


def _microseconds_since(start: float) -> int:
    return int((time.monotonic() - start) * 1e6)
