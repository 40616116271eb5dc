"""Choosing outputs, and their binary form over REST."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from .contract import (
    FINISH,
    GENERATED,
    MASKS,
    OUTPUTS,
    PARSED,
    SCORES,
    TASKS,
    Form,
    Takes,
    assert_answer,
    assert_masks,
    assert_scores,
)
from .messages import SHORT, ask, unpack_bytes_tensor
from .pictures import RED_CIRCLE_BINS, SIZE, base64_text, draw, encode, png
from .wires import JSON_LENGTH_HEADER, RestConnection, Wire, rest_outcome

Alone = Callable[..., Any]
PROMPTS = [task.prompt for task in TASKS]
TEXTS = [{Takes.NOTHING: "", Takes.TEXT: "red circle", Takes.REGION: RED_CIRCLE_BINS}[task.takes] for task in TASKS]


def test_the_default_output_is_parsed_json_alone(rest_or_grpc: Wire) -> None:
    assert list(rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>")).outputs) == [PARSED]


@pytest.mark.parametrize(
    "names",
    [*((name,) for name in OUTPUTS), (PARSED, GENERATED), (GENERATED, PARSED), (FINISH, MASKS, SCORES)],
    ids=" ".join,
)
def test_the_outputs_asked_for_come_and_no_others(rest_or_grpc: Wire, names: tuple[str, ...]) -> None:
    images = [base64_text(png(0)), base64_text(png(1))]
    outcome = rest_or_grpc.infer(ask(images, ["<CAPTION>", "<OCR>"], outputs=names))
    assert outcome.status == "ok", f"{outcome.status}: {outcome.message}"
    assert set(outcome.outputs) == set(names)
    for output in outcome.outputs.values():
        assert (output.datatype, output.shape, len(output.data)) == ("BYTES", (2, 1), 2)


def test_the_generated_text_is_what_a_caption_was_read_from(rest_or_grpc: Wire, alone: Alone) -> None:
    outcome = rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>", outputs=(PARSED, GENERATED)))
    assert outcome.answers() == [alone(0, "<CAPTION>")]
    assert alone(0, "<CAPTION>")["<CAPTION>"].strip() in outcome.outputs[GENERATED].data[0]


def test_every_task_gives_every_output_in_its_form(rest_or_grpc: Wire, alone: Alone) -> None:
    request = ask(base64_text(png()), PROMPTS, TEXTS, shape=(1, len(TASKS)), outputs=OUTPUTS)
    outcome = rest_or_grpc.infer(request)
    answers, scores, masks = (outcome.answers(name) for name in (PARSED, SCORES, MASKS))
    generated, reasons = outcome.elements(GENERATED), outcome.elements(FINISH)
    assert answers == [alone(0, task, text) for task, text in zip(PROMPTS, TEXTS, strict=True)]
    for output in outcome.outputs.values():
        assert (output.datatype, output.shape) == ("BYTES", (1, len(TASKS)))
    for row, task in enumerate(TASKS):
        assert_answer(task, answers[row], SIZE)
        assert_scores(task, scores[row], answers[row])
        assert_masks(task, masks[row], answers[row], SIZE)
        assert reasons[row] in ("stop", "length")
        assert generated[row]


def test_masks_are_of_the_picture_as_it_is_shown(rest_or_grpc: Wire) -> None:
    """A picture of another size and aspect, whose file lies on its side, has masks of the upright picture."""
    size = (90, 300)
    upright, exif = draw().resize(size), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    on_its_side = encode(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    task = next(task for task in TASKS if task.prompt == "<REGION_TO_SEGMENTATION>")
    images = [base64_text(encode(upright)), base64_text(on_its_side)]
    outcome = rest_or_grpc.infer(ask(images, [task.prompt] * 2, [RED_CIRCLE_BINS] * 2, outputs=(PARSED, MASKS)))
    answers, masks = outcome.answers(), outcome.answers(MASKS)
    assert masks[0][task.prompt]["masks"], "a segmentation without a mask"
    assert_masks(task, masks[0], answers[0], size)
    assert (answers[1], masks[1]) == (answers[0], masks[0])


def test_an_answer_without_places_is_empty_lists(rest_or_grpc: Wire) -> None:
    """One token is no place, whatever the model."""
    listing = [(task, text) for task, text in zip(TASKS, TEXTS, strict=True) if task.form is not Form.TEXT]
    prompts, texts = [task.prompt for task, _ in listing], [text for _, text in listing]
    request = ask(
        base64_text(png()),
        prompts,
        texts,
        shape=(1, len(listing)),
        parameters={"max_new_tokens": 1},
        outputs=(PARSED, SCORES, MASKS),
    )
    outcome = rest_or_grpc.infer(request)
    rows = zip(listing, outcome.answers(), outcome.answers(SCORES), outcome.answers(MASKS), strict=True)
    for (task, _), answer, scores, masks in rows:
        assert_answer(task, answer, SIZE)
        assert all(places == [] for places in answer[task.prompt].values()), answer
        assert_scores(task, scores, answer)
        assert masks == {task.prompt: {"masks": [], "labels": []}}


def test_an_answer_that_was_finished_says_stop(rest_or_grpc: Wire) -> None:
    outcome = rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>", parameters={}, outputs=(FINISH,)))
    assert outcome.elements(FINISH) == ("stop",)
    assert outcome.parameters["truncated_rows"] == 0


def test_an_answer_that_was_cut_off_says_length(rest_or_grpc: Wire) -> None:
    request = ask(
        base64_text(png()),
        ["<CAPTION>", "<OD>", "<OCR_WITH_REGION>"],
        shape=(1, 3),
        parameters={"max_new_tokens": 2},
        outputs=(FINISH, SCORES),
    )
    outcome = rest_or_grpc.infer(request)
    assert outcome.elements(FINISH) == ("length",) * 3
    assert outcome.parameters["truncated_rows"] == 3
    assert all(scores[prompt]["sequence"] <= 0 for scores in outcome.answers(SCORES) for prompt in scores)


def test_a_response_says_what_was_cut_off_without_being_asked(rest_or_grpc: Wire) -> None:
    cut = rest_or_grpc.infer(ask(base64_text(png()), "<OD>", parameters={"max_new_tokens": 2}))
    assert list(cut.outputs) == [PARSED]
    assert cut.parameters["truncated_rows"] == 1


def test_a_response_says_how_long_each_part_took(rest_or_grpc: Wire) -> None:
    parameters = rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>")).parameters
    for name in ("preprocess_us", "queue_us", "generate_us", "postprocess_us"):
        assert type(parameters[name]) is int, f"{name}: {parameters.get(name)!r}"
        assert parameters[name] >= 0
    assert parameters["generate_us"] > 0


@pytest.mark.parametrize("names", [("BOXES",), (PARSED, "BOXES"), ("masks",)], ids=" ".join)
def test_an_unknown_output_is_refused(rest_or_grpc: Wire, names: tuple[str, ...]) -> None:
    outcome = rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>", outputs=names))
    assert outcome.status == "invalid", f"{outcome.status}: {outcome.message}"
    assert names[-1] in outcome.message
    rest_or_grpc.assert_alive()


@pytest.mark.parametrize(
    "choice",
    [
        {"outputs": [{"name": PARSED, "parameters": {"binary_data": True}}]},
        {"parameters": {**SHORT, "binary_data_output": True}},
    ],
    ids=["binary_data", "binary_data_output"],
)
def test_an_output_is_binary_where_the_request_says_so(
    rest: RestConnection, alone: Alone, choice: dict[str, Any]
) -> None:
    images = [base64_text(png(0)), base64_text(png(1))]
    reply = rest.post({**ask(images, ["<CAPTION>", "<OD>"]).json_body(), **choice})
    assert reply.status == 200, reply.body
    json_length = int(reply.headers[JSON_LENGTH_HEADER.lower()])
    (output,) = json.loads(reply.body[:json_length])["outputs"]
    blob = reply.body[json_length:]
    assert "data" not in output
    assert output["parameters"]["binary_data_size"] == len(blob)
    assert [json.loads(element) for element in unpack_bytes_tensor(blob)] == [alone(0, "<CAPTION>"), alone(1, "<OD>")]
    rest.assert_alive()


def test_one_output_may_be_binary_and_another_not(rest: RestConnection) -> None:
    body = ask(base64_text(png()), "<CAPTION>").json_body()
    body["outputs"] = [
        {"name": PARSED, "parameters": {"binary_data": False}},
        {"name": GENERATED, "parameters": {"binary_data": True}},
    ]
    reply = rest.post(body)
    outcome = rest_outcome(reply)
    assert set(outcome.outputs) == {PARSED, GENERATED}
    described = json.loads(reply.body[: int(reply.headers[JSON_LENGTH_HEADER.lower()])])["outputs"]
    assert {output["name"]: "data" in output for output in described} == {PARSED: True, GENERATED: False}


def test_binary_inputs_do_not_make_binary_outputs(rest: RestConnection) -> None:
    body, json_length = ask(png(), "<CAPTION>").binary_body()
    reply = rest.post(body, {JSON_LENGTH_HEADER: str(json_length), "Content-Type": "application/octet-stream"})
    assert JSON_LENGTH_HEADER.lower() not in reply.headers
    assert isinstance(reply.json()["outputs"][0]["data"][0], str)
