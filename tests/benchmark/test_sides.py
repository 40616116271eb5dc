"""Both sides follow a load's clients; the models are fakes, and so is the static side's clock."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from florence2_kserve.benchmark import sides
from florence2_kserve.benchmark.baseline import BatchCost, grouped_by_task, in_arrival_order
from florence2_kserve.benchmark.sides import EngineSide, StaticSide
from florence2_kserve.benchmark.workload import TASKS, Item, Load, Stream, Workload, prompt_ids
from florence2_kserve.engine.interface import GenerationResult, InvalidRequest
from florence2_kserve.engine.metrics import EngineMetrics
from florence2_kserve.processor import ImageSettings

IMAGE = ImageSettings(
    height=8, width=8, resample=3, rescale_factor=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3, image_seq_length=10
)


class OneFlops:
    """Every part costs one operation."""

    image = 1.0

    def encoder(self, tokens):
        return 1.0

    def cross_kv(self, tokens):
        return 1.0

    def decode(self, tokens, steps):
        return float(steps)

    def cross_kv_bytes(self, tokens, element_bytes):
        return tokens * element_bytes


class Clock:
    """Stands for the module `time`; moves only where somebody sleeps."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeBaseline:
    """Remembers its batches, each of which takes a second."""

    def __init__(self, clock):
        self.batches = []
        self._clock = clock

    def generate(self, items):
        self.batches.append([item.index for item in items])
        self._clock.sleep(1.0)
        lengths = [item.length for item in items]
        tokens = [np.full(item.length + 1, item.index) for item in items]
        return tokens, BatchCost(len(items), 3, 20, max(lengths), sum(lengths))


class OneByOneEngine:
    """Answers one request after the other, in a thread of its own, and counts how many are in flight."""

    class Loaded:
        vocab_size = 100

    def __init__(self):
        self.metrics = EngineMetrics()
        self.requests = []
        self.most_in_flight = 0
        self.answers_after = 0  # requests that must be there before any is answered
        self._waiting = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def submit(self, requests):
        with self._changed:
            futures = [Future() for _ in requests]
            self.requests += requests
            self._waiting += zip(requests, futures, strict=True)
            self.most_in_flight = max(self.most_in_flight, len(self._waiting))
            self._changed.notify()
        return futures

    def close(self):
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _may_go_on(self):
        return self._stopped or (self._waiting and len(self.requests) >= self.answers_after)

    def _loop(self):
        while True:
            with self._changed:
                self._changed.wait_for(self._may_go_on)
                if self._stopped:
                    return
            with self._changed:
                request, future = self._waiting.pop(0)
            tokens = np.arange(request.max_new_tokens + 1)
            self.metrics.row_steps.add(4 * request.max_new_tokens)
            self.metrics.useful_row_steps.add(3 * request.max_new_tokens)
            self.metrics.images_encoded.add()
            future.set_result(GenerationResult(tokens, 0.0, np.zeros(len(tokens), np.float32), "length", 0.0, 0.0))


@pytest.fixture
def workload():
    return Workload(seed=1, length_scale=0.1, concurrency=6)


@pytest.fixture
def baseline(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sides, "time", clock)
    return FakeBaseline(clock)


@pytest.fixture
def engine():
    engine = OneByOneEngine()
    yield engine
    engine.close()


def engine_side(engine):
    return EngineSide(engine, engine.Loaded, IMAGE, OneFlops(), seed=1, num_beams=3)


def static_side(baseline, policy=in_arrival_order, max_batch_size=4):
    return StaticSide(baseline, policy, OneFlops(), max_batch_size=max_batch_size, element_bytes=4)


def test_static_batches_take_what_waits_and_clients_send_again_when_answered(workload, baseline):
    run = static_side(baseline).run(workload.mixed(14))
    # Six clients, four a batch: two are left and go first, the answered ones follow.
    assert baseline.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]
    assert [answer.sequence[0] for answer in run.answers] == list(range(14))


def test_static_counts_follow_from_the_batches(baseline):
    load = Load(
        "two", (Stream((Item(0, TASKS["ocr"], 0, 5), Item(1, TASKS["od"], 0, 9), Item(2, TASKS["ocr"], 0, 4)), 3),)
    )
    run = static_side(baseline, grouped_by_task).run(load)
    assert baseline.batches == [[0, 2], [1]]
    assert run.counts == {
        "batches": 2,
        "row_steps": 3 * (2 * 5 + 9),
        "useful_row_steps": 3 * (5 + 4 + 9),
        "decode_steps": 5 + 9,
        "generated_tokens": 5 + 4 + 9,
        "images_encoded": 3,
        "prompts_encoded": 3,
        "cross_kv_bytes": 3 * 3 * 20 * 4,
    }
    assert run.flops.tower == run.flops.encoder == 3
    assert run.flops.cross_kv == 9  # once for every beam
    assert run.flops.decode == 6 * 5 + 3 * 9


def test_static_latency_counts_the_wait_for_the_batches_before(workload, baseline):
    run = static_side(baseline, max_batch_size=1).run(workload.unique(3))
    assert [answer.latency for answer in run.answers] == [1.0, 2.0, 3.0]
    assert run.seconds == 3.0
    assert run.throughput == 1.0


def test_streams_run_side_by_side(workload, baseline):
    load = workload.caption_beside_od(rounds=2, clients=2)
    static_side(baseline, max_batch_size=36).run(load)
    assert [{load.items[index].task.name for index in batch} for batch in baseline.batches] == [{"od", "caption"}] * 2
    assert [len(batch) for batch in baseline.batches] == [4, 4]


def test_the_engine_gets_each_request_as_it_is(workload, engine):
    load = workload.mixed(14)
    run = engine_side(engine).run(load)
    assert [len(answer.sequence) - 1 for answer in run.answers] == [item.length for item in load.items]
    sent = sorted(engine.requests, key=lambda request: [len(request.input_ids), request.max_new_tokens])
    expected = sorted(load.items, key=lambda item: [len(item.task.prompt_ids), item.length])
    assert [request.max_new_tokens for request in sent] == [item.length for item in expected]
    assert all(request.num_beams == 3 for request in sent)
    first = engine.requests[0]
    assert np.array_equal(first.input_ids, prompt_ids(load.items[0].task, 100))
    assert len({request.image_key for request in sent}) == 14


def test_a_closed_loop_keeps_its_clients_busy_and_no_more(workload, engine):
    engine_side(engine).run(workload.mixed(30))
    assert engine.most_in_flight == 6


def test_equal_images_share_a_key_within_a_run_only(workload, engine):
    side, load = engine_side(engine), workload.nine_tasks(2)
    side.run(load)
    first = {request.image_key for request in engine.requests}
    side.run(load)
    assert len(first) == 2
    assert len({request.image_key for request in engine.requests}) == 4


def test_the_engines_counts_are_those_of_the_run(workload, engine):
    side, load = engine_side(engine), workload.mixed(9)
    side.run(load)
    run = side.run(load)
    tokens = sum(item.length for item in load.items)
    assert run.counts["row_steps"] == 4 * tokens
    assert run.counts["useful_row_steps"] == 3 * tokens
    assert run.counts["images_encoded"] == 9
    assert run.flops.tower == 9
    assert run.flops.decode == pytest.approx(4 * tokens)  # what is computed, useful or not


def test_static_latency_counts_from_the_arrival(baseline):
    items = tuple(Item(index, TASKS["ocr"], index, 3) for index in range(4))
    run = static_side(baseline).run(Load("open", (Stream(items, 0, (0.5, 0.75, 1.0, 5.0)),)))
    assert baseline.batches == [[0], [1, 2], [3]]
    assert [answer.latency for answer in run.answers] == [1.0, 1.75, 1.5, 1.0]
    assert run.seconds == 6.0


def test_open_arrivals_wait_for_no_answer(engine):
    items = tuple(Item(index, TASKS["ocr"], index, 3) for index in range(4))
    engine.answers_after = 4  # never, if the second waited for the first one's answer
    run = engine_side(engine).run(Load("open", (Stream(items, 0, (0.0, 0.01, 0.02, 0.03)),)))
    assert len(run.answers) == 4
    assert run.answers[0].latency > run.answers[3].latency > 0


def test_a_refused_request_ends_the_run(workload, engine):
    def refuse(requests):
        raise InvalidRequest("input_ids", "no")

    engine.submit = refuse
    with pytest.raises(InvalidRequest, match="no"):
        engine_side(engine).run(workload.mixed(3))
