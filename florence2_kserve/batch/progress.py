"""What a batch says while it runs: a moving bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

_EVERY_S = 5.0


@dataclass(slots=True)
class Tally:
    """What a run has done until now, in pictures.

    Attributes:
        total: All there are; None while that isn't known.
        known: Those whose answers were there already.
        answered: Those that the service answered.
        copied: Those that took their answers from others with the same bytes.
        failed: Those with a question that has no answer.
        in_flight: Requests that wait for the service.
        started: When the run began, by the monotonic clock.
    """

    total: int | None = None
    known: int = 0
    answered: int = 0
    copied: int = 0
    failed: int = 0
    in_flight: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def done(self) -> int:
        """Pictures that need nothing more in this run."""
        return self.known + self.answered + self.copied + self.failed

    @property
    def rate(self) -> float:
        """Pictures answered a second."""
        return self.answered / max(self.seconds, 1e-6)

    @property
    def remaining_s(self) -> float | None:
        """Seconds that the rest will take at this rate; None while that can't be said."""
        if self.total is None or not self.answered:
            return None
        return max(0, self.total - self.done) / self.rate

    def line(self) -> str:
        """Returns all of it in one line."""
        of_all = "" if self.total is None else f"/{self.total}"
        remaining = "" if self.remaining_s is None else f", {_duration(self.remaining_s)} to go"
        return (
            f"{self.done}{of_all} pictures ({self.known} known, {self.copied} copied, {self.failed} failed), "
            f"{self.in_flight} in flight, {self.rate:.1f}/s{remaining}"
        )


class Progress(Protocol):
    """Shows a tally."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, tally: Tally) -> None:
        """Shows it, if it is time to."""


class PlainProgress:
    """Lines without control characters.

    Args:
        say: Takes the lines.
        every: Seconds between two.
    """

    def __init__(self, say: Callable[[str], None], every: float = _EVERY_S) -> None:
        self._say, self._every, self._last = say, every, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, tally: Tally) -> None:
        """Says a line, if the last one is old enough."""
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._say(tally.line())


class TerminalProgress:
    """A bar on stderr, with rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("pictures"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}/s  {task.fields[left]}  {task.fields[in_flight]} in flight"),
            TextColumn("[red]{task.fields[failed]}"),
            console=Console(stderr=True),
        )
        self._row = self._bar.add_task("", total=None, rate="0.0", left="", in_flight=0, failed="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, tally: Tally) -> None:
        """Moves the bar."""
        self._bar.update(
            self._row,
            total=tally.total,
            completed=tally.done,
            rate=f"{tally.rate:.1f}",
            left="" if tally.remaining_s is None else f"{_duration(tally.remaining_s)} to go",
            in_flight=tally.in_flight,
            failed=f"{tally.failed} failed" if tally.failed else "",
        )


def make_progress(say: Callable[[str], None]) -> Progress:
    """Returns what suits stderr."""
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress(say)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
