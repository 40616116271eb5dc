"""The engine: a thread that admits, encodes, decodes and answers, one decoder step at a time.

::

    submit ─▶ queue ─▶ admitted ─▶ features known? ─▶ text encoder ─▶ lane ─▶ a token each step ─▶ answer
                                     │ no                                            │
                                     └▶ image tower, a micro-batch between two steps └▶ lane free for the next
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

from florence2_kserve.engine.capture import Capture
from florence2_kserve.engine.feature_cache import FeatureCache, feature_key
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
from florence2_kserve.engine.metrics import EngineMetrics
from florence2_kserve.engine.runner import Outcome, Runner
from florence2_kserve.engine.scheduler import Job, Scheduler
from florence2_kserve.engine.vision import VisionBackend
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel

logger = logging.getLogger(__name__)

MAX_NUM_BEAMS = 8
_NO_ROOM = "the device has no room for this request at the moment"
_RESERVED_TOKENS = 1024  # tokens a row that there is room for unless max_tokens says otherwise
T = TypeVar("T")


class InflightEngine(Engine):
    """Answers many requests at once, each with the tokens that transformers' ``generate`` gives it alone.

    A request takes part from the step after its prompt is encoded until its own search ends; then its place
    goes to the next. Images are encoded between steps, and once for all requests that show the same.

    Args:
        loaded: The model, on its device.
        image: Image settings.
        max_batch_size: Requests decoded together.
        max_rows: Beams decoded together; None for 3 a request.
        max_tokens: Beams times max_new_tokens of all requests decoded together; None for 1,024 a row, or the
            decoder's positions where it has fewer.
        max_queue_size: Requests that may wait.
        admission_delay: Seconds that a request waits for others, so that they are encoded together; nobody waits
            longer once a micro-batch of them is there.
        vision_batch_size: Images encoded between two decoder steps; None for 1 on a CPU, 8 elsewhere.
        vision_backend: See ``ImageEncoder``.
        compile_vision: See ``ImageEncoder``.
        decode_capture: See ``capture_step``.
        feature_cache_bytes: Bound on the image features kept for later requests; 0 keeps none.
        on_fatal: Called once, from the engine's thread, when the device can't go on.

    Raises:
        ValueError: If settings don't fit the model, the device or each other.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        image: ImageSettings,
        *,
        max_batch_size: int = 36,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        max_queue_size: int = 256,
        admission_delay: float = 0.0,
        vision_batch_size: int | None = None,
        vision_backend: VisionBackend = "auto",
        compile_vision: bool = False,
        decode_capture: Capture = "off",
        feature_cache_bytes: int = 256 * 2**20,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        rows = max(3 * max_batch_size, MAX_NUM_BEAMS) if max_rows is None else max_rows
        tokens = rows * min(_RESERVED_TOKENS, loaded.max_target_positions) if max_tokens is None else max_tokens
        self.metrics = EngineMetrics()
        self._counting = threading.Lock()  # for what submit counts, in whichever thread
        self._loaded = loaded
        self._image = image
        self._max_num_beams = min(MAX_NUM_BEAMS, rows)
        self._micro_batch = vision_batch_size or (1 if loaded.device.type == "cpu" else 8)
        self._prompt_batch = max(self._micro_batch, 4)
        self._on_fatal = on_fatal
        self._step_seconds: deque[float] = deque([0.0], maxlen=8)  # of the last decoder steps
        self._cache = FeatureCache(feature_cache_bytes, self.metrics)
        self._scheduler = Scheduler(
            max_queue_size=max_queue_size,
            max_batch_size=max_batch_size,
            max_rows=rows,
            max_tokens=tokens,
            admission_delay=admission_delay,
            full_batch=self._prompt_batch,
        )
        self._runner = self._make_runner(
            loaded,
            image,
            self.metrics,
            max_batch_size=max_batch_size,
            max_num_beams=self._max_num_beams,
            max_tokens=tokens,
            vision_backend=vision_backend,
            compile_vision=compile_vision,
            decode_capture=decode_capture,
        )
        self._preparing: list[tuple[Job, bytes]] = []  # admitted, not yet decoding; with the key of its image
        self._features: dict[bytes, torch.Tensor] = {}  # of images that some of these show
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def _make_runner(self, *arguments: Any, **options: Any) -> Runner:
        return Runner(*arguments, **options)

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and not self._scheduler.is_stopped

    def submit(self, requests: list[GenerationRequest]) -> list[Future[GenerationResult]]:
        try:
            jobs = [self._make_job(request, row) for row, request in enumerate(requests)]
            self._scheduler.submit(jobs)
        except (InvalidRequest, QueueFull):
            with self._counting:
                self.metrics.requests_refused.add(len(requests))
            raise
        with self._counting:
            self.metrics.requests_submitted.add(len(requests))
        return [job.future for job in jobs]

    def close(self) -> None:
        self._scheduler.stop()
        self._thread.join()

    def _make_job(self, request: GenerationRequest, row: int) -> Job:
        generation = self._loaded.generation
        beams = generation.num_beams if request.num_beams is None else request.num_beams
        penalty = generation.length_penalty if request.length_penalty is None else request.length_penalty
        job = Job(request, beams, float(penalty))
        try:
            self._check(job)
        except InvalidRequest as error:
            error.row = row
            raise
        return job

    def _check(self, job: Job) -> None:
        # Ids or positions beyond their tables are asserts on a GPU that end the process.
        request, loaded = job.request, self._loaded
        ids, room = request.input_ids, self._runner.max_prompt_tokens
        size, pixels = (self._image.height, self._image.width, 3), request.pixel_values
        if pixels.shape != size or pixels.dtype != np.uint8:
            raise InvalidRequest(
                "pixel_values", f"expected uint8 {list(size)}, got {pixels.dtype} {list(pixels.shape)}"
            )
        if not isinstance(request.image_key, bytes):
            raise InvalidRequest("image_key", f"expected bytes, got {type(request.image_key).__name__}")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InvalidRequest("input_ids", f"expected integers [L], got {ids.dtype} {list(ids.shape)}")
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
        if not 1 <= job.num_beams <= self._max_num_beams:
            raise InvalidRequest("num_beams", f"expected 1 to {self._max_num_beams}, got {job.num_beams}")
        if not np.isfinite(job.length_penalty):
            raise InvalidRequest("length_penalty", f"expected a finite number, got {job.length_penalty}")
        if job.tokens > self._scheduler.max_tokens:
            raise InvalidRequest(
                "max_new_tokens",
                f"{job.num_beams} beams times {request.max_new_tokens} tokens exceed this server's "
                f"{self._scheduler.max_tokens}",
            )

    # The loop

    def _loop(self) -> None:
        failure: BaseException | None = None
        try:
            while self._scheduler.wait():
                self._turn()
        except BaseException as error:
            failure = error
            logger.error("the engine can't go on: %s: %s", type(error).__name__, error, exc_info=True)
        self._scheduler.stop()
        reason = "the engine was stopped" if failure is None else f"the engine failed: {failure}"
        for job in self._scheduler.remove_all():
            job.fail(EngineStopped(reason))
        if failure is not None and self._on_fatal is not None:
            self._on_fatal(failure)

    def _turn(self) -> None:
        """One decoder step, with all that lies between it and the one before."""
        self._drop_over()
        for job in self._scheduler.admit():
            self.metrics.queue_seconds.observe(job.admitted_at - job.queued_at)
            key = feature_key(job.request.image_key, self._image, self._loaded.fingerprint)
            if any(key == shown for _, shown in self._preparing):
                self.metrics.feature_cache_hits.add()  # another one waits for it already
            elif (features := self._cache.get(key)) is not None:
                self._features[key] = features
            self._preparing.append((job, key))
        self._prepare()
        self._set_gauges()  # a turn can be long
        if self._runner.num_lanes:
            self._decode()
        self._set_gauges()

    def _drop_over(self) -> None:
        waiting, running = self._scheduler.remove_over()
        for job in waiting:
            self._give_up(job)
        for job in running:
            self._leave(job)
            self._give_up(job)

    def _give_up(self, job: Job) -> None:
        if job.claim():
            self.metrics.requests_expired.add()
            job.future.set_exception(DeadlineExceeded("the deadline passed before the answer was there"))
        else:
            self.metrics.requests_cancelled.add()

    def _leave(self, job: Job) -> None:
        """Takes a job out of flight, wherever it is."""
        self._preparing = [entry for entry in self._preparing if entry[0] is not job]
        self._runner.remove(job)
        self._scheduler.release(job)

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            self._leave(job)
            self._hand_over_error(job, error)

    def _hand_over_error(self, job: Job, error: BaseException) -> None:
        if job.claim():
            self.metrics.requests_failed.add()
            job.future.set_exception(error)
        else:
            self.metrics.requests_cancelled.add()

    def _set_gauges(self) -> None:
        metrics, scheduler = self.metrics, self._scheduler
        metrics.requests_waiting.set(scheduler.num_waiting)
        metrics.requests_running.set(scheduler.num_running)
        metrics.rows_running.set(scheduler.num_rows)
        metrics.tokens_reserved.set(scheduler.num_tokens)

    # Images and prompts

    def _prepare(self) -> None:
        """Encodes images and prompts of admitted jobs: while others are decoding, as long as a step of theirs takes.

        At least one micro-batch is encoded, so that everybody gets on.
        """
        started = time.monotonic()
        while self._preparing:
            self._encode_prompts()
            self._encode_images()
            self._encode_prompts()
            # The shortest: a step that was long by chance must not make the next ones wait longer still.
            if self._runner.num_lanes and time.monotonic() - started >= min(self._step_seconds):
                break
        shown = {key for _, key in self._preparing}
        self._features = {key: features for key, features in self._features.items() if key in shown}

    def _encode_images(self) -> None:
        missing: dict[bytes, Any] = {}
        for job, key in self._preparing:
            if key not in self._features and len(missing) < self._micro_batch:
                missing[key] = job.request.pixel_values
        if not missing:
            return
        started = time.monotonic()

        def encode(keys: Sequence[bytes]) -> None:
            features = self._runner.encode_images([missing[key] for key in keys])
            for key, one in zip(keys, features, strict=True):
                self._features[key] = one
                self._cache.put(key, one)
            self.metrics.images_encoded.add(len(keys))
            self.metrics.vision_batches.add()

        def fail(key: bytes, error: BaseException) -> None:
            self._fail([job for job, shown in self._preparing if shown == key], error)

        self._in_parts(list(missing), encode, fail)
        self._runner.synchronize()  # else the time would show up in the decoder's next step
        self.metrics.vision_seconds.observe(time.monotonic() - started)

    def _encode_prompts(self) -> None:
        """Encodes one micro-batch of prompts of one length whose images are known, the first of them first."""
        ready = [(job, key) for job, key in self._preparing if key in self._features]
        if not ready:
            return
        length = len(ready[0][0].request.input_ids)
        batch = [entry for entry in ready if len(entry[0].request.input_ids) == length][: self._prompt_batch]
        started = time.monotonic()

        def encode(part: Sequence[tuple[Job, bytes]]) -> None:
            self._runner.prefill([self._features[key] for _, key in part], [job for job, _ in part])
            taken = {id(job) for job, _ in part}
            self._preparing = [entry for entry in self._preparing if id(entry[0]) not in taken]
            self.metrics.prompts_encoded.add(len(part))

        self._in_parts(batch, encode, lambda entry, error: self._fail([entry[0]], error))
        self._runner.synchronize()
        self.metrics.prefill_seconds.observe(time.monotonic() - started)

    def _in_parts(
        self, items: Sequence[T], work: Callable[[Sequence[T]], None], fail: Callable[[T, BaseException], None]
    ) -> None:
        """Does `work` on `items`; where that fails, on halves of them, until those that can't be done are alone.

        Where memory is short, cached image features are given up first.

        Raises:
            BaseException: If the device is beyond repair.
        """
        try:
            work(items)
            return
        except Exception as error:
            if _is_device_lost(error, self._loaded.device):
                raise
            has_room = _is_out_of_memory(error) and len(self._cache) > 0
            if len(items) == 1 and not has_room:
                if _is_out_of_memory(error):
                    logger.error("no memory to encode a request: %s", error)
                    fail(items[0], OutOfMemory(_NO_ROOM))
                else:
                    logger.error("a request can't be encoded", exc_info=True)
                    fail(items[0], error.with_traceback(None))
                return
            logger.warning("%d requests can't be encoded, trying again: %s", len(items), error)
        if has_room:
            self._cache.clear()
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(items) // 2
        for part in (items[:half], items[half:]):
            if part:
                self._in_parts(part, work, fail)

    # Decoding

    def _decode(self) -> None:
        started = time.monotonic()
        failure = None
        try:
            outcomes = self._runner.decode()
        except Exception as error:
            if not _is_out_of_memory(error) or _is_device_lost(error, self._loaded.device):
                raise
            failure = str(error)
        if failure is not None:  # out here, nothing holds on to the failed step's tensors any more
            self._make_room(failure)
            return
        seconds = time.monotonic() - started
        self._step_seconds.append(seconds)
        self.metrics.decode_step_seconds.observe(seconds)
        for outcome in outcomes:
            self._scheduler.release(outcome.job)
            self._answer(outcome)

    def _make_room(self, failure: str) -> None:
        """Lets the next step need less memory than the one that failed for lack of it."""
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._runner.is_intact:
            logger.error("no memory in the middle of a decoder step; all requests in it are given up: %s", failure)
            self._fail(self._runner.reset(), OutOfMemory(_NO_ROOM))
        elif len(self._cache):
            logger.warning("no memory for a decoder step; cached image features are given up: %s", failure)
            self._cache.clear()
        else:
            logger.error("no memory for a decoder step; the youngest request is given up: %s", failure)
            youngest = self._runner.jobs()[-1]
            self._runner.remove(youngest, scrub=True)
            self._fail([youngest], OutOfMemory(_NO_ROOM))

    def _answer(self, outcome: Outcome) -> None:
        job = outcome.job
        if outcome.is_broken:
            self._hand_over_error(job, NonFiniteOutput("the model gave NaN for this request"))
            return
        if not job.claim():
            self.metrics.requests_cancelled.add()
            return
        generated = len(outcome.tokens) - 1
        is_cut = generated >= job.request.max_new_tokens
        now = time.monotonic()
        (self.metrics.requests_length if is_cut else self.metrics.requests_stopped).add()
        self.metrics.generated_tokens.add(generated)
        self.metrics.request_seconds.observe(now - job.queued_at)
        job.future.set_result(
            GenerationResult(
                sequence=outcome.tokens,
                score=outcome.score,
                token_logprobs=outcome.token_logprobs,
                finish_reason="length" if is_cut else "stop",
                queue_seconds=job.admitted_at - job.queued_at,
                generate_seconds=now - job.admitted_at,
            )
        )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory"))


def _is_device_lost(error: BaseException, device: torch.device) -> bool:
    """Whether nothing can be computed on `device` any more."""
    if _is_out_of_memory(error):
        return False
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error):
        return True
    try:
        torch.ones(1, device=device).add_(1).cpu()
    except Exception:
        return True
    return False
