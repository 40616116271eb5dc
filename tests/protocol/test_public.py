from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
from kserve.protocol.infer_type import InferInput, InferRequest, RequestedOutput

from florence2_kserve.errors import BadRequest, BadTensor, TooLarge
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.public import (
    Bounds,
    GenerationOptions,
    Row,
    RowAnswer,
    decode_base64,
    read_call,
    read_options,
    write_answer,
)
from florence2_kserve.protocol.tensors import Tensor, bytes_array

BOUNDS = Bounds(max_rows=6, max_num_beams=4, max_new_tokens=100)
IMAGE = b"\x89PNG\r\n\x1a\n image"
BASE64 = base64.b64encode(IMAGE).decode()
REGION = "<loc_1><loc_2><loc_3><loc_4>"


def request(
    images: list[Any] | None = None,
    tasks: list[Any] | None = None,
    texts: list[Any] | None = None,
    shape: list[int] | None = None,
    parameters: dict[str, Any] | None = None,
    outputs: list[str] | None = None,
    **changes: Any,
) -> InferRequest:
    images = [BASE64] if images is None else images
    tasks = ["<CAPTION>"] if tasks is None else tasks
    inputs = [
        InferInput("INPUT_IMAGE", changes.get("image_shape", [len(images)]), "BYTES", images),
        InferInput("TASK_PROMPT", shape or [len(tasks)], "BYTES", tasks),
    ]
    if texts is not None:
        inputs.append(InferInput("TEXT_PROMPT", changes.get("text_shape", shape or [len(texts)]), "BYTES", texts))
    return InferRequest(
        "florence2",
        inputs,
        "7",
        parameters=parameters,
        request_outputs=[RequestedOutput(name) for name in outputs] if outputs else None,
    )


@pytest.mark.parametrize("shape", [[1], [1, 1]])
def test_one_image_and_one_task(shape):
    call = read_call(request(shape=shape, image_shape=shape), BOUNDS)
    assert call.images == [IMAGE]
    assert [(row.image, row.task.name, row.text) for row in call.rows] == [(0, "<CAPTION>", "")]
    assert (call.shape, call.outputs, call.id) == (shape, ("PARSED_JSON",), "7")


def test_rows_keep_their_order_and_text():
    call = read_call(request([BASE64] * 2, ["<OD>", "<OPEN_VOCABULARY_DETECTION>"], ["", " a café "]), BOUNDS)
    assert [(row.image, row.task.name, row.text) for row in call.rows] == [
        (0, "<OD>", ""),
        (1, "<OPEN_VOCABULARY_DETECTION>", "a café"),
    ]


def test_several_tasks_on_each_image():
    call = read_call(request([BASE64] * 2, ["<OD>", "<OCR>", "<CAPTION>"] * 2, shape=[2, 3]), BOUNDS)
    assert [row.image for row in call.rows] == [0, 0, 0, 1, 1, 1]
    assert call.shape == [2, 3]


@pytest.mark.parametrize(
    "value",
    [
        BASE64,
        base64.urlsafe_b64encode(IMAGE).decode(),
        BASE64.rstrip("="),
        BASE64[:8] + "\r\n  " + BASE64[8:],
        f"data:image/png;base64,{BASE64}",
        IMAGE,
    ],
)
def test_an_image_comes_as_base64_or_as_it_is(value):
    assert read_call(request([value]), BOUNDS).images == [IMAGE]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": [""]}, "INPUT_IMAGE, row 0: is empty"),
        ({"images": [BASE64, "%%%"], "tasks": ["<OD>"] * 2}, "INPUT_IMAGE, row 1: not valid base64"),
        ({"images": ["data:image/png,abc"]}, "INPUT_IMAGE, row 0: data: URI has to be base64-coded"),
        ({"images": ["data:image/png;base64,"]}, "INPUT_IMAGE, row 0: is empty"),
        ({"images": []}, r"INPUT_IMAGE: shape \[0\] holds no image"),
        (
            {"images": [BASE64] * 2, "image_shape": [1, 2]},
            r"INPUT_IMAGE: expected shape \[B\] or \[B,1\], got \[1, 2\]",
        ),
        ({"image_shape": [2]}, r"INPUT_IMAGE: shape \[2\] takes 2 elements, got 1"),
        ({"tasks": ["<OD>", "<OD>"]}, r"TASK_PROMPT: shape \[2\] doesn't go with 1 images"),
        ({"tasks": [], "shape": [1, 0]}, r"TASK_PROMPT: shape \[1, 0\] holds no task"),
        ({"tasks": ["<OD>"] * 7, "shape": [1, 7]}, "TASK_PROMPT: 7 rows are over this server's bound max_rows=6"),
        ({"tasks": ["<NONE>"]}, "TASK_PROMPT, row 0: unknown task '<NONE>'; known tasks: <CAPTION>"),
        ({"tasks": [b"\xff"]}, "TASK_PROMPT, row 0: not valid UTF-8"),
        ({"tasks": [5]}, "TASK_PROMPT, row 0: expected BYTES"),
        ({"texts": ["a car"]}, "TEXT_PROMPT, row 0: <CAPTION> takes no text, got 'a car'"),
        ({"tasks": ["<REGION_TO_OCR>"]}, "TEXT_PROMPT, row 0: <REGION_TO_OCR> needs a region"),
        (
            {"images": [BASE64] * 2, "tasks": ["<OD>", "<OPEN_VOCABULARY_DETECTION>"], "texts": ["", " "]},
            "TEXT_PROMPT, row 1: <OPEN_VOCABULARY_DETECTION> needs a text",
        ),
        ({"texts": ["", ""]}, r"TEXT_PROMPT: expected TASK_PROMPT's shape \[1\], got \[2\]"),
        ({"outputs": ["NOPE"]}, "unknown output 'NOPE'; known: PARSED_JSON"),
        ({"parameters": {"num_beams": 5}}, "parameter num_beams: 5 is over this server's bound max_num_beams=4"),
        (
            {"parameters": {"max_new_tokens": 101}},
            "parameter max_new_tokens: 101 is over this server's bound max_new_tokens=100",
        ),
        ({"parameters": {"num_beams": True}}, "parameter num_beams: .*has to be a number"),
        ({"parameters": {"num_beams": 1.5}}, "parameter num_beams"),
        ({"parameters": {"num_beams": 0}}, "parameter num_beams"),
        ({"parameters": {"length_penalty": "nan"}}, "parameter length_penalty"),
        ({"parameters": {"timeout_ms": "9" * 400}}, "parameter timeout_ms"),
        ({"shape": [1] * 70}, "TASK_PROMPT: shape has to hold at most 8 whole numbers"),
        ({"shape": [0, 10**30]}, "TASK_PROMPT: shape has to hold at most 8 whole numbers"),
        ({"parameters": {"priority": 1}}, "unknown parameter 'priority'; known: max_new_tokens"),
    ],
)
def test_wrong_requests_name_the_tensor_and_the_row(changes, says):
    with pytest.raises(BadRequest, match=says):
        read_call(request(**changes), BOUNDS)


def test_missing_misnamed_and_repeated_tensors_are_named():
    whole = request()
    for inputs, says in [
        (whole.inputs[1:], "INPUT_IMAGE: required input is missing"),
        (whole.inputs[:1], "TASK_PROMPT: required input is missing"),
        ([*whole.inputs, InferInput("IMAGE", [1], "BYTES", ["x"])], "IMAGE: unknown input; expected INPUT_IMAGE"),
        ([*whole.inputs, whole.inputs[0]], "INPUT_IMAGE: given twice"),
        ([InferInput("INPUT_IMAGE", [1], "INT32", [1]), whole.inputs[1]], "INPUT_IMAGE: expected datatype BYTES"),
    ]:
        with pytest.raises(BadTensor, match=says):
            read_call(InferRequest("florence2", inputs), BOUNDS)


@pytest.mark.parametrize("as_text", [True, False])
def test_parameters_are_numbers_or_strings(as_text):
    given = {"max_new_tokens": 5, "num_beams": 2, "length_penalty": 0.5, "timeout_ms": 100}
    sent = {key: str(value) for key, value in given.items()} if as_text else given
    call = read_call(request(parameters=sent | {"binary_data_output": True}), BOUNDS)
    assert call.options == GenerationOptions(**given)


def test_a_grpc_request_reads_the_same():
    message = wire.infer_request(
        "florence2",
        [
            Tensor("INPUT_IMAGE", bytes_array([IMAGE])),
            Tensor("TASK_PROMPT", bytes_array([b"<REGION_TO_OCR>"])),
            Tensor("TEXT_PROMPT", bytes_array([REGION.encode()])),
        ],
        request_id="7",
        parameters={"num_beams": 3, "length_penalty": "0.5"},
        outputs=["SCORES"],
    )
    call = read_call(InferRequest.from_grpc(ModelInferRequest.FromString(message.SerializeToString())), BOUNDS)
    assert (call.images, call.rows[0].text, call.outputs) == ([IMAGE], REGION, ("SCORES",))
    assert call.options == GenerationOptions(num_beams=3, length_penalty=0.5)


def test_a_tensor_without_axes_is_refused():
    asked = request(texts=["x"], text_shape=[])
    with pytest.raises(BadTensor, match=r"TEXT_PROMPT: expected TASK_PROMPT's shape \[1\], got \[\]"):
        read_call(asked, BOUNDS)


def test_what_is_quoted_is_cut_short():
    """A picture where the task should be: over gRPC a status of more than 16 KiB is lost."""
    with pytest.raises(BadTensor, match=r"unknown task 'A+…'; known tasks: <CAPTION>") as caught:
        read_call(request(tasks=["A" * 200_000]), BOUNDS)
    assert len(str(caught.value)) < 1000
    with pytest.raises(BadRequest) as refused:
        read_call(request(parameters={"B" * 50_000: 1}), BOUNDS)
    assert len(str(refused.value)) == 1000


ALL = ["SCORES", "PARSED_JSON", "MASKS", "FINISH_REASON", "GENERATED_TEXT"]


def test_answers_have_the_shape_of_the_task_prompt_and_the_outputs_asked_for():
    call = read_call(request([BASE64] * 2, ["<OD>", "<OCR>"] * 2, shape=[2, 2], outputs=ALL), BOUNDS)
    answers = [
        RowAnswer(row.task.name, f"é{i}", "length" if i else "stop", f"ü{i}", {"sequence": -i}, {"masks": [i]})
        for i, row in enumerate(call.rows)
    ]
    response = write_answer(call, answers, {"queue_us": 1})
    assert [(o.name, o.shape, o.datatype) for o in response.outputs] == [(name, [2, 2], "BYTES") for name in ALL]
    scores, parsed, masks, reasons, texts = (output.data for output in response.outputs)
    assert "é" in parsed[1, 0].decode()
    assert [json.loads(column[1, 0]) for column in (scores, parsed, masks)] == [
        {"<OD>": {"sequence": -2}},
        {"<OD>": "é2"},
        {"<OD>": {"masks": [2]}},
    ]
    assert [reason.decode() for reason in reasons.flat] == ["stop", "length", "length", "length"]
    assert [text.decode() for text in texts.flat] == ["ü0", "ü1", "ü2", "ü3"]
    assert response.parameters == {"truncated_rows": 3, "queue_us": 1}


PARTIAL = {"partial": True}


def test_a_partial_call_keeps_what_is_wrong_with_a_row_beside_the_others():
    images, tasks = [BASE64, "@@", BASE64], ["<OD>", "<OD>", "<DANCE>"]
    call = read_call(request(images, tasks, parameters=PARTIAL), BOUNDS)
    assert [type(image) for image in call.images] == [bytes, BadTensor, bytes]
    assert [type(row) for row in call.rows] == [Row, Row, BadTensor]
    assert str(call.images[1]).startswith("INPUT_IMAGE, row 1: not valid base64")
    assert str(call.rows[2]).startswith("TASK_PROMPT, row 2: unknown task")
    assert call.options.partial


def test_a_row_without_an_answer_says_why_in_its_place():
    call = read_call(request([BASE64] * 2, ["<OD>"] * 2, parameters=PARTIAL, outputs=ALL), BOUNDS)
    answers = [BadTensor("INPUT_IMAGE", "is é", row=0), RowAnswer("<OD>", {"bboxes": [], "labels": []}, "stop")]
    response = write_answer(call, answers, {})
    error = {"error": {"status": 400, "message": "INPUT_IMAGE, row 0: is é"}}
    scores, parsed, masks, reasons, texts = (output.data for output in response.outputs)
    assert [json.loads(column[0]) for column in (scores, parsed, masks)] == [error] * 3
    assert json.loads(parsed[1]) == {"<OD>": {"bboxes": [], "labels": []}}
    assert (list(reasons), list(texts)) == ([b"error", b"stop"], [b"", b""])
    assert response.parameters == {"truncated_rows": 0, "failed_rows": 1}


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_partial_may_be_true_in_words(value):
    assert read_options({"partial": value}, BOUNDS).partial is True


@pytest.mark.parametrize("value", ["yes", "", 1, 0, 1.0, "1"])
def test_partial_of_another_kind_is_refused(value):
    with pytest.raises(BadRequest, match="parameter partial: has to be true or false, got"):
        read_options({"partial": value}, BOUNDS)


@pytest.mark.parametrize("value", [IMAGE * 100, base64.b64encode(IMAGE * 100), base64.b64encode(b"no image" * 1000)])
def test_an_image_over_the_limit_is_refused(value):
    bounds = Bounds(6, 4, 100, max_image_bytes=len(IMAGE) * 100 - 1)
    with pytest.raises(TooLarge, match=r"INPUT_IMAGE, row 1: .* over the limit of 1399 bytes \(max_image_mib\)"):
        read_call(request([BASE64, value], ["<OD>"] * 2), bounds)
    exact = Bounds(6, 4, 100, max_image_bytes=len(IMAGE) * 100)
    assert read_call(request([IMAGE * 100], ["<OD>"]), exact).images == [IMAGE * 100]


def test_broken_base64_is_a_value_error():
    with pytest.raises(ValueError, match="not valid base64"):
        decode_base64(b"a*b")
