"""The transformer's own half of a request: what it asks its predictor, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from kserve.protocol.infer_type import InferInput, InferRequest, InferResponse, RequestedOutput
from PIL import Image

from florence2_kserve import errors, transformer
from florence2_kserve.protocol.internal import GenerateResult
from florence2_kserve.settings import Settings
from florence2_kserve.transformer import Florence2Transformer

ALL = ["PARSED_JSON", "GENERATED_TEXT", "SCORES", "MASKS", "FINISH_REASON"]


def png(color: str = "red", size: tuple[int, int] = (40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def request(
    images: list[bytes], tasks: list[list[str]], texts: list[list[str]] | None = None, **parameters: Any
) -> InferRequest:
    shape = [len(tasks), len(tasks[0])]
    inputs = [
        InferInput("INPUT_IMAGE", [len(images)], "BYTES", images),
        InferInput("TASK_PROMPT", shape, "BYTES", [task for row in tasks for task in row]),
    ]
    if texts is not None:
        inputs.append(InferInput("TEXT_PROMPT", shape, "BYTES", [text for row in texts for text in row]))
    return InferRequest(
        "florence2", inputs, "7", parameters=parameters, request_outputs=[RequestedOutput(name) for name in ALL]
    )


@pytest.fixture
def subject():
    made = Florence2Transformer(Settings(predictor_host="127.0.0.1:1", max_asyncio_workers=2))
    yield made
    asyncio.run(made.close())


@pytest.fixture
def decoded(monkeypatch) -> list[bytes]:
    """Every file that was decoded."""
    files: list[bytes] = []

    def note(data, **options):
        files.append(data)
        return decode(data, **options)

    decode = transformer.decode_image
    monkeypatch.setattr(transformer, "decode_image", note)
    return files


def prepare(subject: Florence2Transformer, asked: InferRequest) -> Any:
    return asyncio.run(subject.preprocess(asked))


def elements(response: InferResponse, name: str) -> list[Any]:
    return [element.decode() for output in response.outputs if output.name == name for element in output.data.flat]


def test_several_tasks_on_a_picture_decode_and_send_it_once(subject, decoded):
    tasks = ["<CAPTION>", "<OD>", "<OCR>", "<DENSE_REGION_CAPTION>", "<REGION_PROPOSAL>"]
    work = prepare(subject, request([png("red"), png("blue")], [tasks, tasks]))
    assert len(decoded) == 2
    assert work.generate.pixel_values.shape == (2, *work.generate.pixel_values.shape[1:3], 3)
    assert work.generate.image_index == [0] * 5 + [1] * 5
    assert work.generate.pixel_values[0, 0, 0].tolist() == [255, 0, 0]
    assert work.generate.pixel_values[1, 0, 0].tolist() == [0, 0, 255]
    assert len(set(work.generate.image_keys)) == 2


def test_a_partial_request_asks_about_what_it_can_alone(subject):
    images = [b"@@", png("red"), png("lime"), png("blue")]
    tasks = [["<OD>", "<OCR>"], ["<DANCE>", "<OD>"], ["<DANCE>", "<WALTZ>"], ["<OCR>", "<REGION_TO_OCR>"]]
    texts = [["", ""], ["", ""], ["", ""], ["", "[0,0,99,9]"]]
    work = prepare(subject, request(images, tasks, texts, partial=True))
    # Of the pictures only those that a question is left of: the second and the fourth.
    assert work.asked == [3, 6]
    assert [pixels[0, 0].tolist() for pixels in work.generate.pixel_values] == [[255, 0, 0], [0, 0, 255]]
    assert work.generate.image_index == [0, 1]
    assert {index: str(error).partition(":")[0] for index, error in work.errors.items()} == {
        0: "INPUT_IMAGE, row 0",
        1: "INPUT_IMAGE, row 0",
        2: "TASK_PROMPT, row 1, column 0",
        4: "TASK_PROMPT, row 2, column 0",
        5: "TASK_PROMPT, row 2, column 1",
        7: "TEXT_PROMPT, row 3, column 1",
    }


def test_errors_of_the_predictor_are_put_where_their_rows_are(subject):
    end = np.array([2, 0, 2])
    logprobs = np.zeros(3, np.float32)
    work = prepare(subject, request([png(), b"@@", png("blue")], [["<OD>"]] * 3, partial=True))
    assert work.asked == [0, 2]
    work.result = GenerateResult(
        sequences=[end, np.empty(0)],
        scores=[-0.25, 0.0],
        token_logprobs=[logprobs, np.empty(0)],
        finish_reasons=["length", "error"],
        errors={1: errors.Unavailable("no room")},
    )
    response = asyncio.run(subject.postprocess(work))
    parsed = [json.loads(element) for element in elements(response, "PARSED_JSON")]
    assert parsed[0] == {"<OD>": {"bboxes": [], "labels": []}}
    assert parsed[1]["error"]["status"] == 400
    assert parsed[2] == {"error": {"status": 503, "message": "row 2: no room"}}
    assert elements(response, "FINISH_REASON") == ["length", "error", "error"]
    assert json.loads(elements(response, "SCORES")[0]) == {"<OD>": {"sequence": -0.25, "bboxes": [], "labels": []}}
    counts = {name: response.parameters[name] for name in ("truncated_rows", "failed_rows")}
    assert counts == {"truncated_rows": 1, "failed_rows": 2}


def test_where_no_row_can_be_asked_about_no_predictor_is(subject):
    async def ask() -> InferResponse:
        response, _ = await subject(request([b"@@"], [["<OD>", "<OCR>"]], partial=True))
        return response

    response = asyncio.run(ask())
    assert elements(response, "FINISH_REASON") == ["error", "error"]
    assert elements(response, "GENERATED_TEXT") == ["", ""]


def test_the_first_bad_picture_is_named_whichever_is_found_first(subject, monkeypatch):
    """The second is refused at once, the first only after a while."""
    refused = threading.Event()

    def decode(data, **options):
        if data == png("blue"):
            refused.set()
            raise transformer.ImageError("is blue")
        assert refused.wait(20)
        raise transformer.ImageError("is red")

    monkeypatch.setattr(transformer, "decode_image", decode)
    with pytest.raises(errors.BadTensor, match="INPUT_IMAGE, row 0: is red"):
        prepare(subject, request([png("red"), png("blue")], [["<OD>"]] * 2))


def test_pictures_that_nobody_waits_for_are_not_decoded(subject, monkeypatch):
    begun: list[bytes] = []

    def decode(data, **options):
        begun.append(data)
        time.sleep(0.2)
        raise transformer.ImageError("is bad")

    monkeypatch.setattr(transformer, "decode_image", decode)
    with pytest.raises(errors.BadTensor):
        prepare(subject, request([png()] * 20, [["<OD>"]] * 20))
    time.sleep(0.5)
    assert len(begun) <= 6


def test_time_that_runs_out_while_decoding_is_told(subject, monkeypatch):
    decode = transformer.decode_image

    def slowly(data, **options):
        time.sleep(0.1)
        return decode(data, **options)

    monkeypatch.setattr(transformer, "decode_image", slowly)
    with pytest.raises(errors.DeadlineExceeded, match="while images were decoded, before row"):
        prepare(subject, request([png()] * 20, [["<OD>"]] * 20, timeout_ms=150, partial=True))


def test_large_jpegs_are_decoded_whole_where_the_settings_say_so():
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")

    def pixels(exact: bool) -> np.ndarray[Any, Any]:
        made = Florence2Transformer(Settings(predictor_host="127.0.0.1:1", exact_images=exact))
        work = prepare(made, request([buffer.getvalue()], [["<OD>"]]))
        asyncio.run(made.close())
        assert work.sizes == [(3200, 2400)]
        return work.generate.pixel_values[0]

    side = pixels(True).shape[0]
    exact = np.asarray(Image.open(buffer).resize((side, side), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels(True), exact)
    assert not np.array_equal(pixels(False), exact)
    assert np.abs(pixels(False).astype(int) - exact).mean() < 4
