"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from florence2_kserve.client.core import BaseClient, Pause, Query, Read, Send, Step, Steps, split_url
from florence2_kserve.client.jobs import AHEAD, Image, Job, Outcome, Sequencer, check_concurrency, read_image
from florence2_kserve.client.rest import RestTransport
from florence2_kserve.client.results import Answer
from florence2_kserve.client.rpc import GrpcTransport

T = TypeVar("T")


class Florence2Client(BaseClient):
    """Asks a Florence-2 service.

    Requests that meet a full queue, an unready server or a reset connection are sent again,
    with growing jittered pauses, as often as `retries` says and while `timeout` lasts; they
    change nothing on the server, so that sending twice is safe. Threads may share a client.

    Args:
        url: ``http://host:port`` for REST, ``grpc://host:port`` for gRPC without TLS.
        model_name: Name of the model in the URL.
        timeout: Seconds for one call, its retries included; over REST an answer that has begun may take that long
            between any two of its parts.
        retries: How often a call is repeated.
        headers: Sent with every call, e.g. authorization; ``Host`` names a service behind an ingress whose address
            `url` holds, and is the ``:authority`` over gRPC.
        max_message_bytes: Largest gRPC message.

    Attributes:
        timeout: As given; may be changed.
        retries: As given; may be changed.
        retries_made: How often calls of this client were repeated until now.
    """

    def __init__(
        self,
        url: str = "http://localhost:8080",
        *,
        model_name: str = "florence2",
        timeout: float = 120.0,
        retries: int = 5,
        headers: dict[str, str] | None = None,
        max_message_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        scheme, target = split_url(url)
        super().__init__(model_name, timeout, retries)
        self._transport: RestTransport | GrpcTransport = (
            GrpcTransport(target, model_name, headers or {}, max_message_bytes)
            if scheme == "grpc"
            else RestTransport(url, model_name, headers or {})
        )

    def infer(self, image: Image, task: str, text: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Asks one question about one image.

        Args:
            image: Path of an image file, or its encoded bytes (JPEG, PNG, …).
            task: Task prompt, with or without angle brackets: ``"<CAPTION>"``, ``"od"``.
            text: Text or region, for the tasks that take one.
            **parameters: Request parameters: max_new_tokens, num_beams, length_penalty, timeout_ms.

        Returns:
            The answer keyed by the task prompt, e.g. ``{"<OD>": {"bboxes": [[…]], "labels": […]}}``.

        Raises:
            ClientError: One of its kinds; `message` holds what the server said.
        """
        return self.infer_batch([image], [task], None if text is None else [text], **parameters)[0]

    def infer_batch(
        self,
        images: Sequence[Image],
        tasks: Sequence[str],
        texts: Sequence[str | None] | None = None,
        **parameters: Any,
    ) -> list[dict[str, Any]]:
        """Asks one question about each of several images in one request.

        Args:
            images: B images.
            tasks: B task prompts.
            texts: B texts or regions, None or "" where the task takes none.
            **parameters: As for `infer`.

        Returns:
            B answers.

        Raises:
            ValueError: If the lengths differ.
            ClientError: One of its kinds; one bad row fails the request, and its message names the row. With
                ``partial=True`` that row's answer is ``{"error": {"status": …, "message": …}}`` instead.
        """
        return self._run(self._infer_batch(images, tasks, texts, parameters))

    def ask(self, image: Image, task: str, text: str | None = None, **parameters: Any) -> Answer:
        """Asks one question about one image; the answer is typed and has scores, and masks where it has polygons.

        Args:
            image: As for `infer`.
            task: As for `infer`.
            text: As for `infer`.
            **parameters: As for `infer`.

        Returns:
            A `Caption`, `Detections`, `OcrRegions`, `Masks` or `DetectionsOrMasks`, as the task has it.

        Raises:
            ClientError: One of its kinds; `message` holds what the server said.
        """
        return self._run(self._ask(image, task, text, parameters))

    def ask_tasks(
        self, image: Image, tasks: Sequence[str], texts: Sequence[str | None] | None = None, **parameters: Any
    ) -> list[Answer]:
        """Asks several questions about one image in one request, which looks at the image once.

        Args:
            image: As for `infer`.
            tasks: T task prompts.
            texts: T texts or regions, None or "" where the task takes none.
            **parameters: As for `infer`.

        Returns:
            T answers, typed as those of `ask`.

        Raises:
            ValueError: If the lengths differ.
            ClientError: One of its kinds; with ``partial=True`` a RowError for the first row without an answer.
        """
        return self._run(self._ask_tasks(image, tasks, texts, parameters))

    def stream(
        self, jobs: Iterable[Job], *, concurrency: int = 8, ordered: bool = False
    ) -> Generator[Outcome, None, None]:
        """Does any number of jobs, several at once, and yields what became of each.

        `jobs` is read in the caller's thread, as outcomes are taken; it may be endless. A loop over the outcomes
        may end at any time: jobs in flight are finished then, and no others begun.

        Args:
            jobs: The jobs. At most twice `concurrency` of them are taken ahead of the outcomes.
            concurrency: How many jobs may be in flight.
            ordered: Whether outcomes come in the order of the jobs; else as they complete, which no slow job holds up.

        Yields:
            An outcome for each job; an error of one is in its outcome and ends nothing.

        Raises:
            ValueError: If `concurrency` is below 1.
            Exception: What `jobs` itself raises, after the outcomes of the jobs before it.
        """
        check_concurrency(concurrency)
        return self._stream(jobs, concurrency, Sequencer(ordered=ordered))

    def is_ready(self) -> bool:
        """Whether the service says that the model is ready."""
        return self._run(self._ask_whether(Query.READY))

    def is_live(self) -> bool:
        """Whether the service's process answers."""
        return self._run(self._ask_whether(Query.LIVE))

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Waits until the model is ready.

        Raises:
            UnavailableError: If it isn't after `timeout` seconds.
        """
        self._run(self._wait_ready(timeout))

    def metadata(self) -> dict[str, Any]:
        """Returns the model's V2 metadata: its name, platform, inputs and outputs."""
        return self._run(self._insist(Query.METADATA))

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, jobs: Iterable[Job], concurrency: int, sequencer: Sequencer) -> Generator[Outcome, None, None]:
        ended = threading.Event()
        finished: SimpleQueue[tuple[int, Future[Outcome]]] = SimpleQueue()
        ready: deque[Outcome] = deque()
        failure: Exception | None = None
        taken = handed_out = 0
        source: Iterator[Job] | None = iter(jobs)
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="florence2-stream")
        try:
            while True:
                # At least one job is taken for each outcome, so that requests stay in flight; more while none waits.
                while source is not None and taken - handed_out < AHEAD * concurrency:
                    try:
                        job = next(source)
                    except StopIteration:
                        source = None
                    except Exception as error:
                        source, failure = None, error
                    else:
                        future = pool.submit(self._run, self._work(job), ended)
                        future.add_done_callback(partial(_put, finished, taken))
                        taken += 1
                    if ready or not finished.empty():
                        break
                if ready:
                    handed_out += 1
                    yield ready.popleft()
                elif taken > handed_out:
                    index, future = finished.get()
                    ready.extend(sequencer.add(index, future.result()))
                else:
                    break
        finally:
            ended.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if failure is not None:
            raise failure

    def _run(self, steps: Steps[T], ended: threading.Event | None = None) -> T:
        """Carries out steps; once `ended` is set, none of them pauses any more."""
        try:
            step = next(steps)
            while True:
                try:
                    result = self._take(step, ended)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as done:
            return done.value

    def _take(self, step: Step, ended: threading.Event | None) -> Any:
        match step:
            case Send(call, timeout):
                return self._transport.send(call, timeout)
            case Read(image):
                return read_image(image)
            case Pause(seconds):
                if ended is None:
                    time.sleep(seconds)
                elif ended.wait(seconds):
                    raise RuntimeError("the stream was closed")


def _put(finished: SimpleQueue[tuple[int, Future[Outcome]]], index: int, future: Future[Outcome]) -> None:
    finished.put((index, future))
