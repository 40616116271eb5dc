"""What goes into a stream and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from florence2_kserve.client.results import Answer

Image: TypeAlias = bytes | str | Path
ImageSource: TypeAlias = Image | Callable[[], bytes]
# How many jobs a stream takes ahead of its consumer, for each request that it may have in flight.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One question about one image, for a stream.

    Attributes:
        image: Encoded bytes (JPEG, PNG, …), the path of a file, or a function that returns the bytes. A path is
            read and a function called only when the job's turn comes.
        task: Task prompt, with or without angle brackets.
        text: Text or region, for the tasks that take one.
        parameters: Request parameters: max_new_tokens, num_beams, length_penalty, timeout_ms.
        key: Anything by which the caller knows the job again.
    """

    image: ImageSource = field(repr=False)
    task: str = "<CAPTION>"
    text: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    key: Any = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Attributes:
        job: The job.
        answer: Its answer, None where there is an error.
        error: A ClientError, or what reading the image raised; None where there is an answer.
        seconds: From when the job's turn came until now: reading the image, retries and their pauses included.
    """

    job: Job
    answer: Answer | None
    error: Exception | None
    seconds: float


def read_image(image: ImageSource) -> bytes:
    """Returns an image's encoded bytes.

    Raises:
        OSError: If the file can't be read.
        TypeError: If a function returns something else than bytes.
    """
    if isinstance(image, bytes):
        return image
    if not callable(image):
        return Path(image).read_bytes()
    try:
        data = image()
    except StopIteration as error:  # which a future can't hold: whoever awaits it would wait for ever
        raise RuntimeError("the image's function raised StopIteration") from error
    if not isinstance(data, bytes):
        raise TypeError(f"the image's function returned {type(data).__name__}, not bytes")
    return data


class Sequencer:
    """Puts outcomes, which come as they complete, into the order in which they are handed out.

    Args:
        ordered: Whether that is the order of the jobs; else outcomes are handed out as they come.
    """

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._next = 0
        self._early: dict[int, Outcome] = {}

    def add(self, index: int, outcome: Outcome) -> Iterator[Outcome]:
        """Takes the outcome of job `index`; yields what can be handed out now."""
        if not self._ordered:
            yield outcome
            return
        self._early[index] = outcome
        while self._next in self._early:
            yield self._early.pop(self._next)
            self._next += 1


def check_concurrency(concurrency: int) -> None:
    """Checks how many requests a stream may have in flight.

    Raises:
        ValueError: If it is below 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency has to be at least 1, got {concurrency}")
