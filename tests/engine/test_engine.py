from __future__ import annotations

import logging
import random
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from florence2_kserve.engine import engine as engine_module
from florence2_kserve.engine.engine import InflightEngine
from florence2_kserve.engine.interface import (
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    NonFiniteOutput,
    OutOfMemory,
    QueueFull,
)
from florence2_kserve.engine.runner import Runner
from florence2_kserve.model_files import locate_model
from florence2_kserve.weights import LoadedModel, load_model

from .embedded import answer, by_generate, loaded, processor, request, scene_with_words


@pytest.fixture
def engine() -> Iterator[InflightEngine]:
    engine = InflightEngine(loaded(), processor().image, max_batch_size=6, max_queue_size=40)
    yield engine
    engine.close()


def engine_with(runner: type[Runner], model: LoadedModel | None = None, **options):
    """Returns an engine whose model is run by `runner`, which fails on purpose."""

    class Engine(InflightEngine):
        def _make_runner(self, *arguments, **settings):
            return runner(*arguments, **settings)

    return Engine(model or loaded(), processor().image, **options)


def tokens(results):
    return [result.sequence.tolist() for result in results]


# Answers


@pytest.mark.parametrize("task", ["<CAPTION>", "<OD>", "<OCR_WITH_REGION>", "<REGION_TO_SEGMENTATION>"])
@pytest.mark.parametrize("num_beams", [None, 1, 2, 5, 8])
def test_answers_equal_those_of_generate(engine, task, num_beams):
    row = request(scene_with_words(), task, num_beams=num_beams)
    (result,) = answer(engine, row)
    expected, score = by_generate(row, num_beams=num_beams or 3)
    assert result.sequence.tolist() == expected
    if num_beams != 1:
        assert result.score == pytest.approx(score, abs=1e-4)
    assert result.token_logprobs.shape == result.sequence.shape
    assert result.token_logprobs[:2].tolist() == [0, 0]
    assert (result.token_logprobs <= 0).all()


def test_a_row_gets_the_same_answer_in_any_company(engine):
    rows = [
        request(index, task, **changes)
        for index in range(3)
        for task in ("<CAPTION>", "<OD>", "<DETAILED_CAPTION>", "<OPEN_VOCABULARY_DETECTION>")
        for changes in ({}, {"num_beams": 1}, {"num_beams": 7, "max_new_tokens": 9})
    ]
    together = answer(engine, *rows)
    for row, result in zip(rows, together, strict=True):
        assert answer(engine, row)[0].sequence.tolist() == result.sequence.tolist()


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_limit_cuts_the_answer_and_says_so(engine, limit, num_beams):
    row = request(max_new_tokens=limit, num_beams=num_beams)
    (result,) = answer(engine, row)
    assert result.sequence.tolist() == by_generate(row, num_beams=num_beams)[0]
    assert result.finish_reason == "length"
    assert len(result.sequence) == limit + 1
    assert answer(engine, request())[0].finish_reason == "stop"


def test_length_penalty_divides_the_score(engine):
    (plain,) = answer(engine, request(num_beams=1))
    (divided,) = answer(engine, request(num_beams=1, length_penalty=2.0))
    length = len(plain.sequence) - 1
    assert plain.score == pytest.approx(plain.token_logprobs.sum() / length, abs=1e-6)
    assert divided.score == pytest.approx(plain.score / length, abs=1e-6)


@pytest.mark.parametrize("capture", ["compile"])
@pytest.mark.slow
def test_a_captured_step_gives_the_same_answers(capture):
    rows = [
        request(index, task, num_beams=beams)
        for index in range(2)
        for task in ("<CAPTION>", "<OD>")
        for beams in (1, 3)
    ]
    # Small batches: each size of step is compiled by itself, which takes most of this test's time.
    plain = InflightEngine(loaded(), processor().image, max_batch_size=3)
    captured = InflightEngine(loaded(), processor().image, max_batch_size=3, decode_capture=capture)
    expected = tokens(answer(plain, *rows))
    assert tokens([future.result(300) for future in captured.submit(rows)]) == expected
    plain.close()
    captured.close()


@pytest.mark.parametrize("capture", ["compile", "cuda-graph"])
def test_padding_to_buckets_changes_no_answer(engine, monkeypatch, capture):
    """What captured steps need, tried without capturing."""
    rows = [request(i, task, num_beams=b) for i in range(3) for task in ("<CAPTION>", "<OD>") for b in (1, 3, 4)]
    rows += [request(i, "<OD>", num_beams=3) for i in range(3)]  # when these are left, rows come in the lanes' order
    expected = tokens(answer(engine, *rows))
    monkeypatch.setattr("florence2_kserve.engine.runner.capture_step", lambda step, *_, **__: step)
    padded = InflightEngine(loaded(), processor().image, max_batch_size=5, decode_capture=capture)
    assert tokens(answer(padded, *rows)) == expected
    assert padded.metrics.row_steps.value > padded.metrics.useful_row_steps.value
    padded.close()


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_ids": np.array([], dtype=np.int64)}, "prompt has 0 tokens"),
        ({"input_ids": np.zeros(5000, dtype=np.int64)}, "prompt has 5000 tokens; this model takes 1 to 512 beside"),
        ({"input_ids": np.array([0, 10**6])}, "an id outside 0 to"),
        ({"input_ids": np.array([0, -1])}, "an id outside 0 to"),
        ({"input_ids": np.array([0.5])}, r"expected integers \[L\], got float64"),
        ({"image_key": "text"}, "expected bytes, got str"),
        ({"max_new_tokens": 0}, "expected 1 to 1024, got 0"),
        ({"max_new_tokens": 10**6}, "expected 1 to 1024, got 1000000"),
        ({"num_beams": 0}, "expected 1 to 8, got 0"),
        ({"num_beams": 9}, "expected 1 to 8, got 9"),
        ({"length_penalty": float("nan")}, "expected a finite number"),
        (
            {"pixel_values": np.zeros((1, 1, 3), dtype=np.uint8)},
            r"expected uint8 \[192, 192, 3\], got uint8 \[1, 1, 3\]",
        ),
        ({"pixel_values": np.zeros((192, 192, 3), dtype=np.float32)}, "got float32"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_it_waits(engine, changes, says):
    with pytest.raises(InvalidRequest, match=says):
        engine.submit([request(), request(**changes)])
    assert engine.metrics.requests_refused.value == 2
    assert answer(engine, request())[0].finish_reason == "stop"


def test_a_request_that_never_fits_is_refused():
    engine = InflightEngine(loaded(), processor().image, max_tokens=300)
    with pytest.raises(InvalidRequest, match="3 beams times 101 tokens exceed this server's 300"):
        engine.submit([request(max_new_tokens=101)])
    assert answer(engine, request(max_new_tokens=100))[0].finish_reason == "stop"
    engine.close()


def test_a_full_queue_takes_all_or_none(engine):
    rows = [request()] * 41
    with pytest.raises(QueueFull, match="41 more don't fit into 40"):
        engine.submit(rows)
    assert len(answer(engine, *rows[:40])) == 40


# Who leaves early


def test_a_deadline_ends_waiting_and_running_rows(engine):
    slow = request(task="<MORE_DETAILED_CAPTION>", num_beams=8, max_new_tokens=1000)
    past = request(deadline=time.monotonic() - 1)
    soon = request(task="<MORE_DETAILED_CAPTION>", num_beams=8, deadline=time.monotonic() + 0.02)
    futures = engine.submit([slow, past, soon])
    for future in futures[1:]:
        with pytest.raises(DeadlineExceeded):
            future.result(60)
    assert futures[0].result(120).finish_reason in ("stop", "length")
    assert engine.metrics.requests_expired.value == 2


def test_rows_that_leave_in_the_middle_change_nobody_elses_tokens(engine):
    rows = [request(i, "<MORE_DETAILED_CAPTION>", num_beams=1 + i % 4) for i in range(12)]
    expected = tokens(answer(engine, *rows))
    chance = random.Random(0)
    for _ in range(3):
        futures = engine.submit(rows)
        gone = set(chance.sample(range(12), 5))
        for place in gone:
            before = engine.metrics.decode_steps.value
            while engine.metrics.decode_steps.value < before + 3 and not futures[place].done():
                time.sleep(0.001)
            futures[place].cancel()
        for place, future in enumerate(futures):
            if not future.cancelled():
                assert future.result(60).sequence.tolist() == expected[place]
    assert engine.metrics.requests_cancelled.value > 0


def test_a_cancelled_row_is_dropped_and_others_are_answered(engine):
    first, second, third = engine.submit([request(i, num_beams=i + 1) for i in range(3)])
    assert second.cancel()
    assert first.result(60).finish_reason == "stop"
    assert third.result(60).finish_reason == "stop"
    with pytest.raises(CancelledError):
        second.result(1)


def test_a_closed_engine_refuses_and_lets_nobody_wait():
    engine = InflightEngine(loaded(), processor().image, max_batch_size=1)
    futures = engine.submit([request(i) for i in range(8)])
    engine.close()
    assert not engine.is_healthy
    ended = [future.exception(10) for future in futures]
    assert any(isinstance(error, EngineStopped) for error in ended)
    assert all(error is None or isinstance(error, EngineStopped) for error in ended)
    with pytest.raises(EngineStopped):
        engine.submit([request()])


# Who shares what


def test_each_image_is_encoded_once_for_all_that_ask_about_it(engine):
    tasks = ("<CAPTION>", "<OD>", "<DETAILED_CAPTION>", "<REGION_PROPOSAL>")
    answer(engine, *(request(index, task) for index in range(3) for task in tasks))
    assert engine.metrics.images_encoded.value == 3
    answer(engine, *(request(index) for index in range(3)))
    assert engine.metrics.images_encoded.value == 3
    assert engine.metrics.feature_cache_misses.value == 3
    assert engine.metrics.feature_cache_hits.value == 12


def test_without_a_cache_only_those_that_wait_together_share():
    engine = InflightEngine(loaded(), processor().image, feature_cache_bytes=0)
    answer(engine, *(request(0, task) for task in ("<CAPTION>", "<OD>")))
    assert engine.metrics.images_encoded.value == 1
    answer(engine, request(0))
    assert engine.metrics.images_encoded.value == 2
    engine.close()


def test_others_decode_while_images_are_encoded():
    """Each turn encodes a bounded number of images, however many are waiting."""
    steps_at_images = []

    class Watched(Runner):
        def encode_images(self, pixel_values):
            steps_at_images.append((len(pixel_values), self._metrics.decode_steps.value))
            time.sleep(0.02)  # an image takes longer than a step
            return super().encode_images(pixel_values)

    engine = engine_with(Watched, max_batch_size=20, vision_batch_size=2)
    engine.submit([request(99, "<MORE_DETAILED_CAPTION>", max_new_tokens=200)])
    answer(engine, *(request(index) for index in range(12)))
    engine.close()
    assert max(count for count, _ in steps_at_images) == 2
    assert len({steps for _, steps in steps_at_images[1:]}) == len(steps_at_images[1:])


def test_rows_finish_when_they_are_done_and_others_take_their_place():
    engine = InflightEngine(loaded(), processor().image, max_batch_size=4)
    order: list[int] = []
    lengths = [60, 3, 3, 60, 3, 3, 3, 3]
    futures = engine.submit([request(i, "<OD>", max_new_tokens=n) for i, n in enumerate(lengths)])
    for place, future in enumerate(futures):
        future.add_done_callback(lambda _, place=place: order.append(place))
    results = [future.result(60) for future in futures]
    assert order != sorted(order)
    assert order.index(7) < order.index(0)
    # Every row that was computed belonged to somebody.
    assert engine.metrics.row_steps.value == engine.metrics.useful_row_steps.value
    # Two steps go into the first token, beams are one row then; the last token isn't fed.
    assert engine.metrics.row_steps.value == sum(2 + 3 * (len(result.sequence) - 3) for result in results)
    engine.close()


# What breaks


class Poisoned(Runner):
    """Some pictures break the model."""

    def encode_images(self, pixel_values):
        if any(pixels[0, 0].tolist() == [66, 66, 66] for pixels in pixel_values):
            raise RuntimeError("this one breaks the model")
        features = super().encode_images(pixel_values).clone()
        for one, pixels in zip(features, pixel_values, strict=True):
            if pixels[0, 0].tolist() == [77, 77, 77]:
                one.fill_(torch.nan)
        return features


def poison(value: int, **changes):
    pixels = request(0).pixel_values.copy()
    pixels[0, 0] = value
    return request(0, pixel_values=pixels, image_key=b"poison %d" % value, **changes)


def test_one_row_that_breaks_the_model_fails_alone():
    engine = engine_with(Poisoned, vision_batch_size=8)
    good, bad, other = engine.submit([request(0), poison(66), request(1)])
    expected = tokens(answer(engine, request(0), request(1)))
    assert tokens([good.result(60), other.result(60)]) == expected
    with pytest.raises(RuntimeError, match="this one breaks the model"):
        bad.result(60)
    assert engine.is_healthy
    engine.close()


def test_nan_stays_with_the_row_it_came_from():
    engine = engine_with(Poisoned, max_batch_size=4)
    rows = [request(i, "<OD>", num_beams=1 + i % 3) for i in range(4)]
    expected = tokens(answer(engine, *rows))
    for _ in range(3):
        futures = engine.submit([rows[0], poison(77), rows[1], poison(77, num_beams=5), rows[2], poison(77), rows[3]])
        for place in (1, 3, 5):
            with pytest.raises(NonFiniteOutput):
                futures[place].result(60)
        assert tokens([futures[place].result(60) for place in (0, 2, 4, 6)]) == expected
    # Whoever gets their lanes and pages next finds nothing of it.
    assert tokens(answer(engine, *rows)) == expected
    engine.close()


class Cramped(Runner):
    """Has room for one image and one prompt at a time, and for none of a certain picture."""

    def encode_images(self, pixel_values):
        if len(pixel_values) > 1 or pixel_values[0][0, 0].tolist() == [55, 55, 55]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().encode_images(pixel_values)

    def prefill(self, features, jobs):
        if len(jobs) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        super().prefill(features, jobs)


def test_what_does_not_fit_together_is_tried_apart():
    engine = engine_with(Cramped, vision_batch_size=8)
    rows = [request(index) for index in range(5)]
    futures = engine.submit([*rows, poison(55)])
    with pytest.raises(OutOfMemory):
        futures[5].result(60)
    assert tokens([future.result(60) for future in futures[:5]]) == [by_generate(row, num_beams=3)[0] for row in rows]
    assert engine.is_healthy
    engine.close()


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_without_memory_for_a_step_the_cache_goes_and_then_the_youngest():
    class Full(Runner):
        def _endings(self, steps):  # all is computed by then
            if self.num_lanes > 2:
                out_of_memory()
            return super()._endings(steps)

    engine = engine_with(Full, max_batch_size=8)
    rows = [request(index, "<OD>") for index in range(4)]
    futures = engine.submit(rows)
    ended = [future.exception(60) for future in futures]
    assert [type(error) for error in ended] == [type(None), type(None), OutOfMemory, OutOfMemory]
    expected = [by_generate(row, num_beams=3)[0] for row in rows[:2]]
    assert tokens([future.result() for future in futures[:2]]) == expected
    assert engine.metrics.feature_cache_entries.value < 4
    assert engine.metrics.requests_failed.value == 2
    engine.close()


@pytest.mark.parametrize("where", ["_inherit", "_take_over"])
def test_a_step_that_fails_when_half_of_it_is_taken_over_gives_up_all_in_it(where):
    failures = iter([False] * 5 + [True] + [False] * 10_000)

    def fail_once(self, *arguments):
        return out_of_memory() if next(failures) else getattr(Runner, where)(self, *arguments)

    engine = engine_with(type("Failing", (Runner,), {where: fail_once}), max_batch_size=4)
    rows = [request(index, "<OD>", num_beams=1 + index) for index in range(6)]
    futures = engine.submit(rows)
    ended = [future.exception(60) for future in futures]
    assert {type(error) for error in ended} == {type(None), OutOfMemory}
    assert tokens(answer(engine, *rows)) == [by_generate(row, num_beams=row.num_beams)[0] for row in rows]
    assert engine.metrics.requests_running.value == engine.metrics.tokens_reserved.value == 0
    engine.close()


def test_a_prompt_that_fails_halfway_is_decoded_once(monkeypatch):
    """Lanes of a batch of two kinds: the second kind's start fails once."""
    from florence2_kserve.engine import beam_state

    start, calls = beam_state.start, iter([False, True] + [False] * 1000)
    monkeypatch.setattr(beam_state, "start", lambda *a, **k: out_of_memory() if next(calls) else start(*a, **k))
    engine = InflightEngine(loaded(), processor().image, max_batch_size=2, vision_batch_size=4)
    rows = [request(0, num_beams=2), request(0, num_beams=3)]
    assert tokens(answer(engine, *rows)) == [by_generate(row, num_beams=row.num_beams)[0] for row in rows]
    assert tokens(answer(engine, *rows)) == [by_generate(row, num_beams=row.num_beams)[0] for row in rows]
    assert engine.is_healthy
    engine.close()


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_nan_is_found_where_every_token_is_forced(limit, num_beams):
    engine = engine_with(Poisoned, max_batch_size=2)
    long = np.tile(request(0).input_ids, 20)
    with pytest.raises(NonFiniteOutput):
        engine.submit([poison(77, max_new_tokens=limit, num_beams=num_beams, input_ids=long)])[0].result(60)
    # Its lane goes to a shorter prompt beside a longer one, which is where leftovers would be read.
    rows = [request(0), request(1, input_ids=long)]
    assert tokens(answer(engine, *rows)) == [by_generate(row, num_beams=3)[0] for row in rows]
    engine.close()


@pytest.mark.parametrize("where", ["decode", "encode_images", "prefill"])
def test_a_lost_device_ends_the_engine_and_says_so(where, caplog):
    def fail(self, *arguments):
        raise RuntimeError("CUDA error: device-side assert triggered")

    lost: list[BaseException] = []
    called = threading.Event()
    broken = type("Broken", (Runner,), {where: fail})
    engine = engine_with(broken, on_fatal=lambda error: (lost.append(error), called.set()))
    with caplog.at_level(logging.ERROR, logger=engine_module.__name__):
        futures = engine.submit([request(0), request(1)])
        for future in futures:
            with pytest.raises(EngineStopped, match="device-side assert"):
                future.result(60)
        assert called.wait(10)
    assert not engine.is_healthy
    assert [str(error) for error in lost] == ["CUDA error: device-side assert triggered"]
    assert "the engine can't go on: RuntimeError: CUDA error" in caplog.text
    with pytest.raises(EngineStopped):
        engine.submit([request(0)])
    engine.close()


# What the device is asked


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"):
            self.count += 1
        indices = arguments[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        self.count += sum(1 for index in indices if index is not None and index.dtype == torch.bool)
        return function(*arguments, **(keywords or {}))


def test_a_step_asks_the_device_for_nothing_but_who_is_done():
    reads: list[int] = []

    class Counted(Runner):
        def decode(self):
            with HostReads() as mode:
                outcomes = super().decode()
            reads.append(mode.count)
            return outcomes

    engine = engine_with(Counted)
    rows = [request(i, "<OD>", num_beams=1 + i % 4) for i in range(10)]
    answer(engine, *rows)
    assert len(reads) > 10
    assert sum(reads) == 0
    # One transfer a step, and one for each group of answers.
    steps = engine.metrics.decode_steps.value
    assert steps < engine.metrics.host_syncs.value <= steps + len(rows)
    engine.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("capture", ["off", "cuda-graph"])
def test_a_step_on_a_gpu_waits_for_nothing_but_who_is_done(capture):
    waits: list[int] = []

    class Guarded(Runner):
        def decode(self):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outcomes = super().decode()
            torch.cuda.set_sync_debug_mode("default")
            waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
            return outcomes

    engine = engine_with(Guarded, load_model(locate_model(), device="cuda"), decode_capture=capture)
    rows = [request(i, "<OD>", num_beams=1 + i % 4) for i in range(10)]
    assert tokens(answer(engine, *rows)) == [by_generate(row, num_beams=row.num_beams)[0] for row in rows]
    recorded = engine.metrics.host_syncs.value
    engine.close()
    assert sum(waits) <= recorded + (0 if capture == "off" else 2 * len(waits))


def test_metrics_tell_what_happened(engine):
    results = answer(engine, *(request(index, "<OD>") for index in range(5)), request(0, max_new_tokens=3))
    time.sleep(0.05)
    values = engine.metrics.snapshot()
    assert values["requests_submitted"] == 6
    assert values["requests_stopped"] == 5
    assert values["requests_length"] == 1
    assert values["generated_tokens"] == sum(len(result.sequence) - 1 for result in results)
    assert values["prompts_encoded"] == 6
    assert values["queue_seconds_count"] == values["request_seconds_count"] == 6
    assert values["decode_step_seconds_count"] == values["decode_steps"] == values["batch_rows_count"]
    assert values["requests_running"] == values["requests_waiting"] == values["rows_running"] == 0
    assert values["tokens_reserved"] == 0
    assert values["cross_kv_bytes"] > 0
