"""Who runs next: first come first served, within bounds. Knows no tensors.

Every method may be called from any thread; only the engine's own thread takes jobs out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from florence2_kserve.engine.interface import EngineStopped, GenerationRequest, GenerationResult, QueueFull


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the engine.

    Attributes:
        request: What was asked.
        num_beams: Beams, the checkpoint's default filled in.
        length_penalty: Length penalty, likewise.
        future: Who waits for it.
        queued_at: ``time.monotonic()`` of its arrival.
        admitted_at: When it was taken from the queue.
    """

    request: GenerationRequest
    num_beams: int
    length_penalty: float
    future: Future[GenerationResult] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0

    @property
    def tokens(self) -> int:
        """Keys and values it may come to hold: a token for each beam and step."""
        return self.num_beams * self.request.max_new_tokens

    def is_over(self, now: float) -> bool:
        """Whether nobody waits for the answer any more: cancelled, or past its deadline."""
        deadline = self.request.deadline
        return self.future.cancelled() or (deadline is not None and now >= deadline)

    def claim(self) -> bool:
        """Takes away the right to cancel before the job is answered; returns False if that has happened already."""
        return not self.future.done() and self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """Hands over an error, unless the request was cancelled."""
        if self.claim():
            self.future.set_exception(error)


class Scheduler:
    """A bounded queue, and bounds on what is in flight.

    The first of the queue is admitted as soon as it fits; while it doesn't, nobody overtakes it.
    So a request waits at most until those before it have ended, each of which takes at most
    ``max_new_tokens`` decode steps: nothing starves.

    Args:
        max_queue_size: Requests that may wait.
        max_batch_size: Requests in flight.
        max_rows: Beams in flight.
        max_tokens: ``num_beams * max_new_tokens`` of all requests in flight, reserved when admitted, so
            that no request ever has to be thrown out for lack of room.
        admission_delay: Seconds that the first of the queue waits for others to come along.
        full_batch: Waiting requests that it no longer waits for others with.
    """

    def __init__(
        self,
        *,
        max_queue_size: int,
        max_batch_size: int,
        max_rows: int,
        max_tokens: int,
        admission_delay: float = 0.0,
        full_batch: int = 1,
    ) -> None:
        self.max_queue_size = max_queue_size
        self.max_batch_size = max_batch_size
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.admission_delay = admission_delay
        self.full_batch = full_batch
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._rows = self._tokens = 0
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def is_stopped(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopped

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in flight."""
        return len(self._running)

    @property
    def num_rows(self) -> int:
        """Beams in flight."""
        return self._rows

    @property
    def num_tokens(self) -> int:
        """Tokens reserved by what is in flight."""
        return self._tokens

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of `jobs`, or none.

        Raises:
            QueueFull: If they don't fit.
            EngineStopped: After ``stop``.
        """
        with self._changed:
            if self._stopped:
                raise EngineStopped("the engine is stopped")
            if len(self._waiting) + len(jobs) > self.max_queue_size:
                raise QueueFull(
                    f"{len(self._waiting)} rows wait, {len(jobs)} more don't fit into {self.max_queue_size}"
                )
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def wait(self) -> bool:
        """Blocks while there is nothing to do; returns False once stopped."""
        with self._changed:
            while not (self._stopped or self._running):
                if not self._waiting:
                    self._changed.wait()
                elif (delay := self._delay_left()) > 0:
                    self._changed.wait(delay)
                else:
                    break
            return not self._stopped

    def admit(self) -> list[Job]:
        """Moves jobs from the head of the queue into flight, as many as fit, and returns them."""
        admitted: list[Job] = []
        with self._changed:
            if self._delay_left() > 0:
                return admitted
            while self._waiting and self._fits(self._waiting[0]):
                job = self._waiting.popleft()
                self._running.append(job)
                self._rows += job.num_beams
                self._tokens += job.tokens
                job.admitted_at = time.monotonic()
                admitted.append(job)
        return admitted

    def release(self, job: Job) -> None:
        """Gives back what a job in flight held; its place is free for the next ``admit``."""
        with self._changed:
            self._running.remove(job)
            self._rows -= job.num_beams
            self._tokens -= job.tokens

    def remove_over(self) -> tuple[list[Job], list[Job]]:
        """Takes out what nobody waits for any more.

        Returns:
            Jobs removed from the queue, and jobs in flight, which still have to be released.
        """
        now = time.monotonic()
        with self._changed:
            waiting = [job for job in self._waiting if job.is_over(now)]
            if waiting:
                self._waiting = deque(job for job in self._waiting if job not in waiting)
            return waiting, [job for job in self._running if job.is_over(now)]

    def stop(self) -> None:
        """Refuses further jobs and ends ``wait``."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def remove_all(self) -> list[Job]:
        """Takes out all that is left, in flight or waiting."""
        with self._changed:
            left = [*self._running, *self._waiting]
            self._waiting.clear()
            self._running.clear()
            self._rows = self._tokens = 0
            return left

    def _delay_left(self) -> float:
        """Seconds that the first of the queue still waits for others."""
        if not self._waiting or len(self._waiting) >= self.full_batch:
            return 0.0
        return self._waiting[0].queued_at + self.admission_delay - time.monotonic()

    def _fits(self, job: Job) -> bool:
        return (
            len(self._running) < self.max_batch_size
            and self._rows + job.num_beams <= self.max_rows
            and self._tokens + job.tokens <= self.max_tokens
        )
