"""Reads pictures, asks about them and records the answers, all at once and all of it bounded.

At most twice ``concurrency`` pictures are held at any moment: those that wait for an answer, and as
many that were read meanwhile. Every picture takes the same way:

    next source → known by its file's state? → read, hash → known by its bytes? → ask → write
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_threads
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from florence2_kserve.batch.identity import Asked, Question, content_hash
from florence2_kserve.batch.ledger import FailureKind, Ledger, OpenQuestion
from florence2_kserve.batch.lines import answer_fields
from florence2_kserve.batch.progress import Progress, Tally
from florence2_kserve.batch.sources import Picture, SourceError, Sources
from florence2_kserve.client import (
    AsyncFlorence2Client,
    ClientError,
    InvalidRequestError,
    NotFoundError,
)
from florence2_kserve.exit_codes import SIGNAL_CODES, ExitCode
from florence2_kserve.protocol.public import INPUT_IMAGE, INPUTS

if TYPE_CHECKING:
    from florence2_kserve.client import Answer

SYNC_S = 5.0
_REDRAW_S = 0.2
_ATTEMPTS = 3
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_REFUSES_US = frozenset({401, 403, 404, 405, "UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND", "UNIMPLEMENTED"})
_TOO_LARGE = frozenset({413, "RESOURCE_EXHAUSTED"})  # the latter of gRPC itself, where it is an InvalidRequestError
_SAME_MODEL_S = 60.0  # while no request fails, a service counts for so long as the model that it said it was
_MEET_PAUSE_S = 1.0
_MOST_THREADS = 64
_LAST_READS_S = 2.0
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask about each picture, and how.

    Attributes:
        tasks: Names of the tasks.
        text: For the tasks that take one, where a picture brings none of its own.
        takes_text: Which of the tasks take a text or region.
        parameters: Request parameters.
        concurrency: Requests in flight.
        limit: Pictures to ask about at most; None for all.
        give_up_after: Seconds without any answer after which the service counts as gone.
        grace: Seconds for what is in flight after a signal.
    """

    tasks: Sequence[str]
    text: str | None = None
    takes_text: frozenset[str] = frozenset()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    limit: int | None = None
    give_up_after: float = 60.0
    grace: float = 30.0

    def questions(self, picture: Picture) -> list[Question]:
        """Returns what is asked about a picture."""
        text = self.text if picture.text is None else picture.text
        return [Question(task, text if task in self.takes_text else None) for task in self.tasks]


class RunEnded(Exception):
    """Nothing more can be asked.

    Attributes:
        code: How the command ends.
    """

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Read:
    """A picture that was read."""

    picture: Picture
    state: str | None
    content: str
    data: bytes


class Batch:
    """One run.

    Args:
        sources: Where pictures come from.
        plan: What is asked about them.
        ledger: What is done, and where answers go.
        client: Asks.
        meet: Asks the service who it is; raises ClientError where it doesn't answer.
        asked: Who it was when `ledger` was opened.
        progress: Shows how far it is.
        say: Takes lines for people.

    Attributes:
        tally: What was done until now.
        is_blocked: Whether a thread still waits for a source when all else has ended; nothing can end it but the
            process's end.
    """

    def __init__(
        self,
        sources: Sources,
        plan: Plan,
        ledger: Ledger,
        client: AsyncFlorence2Client,
        meet: Callable[[], Awaitable[Asked]],
        asked: Asked,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._sources, self._plan, self._ledger, self._client = sources, plan, ledger, client
        self._meet, self._asked = meet, asked
        self._progress, self._say = progress, say
        self.tally = Tally()
        self.is_blocked = False
        self._pictures = iter(sources)
        self._pulling = asyncio.Lock()
        self._slots = asyncio.Semaphore(plan.concurrency)
        self._threads = ThreadPoolExecutor(min(2 * plan.concurrency, _MOST_THREADS), "florence2-batch")
        self._counting = ThreadPoolExecutor(1, "florence2-count")
        self._in_threads: set[Future[Any]] = set()
        self._stopping = threading.Event()
        self._signalled: ExitCode | None = None
        self._taken = 0
        self._tallying = threading.Lock()
        self._workers: list[asyncio.Task[None]] = []
        self._answering: set[asyncio.Task[None] | None] = set()
        self._broken: OSError | None = None
        self._being_asked: dict[str, asyncio.Event] = {}
        self._answers_seen = 0
        self._silent_since: float | None = None
        self._failures = 0
        self._meeting = asyncio.Lock()
        self._met_at, self._met_after = time.monotonic(), client.retries_made
        self._are_open = False

    async def run(self) -> ExitCode:
        """Runs until all is done, a signal comes, or the service is gone.

        Returns:
            How the command ends.

        Raises:
            RunEnded: If the service is gone, refuses us, or a source can't be listed.
            OSError: If the output can't be written.
        """
        self._workers = [asyncio.create_task(self._work()) for _ in range(2 * self._plan.concurrency)]
        helpers = [asyncio.create_task(helper()) for helper in (self._sync, self._show, self._count)]
        try:
            with self._progress, self._on_signals():
                finished, _ = await asyncio.wait(self._workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self._stopping.set()
            for task in (*helpers, *self._workers):
                task.cancel()
            await asyncio.gather(*helpers, *self._workers, return_exceptions=True)
            for threads in (self._threads, self._counting):
                threads.shutdown(wait=False, cancel_futures=True)
            self.is_blocked = bool(wait_for_threads(self._in_threads, _LAST_READS_S).not_done)
        for task in finished:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if self._broken is not None:
            raise self._broken
        if self._signalled is not None:
            return self._signalled
        if self._are_open:
            return ExitCode.SOME_UNANSWERED
        return ExitCode.SOME_REFUSED if self.tally.failed else ExitCode.OK

    @contextmanager
    def _on_signals(self) -> Iterator[None]:
        """Lets the first signal end the run in order, and the second one at once."""
        loop = asyncio.get_running_loop()

        def stop(code: ExitCode) -> None:
            if self._signalled is not None:
                self._drop_all()
                return
            self._signalled = code
            self._stopping.set()
            self._say(f"stopping; {self.tally.in_flight} answers are in flight (once more to drop them)")
            for worker in self._workers:
                if worker not in self._answering:  # it waits for a source, perhaps for ever
                    worker.cancel()
            loop.call_later(self._plan.grace, self._drop_all)

        for number, code in SIGNAL_CODES.items():
            loop.add_signal_handler(number, stop, code)
        try:
            yield
        finally:
            for number in SIGNAL_CODES:
                loop.remove_signal_handler(number)

    def _drop_all(self) -> None:
        for worker in self._workers:
            worker.cancel()

    # --- helpers that run beside -------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            try:
                await self._in_thread(self._threads, self._ledger.sync)
            except OSError as error:  # the disk didn't take what was written, and says so only once
                self._broken = error
                self._drop_all()
                return

    async def _show(self) -> None:
        while True:
            self._progress.update(self.tally)
            await asyncio.sleep(_REDRAW_S)

    async def _count(self) -> None:
        with suppress(SourceError, OSError):  # whoever enumerates to ask will meet it too, and say so
            self.tally.total = await self._in_thread(self._counting, self._sources.count, self._stopping)

    # --- a picture's way ---------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while (picture := await self._next()) is not None:
            read = await self._read(picture)
            if read is None:
                self._taken -= 1  # nothing was asked, so it doesn't count against the limit
            else:
                self._answering.add(asyncio.current_task())
                try:
                    await self._answer(read)
                finally:
                    self._answering.discard(asyncio.current_task())

    async def _next(self) -> Picture | None:
        async with self._pulling:
            is_over = self._plan.limit is not None and self._taken >= self._plan.limit
            if is_over or self._stopping.is_set():
                return None
            picture = await self._in_thread(self._threads, self._pull)
            self._taken += picture is not None
            return picture

    def _pull(self) -> Picture | None:
        """Returns the next picture that isn't known to be settled; in a thread, since listing may take time."""
        try:
            for picture in self._pictures:
                if self._stopping.is_set():
                    return None
                if not self._is_settled(picture, picture.state):
                    return picture
        except SourceError as error:
            raise RunEnded(str(error), ExitCode.FAILED) from None
        except OSError as error:
            raise RunEnded(f"a source can't be listed: {error}", ExitCode.FAILED) from None
        return None

    def _is_settled(self, picture: Picture, state: str | None) -> bool:
        content = self._ledger.known_content(picture, state)
        return content is not None and self._settle(picture, content)

    def _settle(self, picture: Picture, content: str) -> bool:
        """Counts a picture that has no open question; returns whether it has none."""
        questions = self._plan.questions(picture)
        if self._ledger.open_questions(picture, content, questions):
            return False
        self._ledger.forget_stale_failures(picture, content, questions)
        self._tally("failed" if self._ledger.count_refused(picture, content, questions) else "known")
        return True

    def _tally(self, outcome: Literal["known", "answered", "copied", "failed"]) -> None:
        with self._tallying:
            setattr(self.tally, outcome, getattr(self.tally, outcome) + 1)

    async def _read(self, picture: Picture) -> _Read | None:
        def read() -> _Read | None:
            state = picture.state
            if state is None and picture.look is not None:
                state = picture.look()
                if self._is_settled(picture, state):
                    return None
            data = picture.read()
            return _Read(picture, state, content_hash(data), data)

        try:
            found = await self._in_thread(self._threads, read)
        except (OSError, SourceError) as error:
            for question in self._plan.questions(picture):
                self._ledger.add_failure(
                    picture, picture.state, None, question, kind=FailureKind.UNREAD, error=error, attempts=1
                )
            self._are_open = True
            self._tally("failed")
            return None
        if found is not None and self._settle(picture, found.content):
            self._ledger.note_state(picture, found.state, found.content, self._plan.questions(picture))
            return None
        return found

    async def _answer(self, read: _Read) -> None:
        questions = self._plan.questions(read.picture)
        # Pictures with the same bytes may be in flight together; the service is asked about them once.
        while waited := [
            asked.wait()
            for item in self._ledger.open_questions(read.picture, read.content, questions)
            if (asked := self._being_asked.get(item.key)) is not None
        ]:
            await asyncio.gather(*waited)
        wanted = self._ledger.open_questions(read.picture, read.content, questions)
        still_open = self._ledger.copy_answers(read.picture, read.state, wanted)
        if not still_open:
            self._tally("copied")
            return
        done = asyncio.Event()
        self._being_asked.update({item.key: done for item in still_open})
        try:
            await self._ask(read, still_open)
        finally:
            done.set()
            for item in still_open:
                del self._being_asked[item.key]

    async def _ask(self, read: _Read, questions: Sequence[OpenQuestion]) -> None:
        started_seen = self._answers_seen
        attempts = 0
        while True:
            attempts += 1
            started = time.monotonic()
            try:
                async with self._slots:
                    if self._stopping.is_set():
                        return
                    started = time.monotonic()
                    replies = await self._replies(read.data, questions)
                break
            except ClientError as error:
                self._note_silence(error)
                # Others were answered meanwhile, so it is this picture that the service can't do.
                if attempts >= _ATTEMPTS and self._answers_seen > started_seen:
                    replies = [error] * len(questions)
                    break
                if self._stopping.is_set():
                    return
                pause = min(_LONGEST_PAUSE_S, _PAUSE_S * 2**attempts)
                await asyncio.sleep(max(pause, error.retry_after_s or 0.0))
        seconds = time.monotonic() - started
        await self._meet_again()
        self._record(read, questions, replies, attempts, seconds)

    async def _replies(self, data: bytes, questions: Sequence[OpenQuestion]) -> list[Answer | ClientError]:
        """Asks all questions in one request, and where it is refused, one by one to find the bad ones.

        Raises:
            ClientError: If there is no answer for now.
            RunEnded: If it refuses us altogether.
        """
        tasks = [item.question.task for item in questions]
        texts = [item.question.text for item in questions]
        self.tally.in_flight += 1
        try:
            answers = await self._client.ask_tasks(data, tasks, texts, **self._plan.parameters)
        except InvalidRequestError as error:
            is_too_large = error.status in _TOO_LARGE
            if not is_too_large and not str(error).startswith(INPUTS):
                raise RunEnded(f"the service refuses: {error}", ExitCode.USAGE) from None
            self._note_answer()
            if len(questions) == 1 or is_too_large or str(error).startswith(INPUT_IMAGE):
                return [error] * len(questions)
        except ClientError as error:
            if isinstance(error, NotFoundError) or error.status in _REFUSES_US:
                raise RunEnded(f"the service refuses: {error}", ExitCode.FAILED) from None
            raise
        else:
            self._note_answer()
            return list(answers)
        finally:
            self.tally.in_flight -= 1
        return [reply for item in questions for reply in await self._replies(data, [item])]

    def _record(
        self,
        read: _Read,
        questions: Sequence[OpenQuestion],
        replies: Sequence[Answer | ClientError],
        attempts: int,
        seconds: float,
    ) -> None:
        answered = [
            (item, {**answer_fields(reply), "seconds": round(seconds, 3)})
            for item, reply in zip(questions, replies, strict=True)
            if not isinstance(reply, ClientError)
        ]
        self._ledger.add_answers(read.picture, read.state, read.content, answered)
        for item, reply in zip(questions, replies, strict=True):
            if isinstance(reply, ClientError):
                is_refused = isinstance(reply, InvalidRequestError)
                kind = FailureKind.REFUSED if is_refused else FailureKind.UNANSWERED
                self._are_open |= not is_refused
                self._ledger.add_failure(
                    read.picture, read.state, read.content, item, kind=kind, error=reply, attempts=attempts
                )
        self._tally("answered" if len(answered) == len(questions) else "failed")

    # --- the service -------------------------------------------------------------------------------------------------

    def _note_answer(self) -> None:
        self._answers_seen += 1
        self._silent_since = None

    def _note_silence(self, error: ClientError) -> None:
        self._failures += 1
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        elif now - self._silent_since >= self._plan.give_up_after:
            raise RunEnded(
                f"the service has answered no question for {now - self._silent_since:.0f} s: {error}",
                ExitCode.UNREACHABLE,
            ) from None

    async def _meet_again(self) -> None:
        """Makes sure, after a while and after whatever went wrong meanwhile, that it is still the model of before.

        Raises:
            RunEnded: If it isn't, or the service is gone or refuses us.
        """
        async with self._meeting:
            while True:
                failures = self._failures + self._client.retries_made
                age = time.monotonic() - self._met_at
                if failures == self._met_after and age < _SAME_MODEL_S:
                    return
                await asyncio.sleep(max(0.0, _MEET_PAUSE_S - age))
                try:
                    asked = await self._meet()
                except ClientError as error:
                    if isinstance(error, InvalidRequestError | NotFoundError) or error.status in _REFUSES_US:
                        raise RunEnded(f"the service refuses: {error}", ExitCode.FAILED) from None
                    self._met_at = time.monotonic()
                    self._note_silence(error)
                    continue
                if asked != self._asked:
                    raise RunEnded(
                        f"the service's model changed from {self._asked} to {asked}; run again", ExitCode.FAILED
                    )
                self._met_at, self._met_after = time.monotonic(), failures

    async def _in_thread(self, threads: ThreadPoolExecutor, work: Callable[..., _Result], *given: Any) -> _Result:
        running = threads.submit(work, *given)
        self._in_threads.add(running)
        running.add_done_callback(self._in_threads.discard)
        return await asyncio.wrap_future(running)
