"""All that both clients do, written once and without any waiting or sending.

What a client does is a generator of steps: send this, pause for so long, read that image. The
blocking client and the asyncio one each carry the steps out in their own way, put the results back
in, and know nothing else.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeAlias, TypeVar

import numpy as np
import orjson

from florence2_kserve.client.errors import (
    ClientError,
    DeadlineError,
    OverloadedError,
    UnavailableError,
    reading_an_answer,
)
from florence2_kserve.client.jobs import Image, ImageSource, Job, Outcome
from florence2_kserve.client.results import Answer, gives_masks, read_answer
from florence2_kserve.protocol.public import (
    FINISH_REASON,
    INPUT_IMAGE,
    MASKS,
    PARSED_JSON,
    SCORES,
    TASK_PROMPT,
    TEXT_PROMPT,
)
from florence2_kserve.protocol.tensors import bytes_array
from florence2_kserve.tasks import find_task

_FIRST_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 10.0
_HEALTH_TIMEOUT_S = 10.0
_READINESS_POLL_S = 0.2

Array: TypeAlias = np.ndarray[Any, Any]
T = TypeVar("T")


class Query(Enum):
    """Calls that carry nothing."""

    READY = auto()
    LIVE = auto()
    METADATA = auto()


@dataclass(frozen=True, slots=True)
class Question:
    """An inference request.

    Attributes:
        inputs: BYTES tensors by name.
        parameters: Request parameters.
        outputs: Names of the outputs asked for.
    """

    inputs: Mapping[str, Array]
    parameters: Mapping[str, Any]
    outputs: tuple[str, ...]


Call: TypeAlias = Question | Query


@dataclass(frozen=True, slots=True)
class Send:
    """A step: send `call` once. Gives outputs by name, whether it is ready or live, or the metadata."""

    call: Call
    timeout: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A step: wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Read:
    """A step: read an image. Gives its bytes."""

    image: ImageSource


Step: TypeAlias = Send | Pause | Read
Steps: TypeAlias = Generator[Step, Any, T]


class BaseClient:
    """What is common to both clients: their settings, and the steps of all that they do."""

    def __init__(self, model_name: str, timeout: float, retries: int) -> None:
        self.model_name, self.timeout, self.retries = model_name, timeout, retries
        self.retries_made = 0
        self._counting = threading.Lock()

    def _infer_batch(
        self,
        images: Sequence[Image],
        tasks: Sequence[str],
        texts: Sequence[str | None] | None,
        parameters: Mapping[str, Any],
    ) -> Steps[list[dict[str, Any]]]:
        if len(tasks) != len(images) or (texts is not None and len(texts) != len(images)):
            raise ValueError(f"{len(images)} images, {len(tasks)} tasks and {len(texts or [])} texts don't match")
        data = yield from _read_all(images)
        outputs = yield from self._insist(_question(data, tasks, texts, [len(tasks)], parameters, [PARSED_JSON]))
        with reading_an_answer():
            return [orjson.loads(answer) for answer in outputs[PARSED_JSON].flat]

    def _ask(self, image: ImageSource, task: str, text: str | None, parameters: Mapping[str, Any]) -> Steps[Answer]:
        (answer,) = yield from self._ask_tasks(image, [task], None if text is None else [text], parameters)
        return answer

    def _ask_tasks(
        self,
        image: ImageSource,
        tasks: Sequence[str],
        texts: Sequence[str | None] | None,
        parameters: Mapping[str, Any],
    ) -> Steps[list[Answer]]:
        if texts is not None and len(texts) != len(tasks):
            raise ValueError(f"{len(tasks)} tasks and {len(texts)} texts don't match")
        wanted = [PARSED_JSON, SCORES, FINISH_REASON]
        if any(gives_masks(task) for task in tasks):
            wanted.append(MASKS)
        data = yield from _read_all([image])
        outputs = yield from self._insist(_question(data, tasks, texts, [1, len(tasks)], parameters, wanted))
        with reading_an_answer():
            return _read_answers(tasks, outputs)

    def _work(self, job: Job) -> Steps[Outcome]:
        """Does one job of a stream; whatever goes wrong is in its outcome."""
        started = time.monotonic()
        answer: Answer | None = None
        failure: Exception | None = None
        try:
            answer = yield from self._ask(job.image, job.task, job.text, job.parameters)
        except Exception as error:
            failure = error
        return Outcome(job, answer, failure, time.monotonic() - started)

    def _ask_whether(self, query: Query) -> Steps[bool]:
        try:
            return bool((yield Send(query, min(self.timeout, _HEALTH_TIMEOUT_S))))
        except ClientError:
            return False

    def _wait_ready(self, timeout: float) -> Steps[None]:
        end = time.monotonic() + timeout
        while True:
            try:
                left = end - time.monotonic()
                if (yield Send(Query.READY, min(max(left, 1.0), _HEALTH_TIMEOUT_S))):
                    return
                reason = "it says that it isn't"
            except ClientError as error:
                reason = str(error)
            if time.monotonic() >= end:
                raise UnavailableError(f"the model isn't ready after {timeout:g} s: {reason}")
            yield Pause(_READINESS_POLL_S)

    def _insist(self, call: Call) -> Steps[Any]:
        """Sends `call` until it is answered, refused for good, or time or retries are over."""
        end = time.monotonic() + self.timeout
        attempt = 0
        reason: ClientError | None = None
        while True:
            try:
                return (yield Send(call, max(0.001, end - time.monotonic())))
            except (OverloadedError, UnavailableError) as error:
                reason = error
                pause = _pause_after(error, attempt)
                if attempt >= self.retries or time.monotonic() + pause >= end:
                    raise
            except DeadlineError as error:
                # The time left for one more try was too short; what kept the others from being answered says more.
                if reason is None or time.monotonic() < end:
                    raise
                raise reason from error
            attempt += 1
            with self._counting:
                self.retries_made += 1
            yield Pause(pause)


def split_url(url: str) -> tuple[str, str]:
    """Returns a service's URL as its scheme and what follows.

    Raises:
        ValueError: If the scheme is none of http, https and grpc.
    """
    scheme, separator, target = url.partition("://")
    if not separator or scheme not in ("http", "https", "grpc"):
        raise ValueError(f"url has to start with http://, https:// or grpc://, got {url!r}")
    return scheme, target


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine's own address, which a proxy of the environment can't reach."""
    return host in ("localhost", "127.0.0.1", "::1")


def _pause_after(error: ClientError, attempt: int) -> float:
    """Returns how many seconds to wait: never less than the server said, and not as long as all other clients."""
    backoff = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * math.pow(2, min(attempt, 30))) * random.uniform(0.5, 1.5)
    return max(backoff, (error.retry_after_s or 0.0) * random.uniform(1.0, 1.5))


def _read_all(images: Sequence[ImageSource]) -> Steps[list[bytes]]:
    data = []
    for image in images:
        data.append((yield Read(image)))
    return data


def _question(
    images: Sequence[bytes],
    tasks: Sequence[str],
    texts: Sequence[str | None] | None,
    shape: Sequence[int],
    parameters: Mapping[str, Any],
    outputs: Sequence[str],
) -> Question:
    inputs = {
        INPUT_IMAGE: bytes_array(images),
        TASK_PROMPT: bytes_array([_task_name(task).encode() for task in tasks]).reshape(shape),
    }
    if texts is not None and any(texts):
        inputs[TEXT_PROMPT] = bytes_array([(text or "").encode() for text in texts]).reshape(shape)
    return Question(inputs, parameters, tuple(outputs))


def _task_name(task: str) -> str:
    try:
        return find_task(task).name
    except KeyError:
        return task  # the server may know tasks that this client doesn't


def _read_answers(tasks: Sequence[str], outputs: Mapping[str, Array]) -> list[Answer]:
    parsed, scores = ([orjson.loads(value) for value in outputs[name].flat] for name in (PARSED_JSON, SCORES))
    masks = [orjson.loads(value) for value in outputs[MASKS].flat] if MASKS in outputs else [None] * len(tasks)
    reasons = [value.decode() for value in outputs[FINISH_REASON].flat]
    return [read_answer(*row) for row in zip(tasks, parsed, scores, masks, reasons, strict=True)]
