"""The predictor: tensors in, token sequences out, through an engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from kserve import Model
from kserve.logging import logger
from kserve.protocol.infer_type import InferRequest, InferResponse

from florence2_kserve import errors
from florence2_kserve.engine.interface import (
    DeadlineExceeded,
    Engine,
    EngineStopped,
    GenerationRequest,
    GenerationResult,
    InvalidRequest,
    QueueFull,
)
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import Processor
from florence2_kserve.protocol.internal import (
    REQUEST_TENSORS,
    RESPONSE_TENSORS,
    GenerateCall,
    GenerateResult,
    describe,
    read_generate_call,
    write_generate_result,
)
from florence2_kserve.protocol.public import Bounds
from florence2_kserve.settings import Settings
from florence2_kserve.tasks import TASKS

T = TypeVar("T")
EngineFactory = Callable[[Settings], tuple[Engine, Processor]]


def build_engine(settings: Settings) -> tuple[Engine, Processor]:
    """Loads the model that `settings` name and returns an engine that runs it, with the model's processor.

    Raises:
        ModelFilesError: If the checkpoint can't be found or isn't complete.
        ValueError: If the device or data type can't be had.
    """
    from florence2_kserve.engine.static import StaticBatchEngine
    from florence2_kserve.weights import load_model

    files = locate_model(settings.model, revision=settings.model_revision)
    processor = Processor.load(files)
    loaded = load_model(files, dtype=settings.dtype, device=settings.device)
    engine = StaticBatchEngine(
        loaded, processor.image, max_batch_size=settings.max_batch_size, max_queue_size=settings.max_queue_size
    )
    return engine, processor


class Florence2Predictor(Model):
    """Answers the contract of ``protocol/internal.py``.

    It registers at once, so that liveness answers while weights load, and is healthy once a
    warm-up request has gone through the engine.
    """

    def __init__(self, settings: Settings, engine_factory: EngineFactory = build_engine) -> None:
        super().__init__(settings.model_name)
        self._settings = settings
        self._engine_factory = engine_factory
        self._running: Engine | None = None
        self._processor: Processor | None = None
        self.ready = True  # the SDK refuses to start without a ready model; healthy() tells the truth
        self.engine = True  # the SDK then runs start_engine() beside its servers

    async def start_engine(self) -> None:
        """Loads the model and warms it up, in a thread; an error here ends the server."""
        started = time.monotonic()
        engine, processor = await asyncio.wrap_future(_in_daemon_thread(self._engine_factory, self._settings))
        loaded = time.monotonic()
        try:
            await asyncio.wrap_future(engine.submit([_warm_up_request(processor)])[0])
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        self._running, self._processor = engine, processor
        logger.info(
            "model %s ready: loaded in %.1f s, warmed up in %.1f s",
            self._settings.model,
            loaded - started,
            time.monotonic() - loaded,
        )

    def load(self) -> bool:
        """Does nothing: the SDK calls it on the event loop for each gRPC request that finds the model unready."""
        return self.ready

    async def healthy(self) -> bool:
        """Whether weights are loaded, a warm-up went through and the engine runs."""
        return self._running is not None and self._running.is_healthy

    def stop(self) -> None:
        """Ends the engine; requests in flight get 503."""
        super().stop()
        if self._running is not None:
            self._running.close()

    def get_input_types(self) -> list[dict[str, Any]]:
        """Returns the inputs for V2 metadata."""
        return describe(REQUEST_TENSORS)

    def get_output_types(self) -> list[dict[str, Any]]:
        """Returns the outputs for V2 metadata."""
        return describe(RESPONSE_TENSORS)

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> InferResponse:
        """Generates for every row of `payload`.

        Raises:
            ServiceError: As design of ``errors.py``: 400, 429, 503 or 504.
        """
        if not isinstance(payload, InferRequest):
            raise errors.BadRequest("this model speaks the V2 protocol only")
        engine, processor = self._running, self._processor
        if engine is None or processor is None:
            raise errors.Unavailable("the model is still loading")
        bounds = Bounds(self._settings.max_rows, self._settings.max_num_beams, processor.max_target_tokens)
        call = read_generate_call(payload, (processor.image.height, processor.image.width), bounds)
        results = await self._generate(engine, call)
        result = GenerateResult(
            sequences=[r.sequence for r in results],
            scores=[r.score for r in results],
            token_logprobs=[r.token_logprobs for r in results],
            finish_reasons=[r.finish_reason for r in results],
            timings={
                "queue_us": int(max(r.queue_seconds for r in results) * 1e6),
                "generate_us": int(max(r.generate_seconds for r in results) * 1e6),
            },
        )
        return write_generate_result(payload, result, processor.pad_token_id)

    async def _generate(self, engine: Engine, call: GenerateCall) -> list[GenerationResult]:
        seconds = call.options.timeout_seconds(self._settings.request_timeout_seconds)
        deadline = time.monotonic() + seconds
        requests = [
            GenerationRequest(
                pixel_values=call.pixel_values[image],
                image_key=call.image_keys[image],
                input_ids=input_ids,
                max_new_tokens=max_new_tokens,
                num_beams=call.options.num_beams,
                length_penalty=call.options.length_penalty,
                deadline=deadline,
            )
            for input_ids, image, max_new_tokens in zip(
                call.input_ids, call.image_index, call.max_new_tokens, strict=True
            )
        ]
        futures: list[Future[GenerationResult]] = []
        try:
            futures = engine.submit(requests)
            async with asyncio.timeout(seconds):
                return await asyncio.gather(*map(asyncio.wrap_future, futures))
        except InvalidRequest as error:
            raise errors.BadTensor(error.field, str(error)) from None
        except QueueFull as error:
            raise errors.QueueFull(f"the queue is full: {error}") from None
        except (DeadlineExceeded, TimeoutError):
            raise errors.DeadlineExceeded(f"no answer within {seconds:g} s") from None
        except EngineStopped as error:
            raise errors.Unavailable(str(error)) from None
        finally:
            # On a cancel or an error nobody waits for the other rows.
            for future in futures:
                future.cancel()


def _in_daemon_thread(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Runs `function` in a thread that doesn't keep the process alive: a SIGTERM while loading ends it at once."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future


def _warm_up_request(processor: Processor) -> GenerationRequest:
    image = processor.image
    return GenerationRequest(
        pixel_values=np.zeros((image.height, image.width, 3), dtype=np.uint8),
        image_key=b"warm-up",
        input_ids=processor.input_ids(next(iter(TASKS.values())).prompt()),
        max_new_tokens=8,
    )
