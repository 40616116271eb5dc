"""All 15 tasks answer in their form, with the text or region that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .contract import PARSED, TASKS, Takes, TaskContract, assert_answer
from .messages import ask
from .pictures import RED_CIRCLE_BINS, RED_CIRCLE_PIXELS, SIZE, base64_text, png
from .wires import RestConnection, Wire, rest_outcome

Alone = Callable[..., Any]
INPUTS = {Takes.NOTHING: "", Takes.TEXT: "red circle", Takes.REGION: RED_CIRCLE_BINS}
REGION_TASKS = [task for task in TASKS if task.takes is Takes.REGION]


def _prompt(task: TaskContract) -> str:
    return task.prompt


@pytest.mark.parametrize("task", TASKS, ids=_prompt)
def test_each_task_answers_in_its_form(alone: Alone, task: TaskContract) -> None:
    assert_answer(task, alone(0, task.prompt, INPUTS[task.takes]), SIZE)


@pytest.mark.parametrize("task", REGION_TASKS, ids=_prompt)
def test_a_region_may_be_a_pixel_box(rest_or_grpc: Wire, alone: Alone, task: TaskContract) -> None:
    """The same region in pixels and in location bins is the same question."""
    outcome = rest_or_grpc.infer(ask(base64_text(png()), task.prompt, RED_CIRCLE_PIXELS))
    assert outcome.answers() == [alone(0, task.prompt, RED_CIRCLE_BINS)]


@pytest.mark.parametrize("task", [task for task in TASKS if task.takes is Takes.NOTHING], ids=_prompt)
def test_an_empty_text_is_none(rest: RestConnection, alone: Alone, task: TaskContract) -> None:
    request = ask(base64_text(png()), task.prompt, "")
    assert rest_outcome(rest.post(request.json_body())).answers() == [alone(0, task.prompt)]


def test_all_tasks_on_one_image_in_one_request(rest_or_grpc: Wire, alone: Alone) -> None:
    """``TASK_PROMPT`` of [1,15]: every task on the one image, each answer that of the task sent alone."""
    prompts, texts = [task.prompt for task in TASKS], [INPUTS[task.takes] for task in TASKS]
    outcome = rest_or_grpc.infer(ask(base64_text(png()), prompts, texts, shape=(1, len(TASKS))))
    answers = outcome.answers()
    assert outcome.outputs[PARSED].shape == (1, len(TASKS))
    for task, text, answer in zip(TASKS, texts, answers, strict=True):
        assert answer == alone(0, task.prompt, text)


def test_two_tasks_on_each_of_two_images(wire: Wire, alone: Alone) -> None:
    """``TASK_PROMPT`` of [2,2] is read row by row: image by image, task by task."""
    images = [base64_text(png(0)), base64_text(png(1))]
    prompts = ["<CAPTION>", "<OPEN_VOCABULARY_DETECTION>", "<OCR>", "<REGION_TO_CATEGORY>"]
    texts = ["", "red circle", "", RED_CIRCLE_BINS]
    outcome = wire.infer(ask(images, prompts, texts, shape=(2, 2)))
    assert outcome.outputs[PARSED].shape == (2, 2)
    assert outcome.answers() == [
        alone(image, prompt, text) for image, prompt, text in zip((0, 0, 1, 1), prompts, texts, strict=True)
    ]
