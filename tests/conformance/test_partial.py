"""``partial=true``: a bad row has an error in its place, and the others their answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from .contract import FINISH, GENERATED, IMAGE, JSON_OUTPUTS, MASKS, OUTPUTS, PARSED, SCORES, TASK, TEXT
from .messages import SHORT, Outcome, ask
from .pictures import base64_text, noise, png, truncated, vast_png
from .wires import Wire

Alone = Callable[..., Any]

PARTIAL = {**SHORT, "partial": True}
GOOD = base64_text(png())
# image, task, text of a bad row; the tensor to blame; the status.
BAD_ROWS: dict[str, tuple[bytes, str, str, str, int]] = {
    "half a picture": (base64_text(truncated("PNG")), "<OD>", "", IMAGE, 400),
    "noise": (base64_text(noise()), "<OD>", "", IMAGE, 400),
    "no base64": (b"@@@ this is no base64 @@@", "<OD>", "", IMAGE, 400),
    "empty image": (b"", "<OD>", "", IMAGE, 400),
    "too many pixels": (base64_text(vast_png()), "<OD>", "", IMAGE, 413),
    "unknown task": (GOOD, "<DANCE>", "", TASK, 400),
    "no text": (GOOD, "<OPEN_VOCABULARY_DETECTION>", "", TEXT, 400),
    "a text too many": (GOOD, "<OD>", "a cat", TEXT, 400),
    "no region": (GOOD, "<REGION_TO_CATEGORY>", "in the middle", TEXT, 400),
    "a box beyond the image": (GOOD, "<REGION_TO_CATEGORY>", "[0, 0, 9000, 9000]", TEXT, 400),
    "a text that is too long": (GOOD, "<CAPTION_TO_PHRASE_GROUNDING>", "a red circle, " * 3000, TEXT, 400),
}


def _assert_error(element: Any, *words: str, status: int = 400) -> None:
    assert set(element) == {"error"}, f"{element!r}"
    assert set(element["error"]) == {"status", "message"}, f"{element!r}"
    assert element["error"]["status"] == status, f"{element!r}"
    message = element["error"]["message"]
    assert all(word in message for word in words), f"not all of {words} in {message!r}"
    assert "Traceback" not in message


def _assert_failed(outcome: Outcome, row: int, *words: str, status: int = 400) -> None:
    """Asserts that each output that was asked for has row `row`'s error in its own way."""
    for name in outcome.outputs:
        element = outcome.elements(name)[row]
        if name in JSON_OUTPUTS:
            _assert_error(json.loads(element), *words, status=status)
        else:
            assert element == {FINISH: "error", GENERATED: ""}[name]


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_good_rows_are_answered_as_if_alone_beside_a_bad_one(rest_or_grpc: Wire, alone: Alone, kind: str) -> None:
    image, task, text, blame, status = BAD_ROWS[kind]
    images = [base64_text(png(0)), image, base64_text(png(1))]
    request = ask(images, ["<OCR>", task, "<CAPTION>"], ["", text, ""], parameters=PARTIAL, outputs=OUTPUTS)
    outcome = rest_or_grpc.infer(request)
    answers = outcome.answers()
    assert [answers[0], answers[2]] == [alone(0, "<OCR>"), alone(1, "<CAPTION>")]
    _assert_failed(outcome, 1, blame, "row 1", status=status)
    assert outcome.elements(FINISH) == ("stop", "error", "stop")
    assert outcome.parameters["failed_rows"] == 1
    assert outcome.outputs[PARSED].shape == (3, 1)


def test_the_error_says_what_it_says_of_a_whole_request(rest_or_grpc: Wire) -> None:
    images, tasks = [GOOD, base64_text(truncated("PNG"))], ["<OD>", "<OD>"]
    whole = rest_or_grpc.infer(ask(images, tasks))
    partial = rest_or_grpc.infer(ask(images, tasks, parameters=PARTIAL))
    assert whole.status == "invalid"
    assert partial.answers()[1]["error"]["message"] == whole.message


def test_several_bad_rows_have_an_error_each(rest_or_grpc: Wire, alone: Alone) -> None:
    images = [base64_text(truncated("PNG")), GOOD, GOOD, base64_text(noise())]
    request = ask(images, ["<OD>", "<OD>", "<DANCE>", "<OD>"], parameters=PARTIAL, outputs=OUTPUTS)
    outcome = rest_or_grpc.infer(request)
    for row, blame in ((0, IMAGE), (2, TASK), (3, IMAGE)):
        _assert_failed(outcome, row, blame, f"row {row}")
    assert outcome.answers()[1] == alone(0, "<OD>")
    assert outcome.parameters["failed_rows"] == 3


def test_all_rows_may_be_bad(rest_or_grpc: Wire) -> None:
    request = ask([base64_text(noise())] * 2, ["<OD>", "<CAPTION>"], parameters=PARTIAL, outputs=OUTPUTS)
    outcome = rest_or_grpc.infer(request)
    for row in range(2):
        _assert_failed(outcome, row, IMAGE, f"row {row}")
    assert outcome.elements(FINISH) == ("error", "error")
    assert (outcome.parameters["failed_rows"], outcome.parameters["truncated_rows"]) == (2, 0)


def test_a_bad_image_fails_all_its_tasks_and_no_others(rest_or_grpc: Wire, alone: Alone) -> None:
    """``TASK_PROMPT`` of [2,2]: an image of one row of the batch has two elements."""
    images, tasks = [GOOD, base64_text(truncated("JPEG"))], ["<OD>", "<OCR>"] * 2
    outcome = rest_or_grpc.infer(ask(images, tasks, shape=(2, 2), parameters=PARTIAL, outputs=OUTPUTS))
    assert outcome.answers()[:2] == [alone(0, "<OD>"), alone(0, "<OCR>")]
    for element in (2, 3):
        _assert_failed(outcome, element, IMAGE, "row 1")
    assert outcome.parameters["failed_rows"] == 2
    assert outcome.outputs[PARSED].shape == (2, 2)


def test_a_bad_task_leaves_the_others_of_its_image(rest_or_grpc: Wire, alone: Alone) -> None:
    tasks = ["<OD>", "<DANCE>", "<OCR>"]
    outcome = rest_or_grpc.infer(ask(GOOD, tasks, shape=(1, 3), parameters=PARTIAL, outputs=OUTPUTS))
    answers = outcome.answers()
    assert [answers[0], answers[2]] == [alone(0, "<OD>"), alone(0, "<OCR>")]
    _assert_failed(outcome, 1, TASK, "row 0", "<DANCE>")


def test_good_rows_alone_say_that_none_failed(rest_or_grpc: Wire, alone: Alone) -> None:
    outcome = rest_or_grpc.infer(ask(GOOD, "<OD>", parameters=PARTIAL))
    assert outcome.answers() == [alone(0, "<OD>")]
    assert outcome.parameters["failed_rows"] == 0


def test_outputs_that_were_not_asked_for_do_not_come(rest_or_grpc: Wire) -> None:
    request = ask([base64_text(noise()), GOOD], ["<OD>"] * 2, parameters=PARTIAL, outputs=(SCORES, MASKS))
    outcome = rest_or_grpc.infer(request)
    assert set(outcome.outputs) == {SCORES, MASKS}
    _assert_failed(outcome, 0, IMAGE, "row 0")


@pytest.mark.parametrize("parameters", [SHORT, {**SHORT, "partial": False}], ids=["not said", "false"])
def test_without_it_one_bad_row_fails_the_request(rest_or_grpc: Wire, parameters: dict[str, Any]) -> None:
    outcome = rest_or_grpc.infer(ask([GOOD, base64_text(noise())], ["<OD>"] * 2, parameters=parameters))
    assert outcome.status == "invalid", outcome
    assert IMAGE in outcome.message
    assert "row 1" in outcome.message
    rest_or_grpc.assert_alive()


@pytest.mark.parametrize("value", ["perhaps", "", 2, -1], ids=repr)
def test_a_value_of_another_kind_is_refused(rest_or_grpc: Wire, value: Any) -> None:
    outcome = rest_or_grpc.infer(ask(GOOD, "<OD>", parameters={**SHORT, "partial": value}))
    assert outcome.status == "invalid", outcome
    assert "partial" in outcome.message
    rest_or_grpc.assert_alive()


def test_what_is_wrong_with_the_request_still_fails_it(rest_or_grpc: Wire) -> None:
    """An output's name, a parameter and the tensors' shapes belong to no row."""
    wrong = {
        "BOXES": ask(GOOD, "<OD>", parameters=PARTIAL, outputs=("BOXES",)),
        "num_beams": ask(GOOD, "<OD>", parameters={**PARTIAL, "num_beams": 0}),
        TASK: ask([GOOD] * 2, ["<OD>"] * 3, shape=(3, 1), parameters=PARTIAL),
    }
    for name, request in wrong.items():
        outcome = rest_or_grpc.infer(request)
        assert outcome.status == "invalid", outcome
        assert name in outcome.message
    rest_or_grpc.assert_alive()
