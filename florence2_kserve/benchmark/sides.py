"""Drives a load through the engine or through static batches, in real time, and takes the figures."""

from __future__ import annotations

import hashlib
import queue
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from florence2_kserve.benchmark.baseline import BatchCost, BatchPolicy, StaticBaseline
from florence2_kserve.benchmark.flops import Flops, ModelFlops
from florence2_kserve.benchmark.workload import Item, Load, Stream, draw_image, prompt_ids
from florence2_kserve.engine.interface import GenerationRequest, GenerationResult
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel

Array = np.ndarray[Any, Any]
_QUIET_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's answer.

    Attributes:
        sequence: int64 [T], start token to end token.
        latency: Seconds from when the request came, or should have come, to its answer.
    """

    sequence: Array
    latency: float


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one load on one side.

    Attributes:
        seconds: From the first request to the last answer.
        answers: By index of the request.
        counts: What was computed, by name; the same in every run of a closed loop on static batches.
        flops: Operations by part, by formula.
        parts: Seconds by part, as far as the side tells.
    """

    seconds: float
    answers: list[Answer]
    counts: dict[str, float]
    flops: Flops
    parts: dict[str, float]

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.answers) / self.seconds

    def latencies(self, load: Load, task: str | None = None) -> list[float]:
        """Returns the latencies of all requests, or of one task's."""
        return [
            answer.latency
            for item, answer in zip(load.items, self.answers, strict=True)
            if task is None or item.task.name == task
        ]


class Side(Protocol):
    """Something that answers loads."""

    def run(self, load: Load) -> Run:
        """Answers all requests of a load."""


class EngineUnderTest(Protocol):
    """What is driven here of ``InflightEngine``."""

    metrics: Any

    def submit(self, requests: list[GenerationRequest]) -> list[Future[GenerationResult]]:
        """Queues requests."""

    def close(self) -> None:
        """Stops."""


class EngineSide:
    """Ours.

    Args:
        engine: The engine.
        loaded: Its model.
        image: Its image settings.
        flops: The model's costs.
        seed: Seed of the images' pixels.
        num_beams: Beams of every request.
    """

    def __init__(
        self,
        engine: EngineUnderTest,
        loaded: LoadedModel,
        image: ImageSettings,
        flops: ModelFlops,
        *,
        seed: int,
        num_beams: int,
    ) -> None:
        self._engine, self._image, self._flops = engine, image, flops
        self._vocab_size = loaded.vocab_size
        self._seed, self._num_beams = seed, num_beams
        self._runs = 0

    def run(self, load: Load) -> Run:
        self._runs += 1  # goes into the images' keys, so that no run profits from an earlier one
        self._draw(load)
        before = self._engine.metrics.snapshot()
        done: queue.SimpleQueue[tuple[Stream, Item, float, float, Future[GenerationResult]]] = queue.SimpleQueue()
        answers: dict[int, Answer] = {}
        start = time.perf_counter()

        def send(stream: Stream, item: Item, came: float) -> None:
            (future,) = self._engine.submit([self._request(item)])
            # Called in the engine's thread, so that this one's wake-up isn't counted.
            future.add_done_callback(
                lambda future: done.put((stream, item, came, time.perf_counter() - start, future))
            )

        feed = _Feed(load)
        end = 0.0
        while len(answers) < len(load.items):
            for stream, item, came in feed.due(time.perf_counter() - start):
                send(stream, item, came)
            try:
                stream, item, came, end, future = done.get(timeout=feed.seconds_to_next(time.perf_counter() - start))
            except queue.Empty:
                continue  # the next request is due
            answers[item.index] = Answer(future.result().sequence, end - came)
            feed.answered(stream, end)
        counts = self._counts_since(before)
        return Run(
            seconds=end,
            answers=[answers[index] for index in range(len(answers))],
            counts=counts,
            flops=self._count_flops(load, answers, counts),
            parts={
                "vision_seconds": counts.pop("vision_seconds_sum"),
                "prefill_seconds": counts.pop("prefill_seconds_sum"),
                "decode_seconds": counts.pop("decode_step_seconds_sum"),
            },
        )

    def _draw(self, load: Load) -> None:
        for item in load.items:  # before the clock runs
            draw_image(item.image, self._image.height, self._seed)

    def _request(self, item: Item) -> GenerationRequest:
        return GenerationRequest(
            pixel_values=draw_image(item.image, self._image.height, self._seed),
            image_key=hashlib.sha256(f"{self._seed} {self._runs} {item.image}".encode()).digest(),
            input_ids=prompt_ids(item.task, self._vocab_size),
            max_new_tokens=item.length,
            num_beams=self._num_beams,
        )

    def _counts_since(self, before: Mapping[str, float]) -> dict[str, float]:
        metrics = self._engine.metrics
        waited_until = time.monotonic() + _QUIET_SECONDS
        while metrics.requests_running.value and time.monotonic() < waited_until:
            time.sleep(0.001)  # the last answer is out before the step that gave it is counted
        after = metrics.snapshot()
        names = (
            "row_steps useful_row_steps decode_steps generated_tokens images_encoded prompts_encoded cross_kv_bytes "
            "host_syncs vision_seconds_sum prefill_seconds_sum decode_step_seconds_sum"
        ).split()
        return {name: after[name] - before[name] for name in names}

    def _count_flops(self, load: Load, answers: Mapping[int, Answer], counts: Mapping[str, float]) -> Flops:
        rows = [(self._image.image_seq_length + len(item.task.prompt_ids), item.index) for item in load.items]
        useful = sum(
            self._num_beams * self._flops.decode(tokens, len(answers[index].sequence) - 1) for tokens, index in rows
        )
        return Flops(
            tower=counts["images_encoded"] * self._flops.image,
            encoder=sum(self._flops.encoder(tokens) for tokens, _ in rows),
            cross_kv=sum(self._flops.cross_kv(tokens) for tokens, _ in rows),
            decode=useful * counts["row_steps"] / max(1.0, counts["useful_row_steps"]),
        )


class StaticSide:
    """The baseline behind a batcher: a batch starts when the last is done, with what waits by then.

    Args:
        baseline: Answers batches.
        policy: Picks the next batch from what waits.
        flops: The model's costs.
        max_batch_size: Most requests in a batch.
        element_bytes: Bytes of one number in the model's data type.
    """

    def __init__(
        self,
        baseline: StaticBaseline,
        policy: BatchPolicy,
        flops: ModelFlops,
        *,
        max_batch_size: int,
        element_bytes: int,
    ) -> None:
        self._baseline, self._policy, self._flops = baseline, policy, flops
        self._max_batch_size = max_batch_size
        self._element_bytes = element_bytes

    def run(self, load: Load) -> Run:
        feed = _Feed(load)
        waiting: deque[tuple[Stream, Item, float]] = deque()
        answers: dict[int, Answer] = {}
        costs: list[BatchCost] = []
        start, now = time.perf_counter(), 0.0
        while len(answers) < len(load.items):
            now = time.perf_counter() - start
            waiting.extend(feed.due(now))
            if not waiting:
                time.sleep(feed.seconds_to_next(now) or 0.0)
                continue
            batch = self._policy([item for _, item, _ in waiting], self._max_batch_size)
            sequences, cost = self._baseline.generate(batch)
            now = time.perf_counter() - start
            costs.append(cost)
            sequence_of = {item.index: sequence for item, sequence in zip(batch, sequences, strict=True)}
            for stream, item, came in waiting:
                if item.index in sequence_of:
                    answers[item.index] = Answer(sequence_of[item.index], now - came)
                    feed.answered(stream, now)
            waiting = deque(entry for entry in waiting if entry[1].index not in sequence_of)
        return Run(
            seconds=now,
            answers=[answers[index] for index in range(len(answers))],
            counts=self._counts(costs),
            flops=sum((self._batch_flops(cost) for cost in costs), Flops()),
            parts={},
        )

    def _counts(self, costs: list[BatchCost]) -> dict[str, float]:
        return {
            "batches": len(costs),
            "row_steps": sum(cost.rows * cost.beams * cost.steps for cost in costs),
            "useful_row_steps": sum(cost.beams * cost.useful_steps for cost in costs),
            "decode_steps": sum(cost.steps for cost in costs),
            "generated_tokens": sum(cost.useful_steps for cost in costs),
            "images_encoded": sum(cost.rows for cost in costs),
            "prompts_encoded": sum(cost.rows for cost in costs),
            "cross_kv_bytes": sum(
                cost.rows * cost.beams * self._flops.cross_kv_bytes(cost.encoder_tokens, self._element_bytes)
                for cost in costs
            ),
        }

    def _batch_flops(self, cost: BatchCost) -> Flops:
        beams = cost.rows * cost.beams
        return Flops(
            tower=cost.rows * self._flops.image,
            encoder=cost.rows * self._flops.encoder(cost.encoder_tokens),
            cross_kv=beams * self._flops.cross_kv(cost.encoder_tokens),
            decode=beams * self._flops.decode(cost.encoder_tokens, cost.steps),
        )


class _Feed:
    """Says which requests a load's clients send when; all times are seconds from its start."""

    def __init__(self, load: Load) -> None:
        self._scheduled: list[tuple[float, Stream, Item]] = []  # latest first
        self._ready: list[tuple[float, Stream, Item]] = []
        self._unsent: dict[Stream, deque[Item]] = {}
        for stream in load.streams:
            if stream.arrivals is not None:
                self._scheduled += [(at, stream, item) for at, item in zip(stream.arrivals, stream.items, strict=True)]
                continue
            self._unsent[stream] = deque(stream.items)
            for _ in range(stream.clients):
                self.answered(stream, 0.0)
        self._scheduled.sort(key=itemgetter(0), reverse=True)
        self._ready.sort(key=lambda entry: entry[2].index)

    def answered(self, stream: Stream, now: float) -> None:
        """A client of the stream got its answer and sends its next request."""
        unsent = self._unsent.get(stream)
        if unsent:
            self._ready.append((now, stream, unsent.popleft()))

    def due(self, now: float) -> list[tuple[Stream, Item, float]]:
        """Takes the requests sent by now, earliest first, each with the time at which it was sent."""
        while self._scheduled and self._scheduled[-1][0] <= now:
            self._ready.append(self._scheduled.pop())
        due, self._ready = sorted(self._ready, key=itemgetter(0)), []
        return [(stream, item, at) for at, stream, item in due]

    def seconds_to_next(self, now: float) -> float | None:
        """Returns the time until a request is due that waits for no answer; None if there is none."""
        return max(0.0, self._scheduled[-1][0] - now) if self._scheduled else None
