"""Requests that go on while something happens to the service; bounded in number of senders and time."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from florence2_kserve.client import ClientError, Florence2Client

LONGEST_S = 300.0


@dataclass(slots=True)
class Question:
    """One question about a picture, with the answer it must get (None: any)."""

    image: bytes
    task: str
    text: str | None = None
    answer: dict[str, Any] | None = None


@dataclass(slots=True)
class Outcome:
    """What came of the requests.

    Attributes:
        answered: Requests with an answer.
        wrong: Of those, the ones that differ from what was expected.
        failed: Messages of those that failed for good, by how often.
        retries: How often the client sent a request again.
        latencies: ``(seconds since the load began, seconds the answer took)``.
    """

    answered: int = 0
    wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    latencies: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        times = sorted(took for _, took in self.latencies)
        middle, worst = (times[len(times) // 2], times[-1]) if times else (0.0, 0.0)
        return (
            f"{self.answered} answered, {self.wrong} wrong, {sum(self.failed.values())} failed, "
            f"{self.retries} retries by the client; median {middle * 1000:.0f} ms, longest {worst * 1000:.0f} ms"
        )


class Load:
    """Keeps `senders` requests in flight from a ``with`` statement's begin to its end.

    Args:
        connect: Makes a client; each sender has its own.
        questions: Asked in turn.
        senders: Requests in flight.
        pause: Seconds each sender rests between two requests.
    """

    def __init__(
        self,
        connect: Callable[[], Florence2Client],
        questions: Sequence[Question],
        senders: int = 4,
        pause: float = 0.0,
    ) -> None:
        self.outcome = Outcome()
        self._connect, self._questions, self._pause = connect, questions, pause
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._send, args=(i,), daemon=True) for i in range(senders)]

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def answered(self) -> int:
        """Requests answered so far."""
        return self.outcome.answered

    def assert_nothing_lost(self) -> None:
        """Fails unless every request was answered in the end, and right."""
        assert not self.outcome.failed, self.outcome.failed
        assert not self.outcome.wrong, self.outcome

    def wait_for(self, more: int, seconds: float) -> None:
        """Waits until `more` further requests were answered.

        Raises:
            TimeoutError: If they weren't, after `seconds`.
        """
        goal, end = self.answered + more, time.monotonic() + seconds
        while self.answered < goal:
            if time.monotonic() >= end:
                raise TimeoutError(f"{self.answered} of {goal} requests answered after {seconds:g} s: {self.outcome}")
            time.sleep(0.1)

    def _send(self, number: int) -> None:
        outcome = self.outcome
        with self._connect() as client:
            for question in itertools.islice(itertools.cycle(self._questions), number, None):
                if self._stop.is_set() or time.monotonic() - self._began > LONGEST_S:
                    break
                began = time.monotonic()
                try:
                    answer = client.infer(question.image, question.task, question.text)
                except ClientError as error:
                    with self._lock:
                        outcome.failed[f"{type(error).__name__} {error.status}: {error.message[:200]}"] += 1
                else:
                    with self._lock:
                        outcome.answered += 1
                        outcome.wrong += question.answer is not None and answer != question.answer
                        outcome.latencies.append((began - self._began, time.monotonic() - began))
                if self._pause:
                    self._stop.wait(self._pause)
            with self._lock:
                outcome.retries += client.retries_made
