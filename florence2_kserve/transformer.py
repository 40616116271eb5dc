"""The transformer: images and task prompts in, structured answers out; it never loads weights."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from kserve.protocol.infer_type import InferRequest, InferResponse

from florence2_kserve import errors
from florence2_kserve.answers import generated_text, mask_answer, parse_answer, region_text, score_answer
from florence2_kserve.cpus import available_cpus
from florence2_kserve.errors import ServiceError, from_grpc_status
from florence2_kserve.images import ImageError, ImageTooLarge, decode_image
from florence2_kserve.model_files import EMBEDDED, embedded_revision, locate_model
from florence2_kserve.openapi import document
from florence2_kserve.predictor_client import PredictorClient
from florence2_kserve.processor import Processor
from florence2_kserve.protocol.internal import GenerateCall, GenerateResult
from florence2_kserve.protocol.public import (
    EMBEDDED_PLATFORM,
    GENERATED_TEXT,
    INPUT_IMAGE,
    MASKS,
    OPTIONAL_INPUTS,
    PLATFORM,
    SCORES,
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
from florence2_kserve.statistics import CountedModel
from florence2_kserve.tasks import TaskInput

T = TypeVar("T")


@dataclass(slots=True)
class _Picture:
    """An image as the model takes it.

    Attributes:
        pixel_values: UINT8 [H,W,3].
        size: (width, height) as sent, in pixels.
        key: Hash of the file.
    """

    pixel_values: np.ndarray[Any, Any]
    size: tuple[int, int]
    key: bytes


@dataclass(slots=True)
class _Work:
    """What one request carries through preprocess, predict and postprocess.

    Attributes:
        call: The request.
        deadline: ``time.monotonic()`` by which it has to be answered.
        sizes: (width, height) of each image as sent, (0, 0) where it can't be read.
        errors: By row: why it can't be answered.
        asked: The rows that the predictor is asked about.
        generate: What it is asked; None if there is nothing to ask.
        timings: Microseconds by phase.
        result: What it answered.
    """

    call: InferenceCall
    deadline: float
    sizes: list[tuple[int, int]]
    errors: dict[int, ServiceError]
    asked: list[int]
    generate: GenerateCall | None
    timings: dict[str, int] = field(default_factory=dict)
    result: GenerateResult | None = None


class Florence2Transformer(CountedModel):
    """Answers the public contract of ``protocol/public.py`` with the help of a predictor."""

    image_input = INPUT_IMAGE

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.model_name)
        self._settings = settings
        files = locate_model(settings.model, revision=settings.model_revision, with_weights=False)
        self._processor = Processor.load(files)
        self._revision = embedded_revision(files) if settings.model == EMBEDDED else files.revision
        self._predictor = PredictorClient(settings, self._processor.pad_token_id)
        self._bounds = Bounds(
            settings.max_rows,
            settings.max_num_beams,
            settings.bound_new_tokens(self._processor.max_target_tokens),
            max_image_bytes=settings.max_image_bytes,
        )
        self._draft_for = None if settings.exact_images else self._processor.image
        # Decoded images are large: no more at once than there are processors to decode them.
        self._pool = ThreadPoolExecutor(settings.max_asyncio_workers or available_cpus(), "prepare")
        self.ready = True

    @property
    def platform(self) -> str:
        """What model metadata says of the model's kind."""
        return EMBEDDED_PLATFORM if self._settings.model == EMBEDDED else PLATFORM

    @property
    def properties(self) -> dict[str, str]:
        """Which checkpoint it is, as far as its folder tells; answers of the same one are the same."""
        return {"model": self._settings.model, "revision": self._revision or ""}

    @property
    def max_batch_size(self) -> int:
        """Largest number of images in a request."""
        return self._settings.max_rows

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Inputs that a request may leave out."""
        return OPTIONAL_INPUTS

    def openapi(self) -> dict[str, Any]:
        """Returns the OpenAPI document of the REST side."""
        return document(self._settings)

    def load(self) -> bool:
        """Does nothing: all there is to load was loaded when the object was made."""
        return self.ready

    async def healthy(self) -> bool:
        """Whether requests can be read; the predictor counts only if `enable_predictor_health_check` is set."""
        if self._settings.enable_predictor_health_check:
            return await self._predictor.is_ready(self.name)
        return self.ready

    async def begin(self) -> None:
        """Wakes the predictor if Knative has scaled it to zero: whoever had this replica started needs both."""
        await self._predictor.is_ready(self.name)

    async def close(self) -> None:
        """Closes the connection to the predictor."""
        await self._predictor.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

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
        """Reads the request, decodes and resizes its images and tokenises its prompts, in threads.

        Raises:
            BadRequest: If the request is wrong; the message names the tensor and the row.
            TooLarge: If an image is over the limits.
            DeadlineExceeded: If its time runs out meanwhile.
        """
        if not isinstance(payload, InferRequest):
            raise errors.BadRequest("this model speaks the V2 protocol only: POST /v2/models/<model>/infer")
        started = time.monotonic()
        call: InferenceCall = await self._in_pool(read_call, payload, self._bounds)
        deadline = started + call.options.timeout_seconds(self._settings.request_timeout_seconds)
        pictures = await self._read_pictures(call, deadline)
        work: _Work = await self._in_pool(self._prepare, call, pictures, deadline)
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
        if work.generate is None:
            return work
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

    def _in_pool(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _read_pictures(self, call: InferenceCall, deadline: float) -> list[_Picture | ServiceError]:
        """Decodes and resizes a request's images side by side; the first bad one fails it, unless it is partial."""
        reading = [self._in_pool(self._read_picture, data, row, deadline) for row, data in enumerate(call.images)]
        pictures: list[_Picture | ServiceError] = []
        try:
            for future in reading:
                try:
                    pictures.append(await future)
                except errors.DeadlineExceeded:
                    raise
                except ServiceError as error:
                    if not call.options.partial:
                        raise
                    pictures.append(error)
        finally:
            for future in reading:  # nobody waits for the others
                future.cancel()
        return pictures

    def _read_picture(self, data: bytes | ServiceError, row: int, deadline: float) -> _Picture:
        if isinstance(data, ServiceError):
            raise data
        if time.monotonic() >= deadline:
            raise errors.DeadlineExceeded(f"time ran out while images were decoded, before row {row}")
        try:
            picture = decode_image(data, max_pixels=self._settings.max_image_pixels, draft_for=self._draft_for)
        except ImageTooLarge as error:
            raise errors.TooLarge(f"{INPUT_IMAGE}, row {row}: {error}") from None
        except ImageError as error:
            raise errors.BadTensor(INPUT_IMAGE, str(error), row=row) from None
        key = hashlib.sha256(data).digest()  # which processors have instructions for
        pixels = picture.resized(self._processor.image, exact=self._settings.exact_images)
        return _Picture(pixels, picture.size, key)

    def _prepare(self, call: InferenceCall, pictures: list[_Picture | ServiceError], deadline: float) -> _Work:
        """Puts together what the predictor is asked; rows that can't be are left out of it, if the call is partial."""
        failed: dict[int, ServiceError] = {}
        questions: dict[int, tuple[Row, _Picture, np.ndarray[Any, Any]]] = {}
        for index, row in enumerate(call.rows):
            try:
                if isinstance(row, ServiceError):
                    raise row
                picture = pictures[row.image]
                if isinstance(picture, ServiceError):
                    raise picture
                questions[index] = row, picture, self._input_ids(row, picture.size)
            except ServiceError as error:
                if not call.options.partial:
                    raise
                failed[index] = error
        sizes = [(0, 0) if isinstance(picture, ServiceError) else picture.size for picture in pictures]
        generate = self._generate_call(call, list(questions.values())) if questions else None
        return _Work(call, deadline, sizes, failed, list(questions), generate)

    def _generate_call(
        self, call: InferenceCall, questions: list[tuple[Row, _Picture, np.ndarray[Any, Any]]]
    ) -> GenerateCall:
        used = {row.image: picture for row, picture, _ in questions}
        position = {image: index for index, image in enumerate(used)}
        return GenerateCall(
            pixel_values=np.stack([picture.pixel_values for picture in used.values()]),
            image_keys=[picture.key for picture in used.values()],
            input_ids=[input_ids for _, _, input_ids in questions],
            image_index=[position[row.image] for row, _, _ in questions],
            max_new_tokens=[
                min(call.options.max_new_tokens or row.task.max_new_tokens, self._bounds.max_new_tokens)
                for row, _, _ in questions
            ],
            options=call.options.model_copy(update={"max_new_tokens": None}),
        )

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
        started = time.monotonic()
        answers: dict[int, RowAnswer | ServiceError] = dict(work.errors)
        if work.result is not None:
            for position, index in enumerate(work.asked):
                row = work.call.rows[index]
                assert isinstance(row, Row)
                error = work.result.errors.get(position)
                answers[index] = self._row_answer(work, row, position) if error is None else _about(row, error)
        work.timings["postprocess_us"] = _microseconds_since(started)
        return write_answer(work.call, [answers[index] for index in range(len(work.call.rows))], work.timings)

    def _row_answer(self, work: _Work, row: Row, position: int) -> RowAnswer:
        assert work.result is not None
        tokens = work.result.sequences[position].tolist()
        size, task, processor, outputs = work.sizes[row.image], row.task, self._processor, work.call.outputs
        answer = RowAnswer(
            task.name, parse_answer(task, tokens, processor, size), work.result.finish_reasons[position]
        )
        if GENERATED_TEXT in outputs:
            answer.text = generated_text(tokens, processor)
        if SCORES in outputs:
            parts = score_answer(task, tokens, work.result.token_logprobs[position].tolist(), processor, size)
            answer.scores = {"sequence": work.result.scores[position], **parts}
        if MASKS in outputs:
            answer.masks = mask_answer(answer.value, size)
        return answer


def _about(row: Row, error: ServiceError) -> ServiceError:
    """Returns the predictor's error with the row as the client counts."""
    return from_grpc_status(error.status_code, f"row {row.label}: {error.details}")


def _microseconds_since(start: float) -> int:
    return int((time.monotonic() - start) * 1e6)
