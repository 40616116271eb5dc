"""What is asked: nine tasks with fixed prompts and output lengths, and the loads made of them.

Random weights never end a sentence by themselves. A request's bound on new tokens is therefore its
length, drawn from its task's range, and the forced end token at that bound ends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

# BART's ids stand for the words of Florence-2's prompts; a smaller vocabulary folds them.
_SPECIAL_IDS = 4


@dataclass(frozen=True, slots=True)
class BenchmarkTask:
    """A task as the benchmark sees it.

    Attributes:
        name: Name without angle brackets, in lower case.
        prompt_ids: Its prompt in BART's ids, ``<s>`` and ``</s>`` included.
        shortest: Fewest tokens generated, the forced first and last included.
        longest: Most tokens.
    """

    name: str
    prompt_ids: tuple[int, ...]
    shortest: int
    longest: int


_IN_THE_IMAGE = (11, 5, 2274, 4, 2)
TASKS = {
    task.name: task
    for task in (
        BenchmarkTask("caption", (0, 2264, 473, 5, 2274, 6190, 116, 2), 10, 14),
        BenchmarkTask("detailed_caption", (0, 47066, 21700, 11, 4617, 99, 16, 2343, *_IN_THE_IMAGE), 35, 55),
        BenchmarkTask(
            "more_detailed_caption", (0, 47066, 21700, 19, 10, 17818, 99, 16, 2343, *_IN_THE_IMAGE), 80, 120
        ),
        BenchmarkTask("od", (0, 574, 22486, 5, 8720, 19, 4120, 766, *_IN_THE_IMAGE), 60, 300),
        BenchmarkTask("dense_region_caption", (0, 574, 22486, 5, 8720, 11, 5, 2274, 6, 19, 49, 24173, 4, 2), 60, 300),
        BenchmarkTask("region_proposal", (0, 574, 22486, 5, 976, 5327, *_IN_THE_IMAGE), 40, 160),
        BenchmarkTask(
            "caption_to_phrase_grounding", (0, 574, 22486, 5, 22810, 11, 5, 3747, 35, 10, 1275, 512, 2), 20, 60
        ),
        BenchmarkTask("ocr", (0, 2264, 16, 5, 2788, 11, 5, 2274, 116, 2), 10, 20),
        BenchmarkTask("ocr_with_region", (0, 2264, 16, 5, 2788, 11, 5, 2274, 6, 19, 3806, 116, 2), 40, 120),
    )
}


@dataclass(frozen=True, slots=True)
class Item:
    """One request.

    Attributes:
        index: Its place in the load, from 0.
        task: What is asked.
        image: Number of the image; equal numbers are the same image.
        length: Tokens it generates, the forced first and last included.
    """

    index: int
    task: BenchmarkTask
    image: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Clients who share a list of requests: each sends the next one when its last is answered.

    Attributes:
        items: The requests, in the order they are sent.
        clients: How many clients; unused where `arrivals` is given.
        arrivals: Seconds from the start at which each request comes, whatever was answered by then.
    """

    items: tuple[Item, ...]
    clients: int
    arrivals: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Streams that run at the same time.

    Attributes:
        name: Name in results, with the concurrency where that says something.
        streams: They.
    """

    name: str
    streams: tuple[Stream, ...]

    @property
    def items(self) -> list[Item]:
        """All requests, by index."""
        return sorted((item for stream in self.streams for item in stream.items), key=lambda item: item.index)


class Workload:
    """Draws loads; equal arguments give equal loads.

    Args:
        seed: Seed of lengths, orders, arrivals and pixels.
        length_scale: Factor on the lengths of `TASKS`; below 1 shortens a run on a slow machine.
        concurrency: Clients of a closed loop.
    """

    def __init__(self, *, seed: int, length_scale: float, concurrency: int) -> None:
        self._seed = seed
        self._length_scale = length_scale
        self._concurrency = concurrency

    @property
    def longest(self) -> int:
        """Most tokens that any request generates."""
        return max(self._scaled(task.longest) for task in TASKS.values())

    def mixed(self, requests: int) -> Load:
        """All tasks equally often in random order, each about an image of its own."""
        return self._closed("mixed", self._shuffled_tasks(requests, "mixed"), range(requests))

    def alone(self, task: BenchmarkTask, requests: int) -> Load:
        """One task, each request about an image of its own."""
        return self._closed(f"task.{task.name}", [task] * requests, range(requests))

    def nine_tasks(self, images: int) -> Load:
        """All tasks about each image, one image after the other."""
        return self._closed(
            "nine_tasks", [*TASKS.values()] * images, np.repeat(range(images), len(TASKS)), in_name=False
        )

    def unique(self, requests: int) -> Load:
        """Captions, each of an image of its own."""
        return self._closed("unique_captions", [TASKS["caption"]] * requests, range(requests), in_name=False)

    def caption_beside_od(self, rounds: int, clients: int) -> Load:
        """As many clients that ask for captions as for objects, `rounds` times each."""
        each = rounds * clients
        items = self._items(
            "caption_beside_od", [TASKS["od"]] * each + [TASKS["caption"]] * each, range(2 * each), longest=True
        )
        return Load("caption_beside_od", (Stream(items[:each], clients), Stream(items[each:], clients)))

    def open(self, requests: int, rate: float) -> Load:
        """As `mixed`, but requests come as a Poisson process of `rate` a second."""
        gaps = self._random("arrivals").exponential(1 / rate, requests)
        items = self._items("open", self._shuffled_tasks(requests, "open"), range(requests))
        return Load("open", (Stream(items, 0, tuple(np.cumsum(gaps).tolist())),))

    def single(self, task: BenchmarkTask) -> Load:
        """One request of middling length."""
        item = Item(0, task, 0, self._scaled((task.shortest + task.longest) // 2))
        return Load(f"single_request.{task.name}", (Stream((item,), 1),))

    def equal(self, requests: int, length: int) -> Load:
        """`requests` at once, all of one length, about one image: rows in flight stay the same throughout."""
        items = tuple(Item(index, TASKS["caption"], 0, length) for index in range(requests))
        return Load(f"equal.{requests}", (Stream(items, requests),))

    def _closed(
        self, name: str, tasks: Sequence[BenchmarkTask], images: Iterable[int], *, in_name: bool = True
    ) -> Load:
        clients = min(self._concurrency, len(tasks))
        stream = Stream(self._items(name, tasks, images), clients)
        return Load(f"{name}.c{clients}" if in_name else name, (stream,))

    def _items(
        self, name: str, tasks: Sequence[BenchmarkTask], images: Iterable[int], *, longest: bool = False
    ) -> tuple[Item, ...]:
        random = self._random(name)
        return tuple(
            Item(
                index,
                task,
                int(image),
                self._scaled(task.longest if longest else int(random.integers(task.shortest, task.longest + 1))),
            )
            for index, (task, image) in enumerate(zip(tasks, images, strict=True))
        )

    def _shuffled_tasks(self, requests: int, name: str) -> list[BenchmarkTask]:
        tasks = [*TASKS.values()]
        random = self._random(f"{name} order")
        drawn = [tasks[i] for _ in range(-(-requests // len(tasks))) for i in random.permutation(len(tasks))]
        return drawn[:requests]

    def _scaled(self, length: int) -> int:
        return max(2, round(length * self._length_scale))

    def _random(self, purpose: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._seed} {purpose}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def prompt_ids(task: BenchmarkTask, vocab_size: int) -> np.ndarray[Any, Any]:
    """Returns int64 [L]; ids beyond a smaller vocabulary, or on its last entry, are folded into it."""
    ids = np.array(task.prompt_ids, dtype=np.int64)
    words = vocab_size - 1 - _SPECIAL_IDS  # the last entry of a small vocabulary is the image token
    return np.where(ids < _SPECIAL_IDS, ids, _SPECIAL_IDS + (ids - _SPECIAL_IDS) % words)


@cache
def draw_image(number: int, size: int, seed: int) -> np.ndarray[Any, Any]:
    """Returns uint8 [size,size,3], drawn: a tower costs the same whatever it sees."""
    pixels = np.random.default_rng([seed, number]).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels.setflags(write=False)
    return pixels
