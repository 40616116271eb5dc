"""The predictor: tensors in, token sequences out, through an engine."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
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
    NonFiniteOutput,
    OutOfMemory,
    QueueFull,
)
from florence2_kserve.errors import ServiceError
from florence2_kserve.metrics import EngineCollector, publish, withdraw
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
from florence2_kserve.protocol.public import ERROR, Bounds
from florence2_kserve.settings import Settings
from florence2_kserve.statistics import CountedModel
from florence2_kserve.tasks import TASKS

T = TypeVar("T")
OnFatal = Callable[[BaseException], None]
EngineFactory = Callable[[Settings, OnFatal], tuple[Engine, Processor]]

# From a fatal error until the server stops: those who wait read their 503, and probes see the process as dead.
_LAST_WORDS_S = 1.5


def build_engine(settings: Settings, on_fatal: OnFatal | None = None) -> tuple[Engine, Processor]:
    """Loads the model that `settings` name and returns an engine that runs it, with the model's processor.

    Args:
        settings: Checkpoint, device and the engine's bounds.
        on_fatal: Called once, from the engine's thread, if the engine can't go on.

    Raises:
        ModelFilesError: If the checkpoint can't be found or isn't complete.
        ValueError: If the device or data type can't be had.
    """
    from florence2_kserve.engine.engine import InflightEngine
    from florence2_kserve.weights import load_model

    files = locate_model(settings.model, revision=settings.model_revision)
    processor = Processor.load(files)
    loaded = load_model(files, dtype=settings.dtype, device=settings.device)
    engine = InflightEngine(
        loaded,
        processor.image,
        max_batch_size=settings.max_batch_size,
        max_rows=settings.decode_rows,
        max_tokens=settings.max_decode_tokens,
        max_queue_size=settings.max_queue_size,
        admission_delay=settings.admission_delay_us / 1e6,
        vision_batch_size=settings.vision_batch_size,
        vision_backend=settings.vision_backend,
        compile_vision=settings.compile_vision,
        decode_capture=settings.decode_capture,
        feature_cache_bytes=settings.feature_cache_bytes,
        on_fatal=on_fatal,
    )
    return engine, processor


class Florence2Predictor(CountedModel):
    """Answers the contract of ``protocol/internal.py``.

    It registers at once, so that liveness answers while weights load, and is healthy once a
    warm-up request has gone through the engine. When the engine is beyond repair it is neither
    healthy nor alive, and its server ends soon after.
    """

    image_input = "pixel_values"

    def __init__(self, settings: Settings, engine_factory: EngineFactory = build_engine) -> None:
        super().__init__(settings.model_name)
        self._settings = settings
        self._engine_factory = engine_factory
        self._running: Engine | None = None
        self._processor: Processor | None = None
        self._collector: EngineCollector | None = None
        self._fatal: Future[str] = Future()  # why the engine can't go on
        self._fatal.set_running_or_notify_cancel()
        self.ready = True  # the SDK refuses to start without a ready model; healthy() tells the truth
        self.engine = True  # the SDK then runs start_engine() beside its servers

    async def start_engine(self) -> None:
        """Loads the model, warms it up and watches over it; an error here ends the server.

        Raises:
            EngineStopped: Some time after the engine turned out to be beyond repair.
            Exception: What kept the model from being loaded or warmed up.
        """
        await self._load()
        reason = await asyncio.wrap_future(self._fatal)
        await asyncio.sleep(_LAST_WORDS_S)
        raise EngineStopped(f"the engine is beyond repair: {reason}")

    async def _load(self) -> None:
        started = time.monotonic()
        engine, processor = await asyncio.wrap_future(
            _in_daemon_thread(self._engine_factory, self._settings, self._note_fatal)
        )
        loaded = time.monotonic()
        try:
            await asyncio.wrap_future(engine.submit([_warm_up_request(processor)])[0])
        except BaseException:
            if not self._fatal.done():
                await asyncio.to_thread(engine.close)
            raise
        self._collector = publish(engine.metrics)
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

    @property
    def failure(self) -> str | None:
        """Why this process can answer no more and must be replaced; None as long as it can."""
        if self._fatal.done():
            return f"the engine is beyond repair: {self._fatal.result()}"
        # stop() takes back `ready` before it ends the engine.
        if self.ready and self._running is not None and not self._running.is_healthy:
            return "the engine has ended"
        return None

    async def healthy(self) -> bool:
        """Whether weights are loaded, a warm-up went through and the engine runs."""
        return self._running is not None and self._running.is_healthy and not self._fatal.done()

    def stop(self) -> None:
        """Ends the engine; requests in flight get 503."""
        super().stop()
        if self._collector is not None:
            withdraw(self._collector)
        # Nothing of a broken device is waited for.
        if self._running is not None and not self._fatal.done():
            self._running.close()

    def _note_fatal(self, error: BaseException) -> None:
        """Takes down the service; called from the engine's thread."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # CUDA's messages have several lines
        if not self._fatal.done():
            self._fatal.set_result(reason)
            logger.critical("the engine is beyond repair, this process ends: %s", reason)

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
            ServiceError: 400, 429, 500, 503 or 504; where one row is to blame, the message names it.
        """
        if not isinstance(payload, InferRequest):
            raise errors.BadRequest("this model speaks the V2 protocol only")
        engine, processor = self._running, self._processor
        if engine is None or processor is None:
            raise errors.Unavailable("the model is still loading")
        bounds = Bounds(
            self._settings.max_rows,
            self._settings.max_num_beams,
            self._settings.bound_new_tokens(processor.max_target_tokens),
        )
        call = read_generate_call(payload, (processor.image.height, processor.image.width), bounds)
        result = _to_result(await self._generate(engine, call))
        return write_generate_result(payload, result, processor.pad_token_id)

    async def _generate(self, engine: Engine, call: GenerateCall) -> list[GenerationResult | ServiceError]:
        """Returns each row's answer; if the call is partial, an error where a row has none."""
        seconds = call.options.timeout_seconds(self._settings.request_timeout_seconds)
        deadline = time.monotonic() + seconds
        futures: list[Future[GenerationResult]] = []
        try:
            async with asyncio.timeout(seconds):
                # The engine shares features by key, so a key that came with the request is not relied on.
                keys = await asyncio.to_thread(lambda: [image_key(image) for image in call.pixel_values])
                futures = engine.submit(_requests(call, keys, deadline))
                if not call.options.partial:
                    return list(await asyncio.gather(*map(_result, range(len(futures)), futures)))
            # Beyond the deadline: rows whose time is over answer that by themselves.
            waiting = [asyncio.wrap_future(future) for future in futures]
            await asyncio.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            return [_outcome(row, future, seconds) for row, future in enumerate(waiting)]
        except InvalidRequest as error:
            raise errors.BadTensor(error.field, str(error), row=error.row) from None
        except QueueFull as error:
            raise errors.QueueFull(f"the queue is full: {error}") from None
        except (DeadlineExceeded, TimeoutError):
            raise _too_late(seconds) from None
        except EngineStopped as error:
            raise self._stopped(error) from None
        finally:
            # On a cancel or an error nobody waits for the other rows.
            for future in futures:
                future.cancel()

    def _stopped(self, error: EngineStopped) -> ServiceError:
        reason = self.failure if self._fatal.done() else None
        return errors.Unavailable(reason or str(error))


def image_key(pixel_values: np.ndarray[Any, Any]) -> bytes:
    """Returns a hash of shape and content; no two images share it.

    Args:
        pixel_values: uint8 [H,W,3].
    """
    digest = hashlib.sha256(repr(pixel_values.shape).encode())
    digest.update(np.ascontiguousarray(pixel_values).reshape(-1).data)
    return digest.digest()


def _requests(call: GenerateCall, image_keys: list[bytes], deadline: float) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            pixel_values=call.pixel_values[image],
            image_key=image_keys[image],
            input_ids=input_ids,
            max_new_tokens=max_new_tokens,
            num_beams=call.options.num_beams,
            length_penalty=call.options.length_penalty,
            deadline=deadline,
        )
        for input_ids, image, max_new_tokens in zip(call.input_ids, call.image_index, call.max_new_tokens, strict=True)
    ]


def _outcome(row: int, future: asyncio.Future[GenerationResult], seconds: float) -> GenerationResult | ServiceError:
    """Returns what a row of a partial call has come to.

    Raises:
        EngineStopped: If the engine ended under it: another predictor can answer the whole call.
    """
    if not future.done():
        return _too_late(seconds)
    match future.exception():
        case None:
            return future.result()
        case DeadlineExceeded():
            return _too_late(seconds)
        case EngineStopped() as error:
            raise error
        case error:
            return _row_error(row, error)


async def _result(row: int, future: Future[GenerationResult]) -> GenerationResult:
    """Waits for a row's answer; an error that is this row's alone names it."""
    try:
        return await asyncio.wrap_future(future)
    except (DeadlineExceeded, EngineStopped, InvalidRequest):
        raise
    except Exception as error:
        reason = _row_error(row, error)
        if isinstance(reason, errors.Internal):
            raise errors.RowFailed(row, reason.details) from error
        raise type(reason)(f"row {row}: {reason.details}") from None


def _row_error(row: int, error: BaseException) -> ServiceError:
    """Returns an error that is one row's alone, in words for the caller, without the row's number."""
    if isinstance(error, OutOfMemory):
        return errors.Unavailable(str(error))
    if isinstance(error, NonFiniteOutput):
        return errors.Internal(str(error))
    logger.error("row %d failed", row, exc_info=error)
    return errors.Internal(f"internal error: {type(error).__name__}")


def _too_late(seconds: float) -> ServiceError:
    return errors.DeadlineExceeded(f"no answer within {seconds:g} s")


def _to_result(rows: list[GenerationResult | ServiceError]) -> GenerateResult:
    answered = [row for row in rows if isinstance(row, GenerationResult)]
    nothing = np.empty(0)
    return GenerateResult(
        sequences=[nothing if isinstance(row, ServiceError) else row.sequence for row in rows],
        scores=[0.0 if isinstance(row, ServiceError) else row.score for row in rows],
        token_logprobs=[nothing if isinstance(row, ServiceError) else row.token_logprobs for row in rows],
        finish_reasons=[ERROR if isinstance(row, ServiceError) else row.finish_reason for row in rows],
        timings={
            "queue_us": int(max((row.queue_seconds for row in answered), default=0) * 1e6),
            "generate_us": int(max((row.generate_seconds for row in answered), default=0) * 1e6),
        },
        errors={index: row for index, row in enumerate(rows) if isinstance(row, ServiceError)},
    )


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
    pixel_values = np.zeros((processor.image.height, processor.image.width, 3), dtype=np.uint8)
    return GenerationRequest(
        pixel_values=pixel_values,
        image_key=image_key(pixel_values),
        input_ids=processor.input_ids(next(iter(TASKS.values())).prompt()),
        max_new_tokens=8,
    )
