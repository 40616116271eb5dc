"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from florence2_kserve.client.core import BaseClient, Pause, Query, Read, Send, Step, Steps, split_url
from florence2_kserve.client.jobs import AHEAD, Image, Job, Outcome, Sequencer, check_concurrency, read_image
from florence2_kserve.client.rest import AsyncRestTransport
from florence2_kserve.client.results import Answer
from florence2_kserve.client.rpc import AsyncGrpcTransport

T = TypeVar("T")
# Outcomes by the index of their job as they complete, and None behind the last.
_Finished: TypeAlias = "asyncio.Queue[tuple[int, Outcome] | None]"


class AsyncFlorence2Client(BaseClient):
    """Asks a Florence-2 service from asyncio.

    Its methods are those of `Florence2Client`, to be awaited. A client belongs to the event loop
    in which its first call is made, and its tasks may share it.

    Args:
        url: As for `Florence2Client`, and so are the others.
        model_name: Name of the model in the URL.
        timeout: Seconds for one call, its retries included.
        retries: How often a call is repeated.
        headers: Sent with every call.
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
        self._transport: AsyncRestTransport | AsyncGrpcTransport = (
            AsyncGrpcTransport(target, model_name, headers or {}, max_message_bytes)
            if scheme == "grpc"
            else AsyncRestTransport(url, model_name, headers or {})
        )
        self._streams: set[asyncio.Task[None]] = set()

    async def infer(self, image: Image, task: str, text: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Asks one question about one image; as `Florence2Client.infer`."""
        return (await self.infer_batch([image], [task], None if text is None else [text], **parameters))[0]

    async def infer_batch(
        self,
        images: Sequence[Image],
        tasks: Sequence[str],
        texts: Sequence[str | None] | None = None,
        **parameters: Any,
    ) -> list[dict[str, Any]]:
        """Asks one question about each of several images in one request; as `Florence2Client.infer_batch`."""
        return await self._run(self._infer_batch(images, tasks, texts, parameters))

    async def ask(self, image: Image, task: str, text: str | None = None, **parameters: Any) -> Answer:
        """Asks one question about one image and gives a typed answer; as `Florence2Client.ask`."""
        return await self._run(self._ask(image, task, text, parameters))

    async def ask_tasks(
        self, image: Image, tasks: Sequence[str], texts: Sequence[str | None] | None = None, **parameters: Any
    ) -> list[Answer]:
        """Asks several questions about one image in one request; as `Florence2Client.ask_tasks`."""
        return await self._run(self._ask_tasks(image, tasks, texts, parameters))

    def stream(
        self, jobs: Iterable[Job] | AsyncIterable[Job], *, concurrency: int = 8, ordered: bool = False
    ) -> AsyncGenerator[Outcome, None]:
        """Does any number of jobs, several at once, and yields what became of each.

        `jobs` is read in a task of its own; it may be endless, and where taking the next job means waiting it should
        be an async iterable. A loop over the outcomes may end at any time: jobs in flight are cancelled then.

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

    async def is_ready(self) -> bool:
        """Whether the service says that the model is ready."""
        return await self._run(self._ask_whether(Query.READY))

    async def is_live(self) -> bool:
        """Whether the service's process answers."""
        return await self._run(self._ask_whether(Query.LIVE))

    async def wait_ready(self, timeout: float = 120.0) -> None:
        """Waits until the model is ready.

        Raises:
            UnavailableError: If it isn't after `timeout` seconds.
        """
        await self._run(self._wait_ready(timeout))

    async def metadata(self) -> dict[str, Any]:
        """Returns the model's V2 metadata: its name, platform, inputs and outputs."""
        return await self._run(self._insist(Query.METADATA))

    async def close(self) -> None:
        """Cancels what streams have in flight and closes the connections."""
        await _cancel(*self._streams)
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _stream(
        self, jobs: Iterable[Job] | AsyncIterable[Job], concurrency: int, sequencer: Sequencer
    ) -> AsyncGenerator[Outcome, None]:
        finished: _Finished = asyncio.Queue()
        room = asyncio.Semaphore(AHEAD * concurrency)
        stream = asyncio.create_task(self._work_through(jobs, concurrency, room, finished))
        self._streams.add(stream)
        stream.add_done_callback(self._streams.discard)
        stream.add_done_callback(lambda _: finished.put_nowait(None))
        try:
            while (entry := await finished.get()) is not None:
                for outcome in sequencer.add(*entry):
                    room.release()
                    yield outcome
        finally:
            await _cancel(stream)
        if stream.cancelled():
            raise RuntimeError("the client was closed while its stream was read")
        stream.result()

    async def _work_through(
        self,
        jobs: Iterable[Job] | AsyncIterable[Job],
        concurrency: int,
        room: asyncio.Semaphore,
        finished: _Finished,
    ) -> None:
        in_flight = asyncio.Semaphore(concurrency)
        failure: Exception | None = None

        async def work(index: int, job: Job) -> None:
            async with in_flight:
                finished.put_nowait((index, await self._run(self._work(job))))

        async with asyncio.TaskGroup() as group:
            index = 0
            try:
                await room.acquire()
                async for job in _each(jobs):
                    group.create_task(work(index, job))
                    index += 1
                    await room.acquire()
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure

    async def _run(self, steps: Steps[T]) -> T:
        """Carries out steps."""
        try:
            step = next(steps)
            while True:
                try:
                    result = await self._take(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as done:
            return done.value

    async def _take(self, step: Step) -> Any:
        match step:
            case Send(call, timeout):
                return await self._transport.send(call, timeout)
            case Read(bytes() as data):
                return data
            case Read(image):
                return await asyncio.to_thread(read_image, image)  # files and functions may block
            case Pause(seconds):
                await asyncio.sleep(seconds)


async def _each(jobs: Iterable[Job] | AsyncIterable[Job]) -> AsyncIterator[Job]:
    if isinstance(jobs, AsyncIterable):
        async for job in jobs:
            yield job
    else:
        for job in jobs:
            yield job


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
