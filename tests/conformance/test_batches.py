"""Several rows in one request: each gets the answer that it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .contract import PARSED
from .messages import ask
from .pictures import RED_CIRCLE_BINS, RED_CIRCLE_PIXELS, base64_text, png
from .wires import Wire

Alone = Callable[..., Any]

# scene, task, text
ROWS = (
    (0, "<CAPTION>", ""),
    (1, "<OPEN_VOCABULARY_DETECTION>", "red circle"),
    (2, "<OD>", ""),
    (0, "<REGION_TO_CATEGORY>", RED_CIRCLE_BINS),
    (1, "<OCR>", ""),
    (2, "<REGION_TO_DESCRIPTION>", RED_CIRCLE_PIXELS),
)
SCENES, TASKS, TEXTS = (list(column) for column in zip(*ROWS, strict=True))


def test_the_scenes_tell_themselves_apart(alone: Alone) -> None:
    """Otherwise none of the tests here could see an answer that went to another row."""
    for task in ("<CAPTION>", "<OD>"):
        answers = [alone(scene, task) for scene in range(3)]
        assert all(answers.count(answer) == 1 for answer in answers), answers


@pytest.mark.parametrize("shape", [(len(ROWS),), (len(ROWS), 1)], ids=str)
def test_mixed_rows_are_answered_as_if_alone(rest_or_grpc: Wire, alone: Alone, shape: tuple[int, ...]) -> None:
    images = [base64_text(png(scene)) for scene in SCENES]
    outcome = rest_or_grpc.infer(ask(images, TASKS, TEXTS, shape=shape))
    assert outcome.outputs[PARSED].shape == shape
    assert outcome.answers() == [alone(*row) for row in ROWS]


def test_several_images_with_the_same_task(rest_or_grpc: Wire, alone: Alone) -> None:
    images = [base64_text(png(scene)) for scene in range(3)]
    assert rest_or_grpc.infer(ask(images, ["<OD>"] * 3)).answers() == [alone(scene, "<OD>") for scene in range(3)]


def test_the_same_row_several_times(rest_or_grpc: Wire, alone: Alone) -> None:
    assert (
        rest_or_grpc.infer(ask([base64_text(png())] * 4, ["<CAPTION>"] * 4)).answers() == [alone(0, "<CAPTION>")] * 4
    )


def test_the_order_of_rows_does_not_matter(rest_or_grpc: Wire, alone: Alone) -> None:
    images = [base64_text(png(scene)) for scene in SCENES[::-1]]
    outcome = rest_or_grpc.infer(ask(images, TASKS[::-1], TEXTS[::-1]))
    assert outcome.answers() == [alone(*row) for row in ROWS[::-1]]
