from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from florence2_kserve.engine.interface import (
    DeadlineExceeded,
    EngineStopped,
    GenerationRequest,
    InvalidRequest,
    QueueFull,
)
from florence2_kserve.engine.static import StaticBatchEngine
from florence2_kserve.images import resize_image
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import Processor
from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.scenes import held_out_scene
from florence2_kserve.weights import LoadedModel, load_model


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.load(locate_model())


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(locate_model())


@pytest.fixture
def engine(loaded, processor) -> Iterator[StaticBatchEngine]:
    engine = StaticBatchEngine(loaded, processor.image, max_batch_size=4, max_queue_size=16)
    yield engine
    engine.close()


def request(processor: Processor, index: int = 0, task: str = "<CAPTION>", **changes: Any) -> GenerationRequest:
    from PIL import Image

    scene = held_out_scene(index)
    example = scene.truth(task)
    assert example is not None
    fields: dict[str, Any] = {
        "pixel_values": resize_image(Image.fromarray(scene.image), processor.image),
        "image_key": str(index).encode(),
        "input_ids": processor.input_ids(TASKS[task].prompt(example.text)),
        "max_new_tokens": 60,
    }
    return GenerationRequest(**(fields | changes))


def answer(engine: StaticBatchEngine, *requests: GenerationRequest) -> list[Any]:
    return [future.result(60) for future in engine.submit(list(requests))]


@torch.inference_mode()
def by_generate(
    loaded: LoadedModel, processor: Processor, row: GenerationRequest, **options: Any
) -> tuple[list[int], float]:
    """The whole way through transformers: placeholders in the prompt, images normalised in numpy."""
    image = processor.image
    scaled = row.pixel_values.astype(np.float32) * np.float32(image.rescale_factor)
    normal = (scaled - np.float32(image.mean)) / np.float32(image.std)
    ids = torch.tensor([[loaded.model.config.image_token_id] * image.image_seq_length + row.input_ids.tolist()])
    output = loaded.model.generate(
        input_ids=ids,
        pixel_values=torch.from_numpy(normal).permute(2, 0, 1)[None],
        max_new_tokens=row.max_new_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    score = output.sequences_scores[0].item() if "sequences_scores" in output else float("nan")
    return output.sequences[0].tolist(), score


@pytest.mark.parametrize("task", ["<CAPTION>", "<OD>", "<OCR_WITH_REGION>", "<REGION_TO_SEGMENTATION>"])
@pytest.mark.parametrize("num_beams", [None, 1, 2, 5])
def test_answers_equal_those_of_generate(engine, loaded, processor, task, num_beams):
    index = next(i for i in range(50) if held_out_scene(i).words)
    row = request(processor, index, task, num_beams=num_beams)
    (result,) = answer(engine, row)
    tokens, score = by_generate(loaded, processor, row, num_beams=num_beams or 3)
    assert result.sequence.tolist() == tokens
    if num_beams != 1:
        assert result.score == pytest.approx(score, abs=1e-4)
    assert result.token_logprobs.shape == result.sequence.shape
    assert result.token_logprobs[:2].tolist() == [0, 0]
    assert (result.token_logprobs <= 0).all()


def test_a_row_gets_the_same_answer_in_any_company(engine, processor):
    rows = [
        request(processor, index, task, **changes)
        for index in range(3)
        for task in ("<CAPTION>", "<OD>", "<DETAILED_CAPTION>")
        for changes in ({}, {"num_beams": 1})
    ][:16]
    together = answer(engine, *rows)
    for row, result in zip(rows, together, strict=True):
        assert answer(engine, row)[0].sequence.tolist() == result.sequence.tolist()


def test_a_key_that_lies_gets_nobody_anothers_answer(engine, processor):
    rows = [request(processor, index, image_key=b"same") for index in (0, 1, 0, 2)]
    together = answer(engine, *rows)
    for row, result in zip(rows, together, strict=True):
        assert answer(engine, row)[0].sequence.tolist() == result.sequence.tolist()
    assert together[0].sequence.tolist() != together[1].sequence.tolist()


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_limit_cuts_the_answer_and_says_so(engine, loaded, processor, limit):
    row = request(processor, max_new_tokens=limit)
    (result,) = answer(engine, row)
    assert result.sequence.tolist() == by_generate(loaded, processor, row, num_beams=3)[0]
    assert result.finish_reason == "length"
    assert len(result.sequence) == limit + 1
    assert answer(engine, request(processor))[0].finish_reason == "stop"


def test_length_penalty_divides_the_score(engine, processor):
    (plain,) = answer(engine, request(processor, num_beams=1))
    (divided,) = answer(engine, request(processor, num_beams=1, length_penalty=2.0))
    length = len(plain.sequence) - 1
    assert plain.score == pytest.approx(plain.token_logprobs.sum() / length, abs=1e-6)
    assert divided.score == pytest.approx(plain.score / length, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_ids": np.array([], dtype=np.int64)}, "prompt has 0 tokens"),
        ({"input_ids": np.zeros(5000, dtype=np.int64)}, "prompt has 5000 tokens; this model takes 1 to"),
        ({"input_ids": np.array([0, 10**6])}, "an id outside 0 to"),
        ({"input_ids": np.array([0, -1])}, "an id outside 0 to"),
        ({"max_new_tokens": 0}, "expected 1 to 1024, got 0"),
        ({"max_new_tokens": 10**6}, "expected 1 to 1024, got 1000000"),
        (
            {"pixel_values": np.zeros((1, 1, 3), dtype=np.uint8)},
            r"expected uint8 \[192, 192, 3\], got uint8 \[1, 1, 3\]",
        ),
        ({"pixel_values": np.zeros((192, 192, 3), dtype=np.float32)}, "got float32"),
    ],
)
def test_prompts_that_the_model_cannot_take_are_refused_before_they_wait(engine, processor, changes, says):
    with pytest.raises(InvalidRequest, match=says):
        engine.submit([request(processor), request(processor, **changes)])
    assert answer(engine, request(processor))[0].finish_reason == "stop"


def test_a_full_queue_takes_all_or_none(engine, processor):
    rows = [request(processor)] * 17
    with pytest.raises(QueueFull, match="17 more don't fit into 16"):
        engine.submit(rows)
    assert len(answer(engine, *rows[:16])) == 16


def test_a_deadline_ends_waiting_and_running_rows(engine, processor):
    slow = request(processor, task="<MORE_DETAILED_CAPTION>", num_beams=8, max_new_tokens=1000)
    past = request(processor, deadline=time.monotonic() - 1)
    soon = request(processor, max_new_tokens=1000, deadline=time.monotonic() + 0.005)
    futures = engine.submit([slow, past, soon])
    assert futures[0].result(120).finish_reason in ("stop", "length")
    for future in futures[1:]:
        with pytest.raises(DeadlineExceeded):
            future.result(60)


def test_a_cancelled_row_is_dropped_and_others_are_answered(engine, processor):
    first, second, third = engine.submit([request(processor, i, num_beams=i + 1) for i in range(3)])
    assert second.cancel()
    assert first.result(60).finish_reason == "stop"
    assert third.result(60).finish_reason == "stop"
    with pytest.raises(CancelledError):
        second.result(1)


class Poisoned(StaticBatchEngine):
    """Fails as a device would, whenever a certain picture is in the batch."""

    def _encode(self, requests):
        if any(request.image_key == b"poison" for request in requests):
            raise RuntimeError("device error")
        return super()._encode(requests)


def test_one_row_that_breaks_the_model_fails_alone(loaded, processor):
    engine = Poisoned(loaded, processor.image)
    poison = request(processor, image_key=b"poison")
    good, bad, other = engine.submit([request(processor, 0), poison, request(processor, 1)])
    alone = answer(engine, request(processor, 0), request(processor, 1))
    assert [good.result(60).sequence.tolist(), other.result(60).sequence.tolist()] == [
        result.sequence.tolist() for result in alone
    ]
    with pytest.raises(RuntimeError, match="device error"):
        bad.result(60)
    assert engine.is_healthy
    engine.close()


def test_a_closed_engine_refuses_and_lets_nobody_wait(loaded, processor):
    engine = StaticBatchEngine(loaded, processor.image, max_batch_size=1)
    futures = engine.submit([request(processor, i) for i in range(8)])
    engine.close()
    assert not engine.is_healthy
    ended = [future.exception(10) for future in futures]
    assert any(isinstance(error, EngineStopped) for error in ended)
    assert all(error is None or isinstance(error, EngineStopped) for error in ended)
    with pytest.raises(EngineStopped):
        engine.submit([request(processor)])
