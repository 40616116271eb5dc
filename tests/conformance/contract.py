"""The contract as data: tensor names, the 15 tasks, and the form of each task's answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

IMAGE, TASK, TEXT = "INPUT_IMAGE", "TASK_PROMPT", "TEXT_PROMPT"
PARSED, GENERATED = "PARSED_JSON", "GENERATED_TEXT"


class Takes(StrEnum):
    """What a task takes in ``TEXT_PROMPT``."""

    NOTHING = "nothing"
    TEXT = "text"
    REGION = "region"


class Form(StrEnum):
    """The form of a task's answer."""

    TEXT = "a string"
    BOXES = "labelled boxes"
    QUADS = "labelled quadrilaterals"
    POLYGONS = "labelled polygons"
    BOXES_OR_POLYGONS = "labelled boxes and labelled polygons"


@dataclass(frozen=True, slots=True)
class TaskContract:
    """One task as clients see it."""

    prompt: str
    takes: Takes
    form: Form


TASKS = (
    TaskContract("<CAPTION>", Takes.NOTHING, Form.TEXT),
    TaskContract("<DETAILED_CAPTION>", Takes.NOTHING, Form.TEXT),
    TaskContract("<MORE_DETAILED_CAPTION>", Takes.NOTHING, Form.TEXT),
    TaskContract("<OD>", Takes.NOTHING, Form.BOXES),
    TaskContract("<DENSE_REGION_CAPTION>", Takes.NOTHING, Form.BOXES),
    TaskContract("<REGION_PROPOSAL>", Takes.NOTHING, Form.BOXES),
    TaskContract("<CAPTION_TO_PHRASE_GROUNDING>", Takes.TEXT, Form.BOXES),
    TaskContract("<OPEN_VOCABULARY_DETECTION>", Takes.TEXT, Form.BOXES_OR_POLYGONS),
    TaskContract("<REFERRING_EXPRESSION_SEGMENTATION>", Takes.TEXT, Form.POLYGONS),
    TaskContract("<REGION_TO_SEGMENTATION>", Takes.REGION, Form.POLYGONS),
    TaskContract("<REGION_TO_CATEGORY>", Takes.REGION, Form.TEXT),
    TaskContract("<REGION_TO_DESCRIPTION>", Takes.REGION, Form.TEXT),
    TaskContract("<OCR>", Takes.NOTHING, Form.TEXT),
    TaskContract("<OCR_WITH_REGION>", Takes.NOTHING, Form.QUADS),
    TaskContract("<REGION_TO_OCR>", Takes.REGION, Form.TEXT),
)


# The list and its labels, for each form that is an object.
_LISTS: dict[Form, tuple[tuple[str, str], ...]] = {
    Form.BOXES: (("bboxes", "labels"),),
    Form.QUADS: (("quad_boxes", "labels"),),
    Form.POLYGONS: (("polygons", "labels"),),
    Form.BOXES_OR_POLYGONS: (("bboxes", "bboxes_labels"), ("polygons", "polygons_labels")),
}


def assert_answer(task: TaskContract, answer: Any, size: tuple[int, int]) -> None:
    """Asserts that `answer`, a parsed ``PARSED_JSON`` element, has the form that `task` promises.

    Args:
        task: The task that was asked.
        answer: The element, parsed from JSON.
        size: Width and height of the picture as sent, in pixels.
    """
    assert isinstance(answer, dict), f"{task.prompt}: {answer!r}"
    assert set(answer) == {task.prompt}, f"{task.prompt}: {answer!r}"
    value = answer[task.prompt]
    if task.form is Form.TEXT:
        assert isinstance(value, str), f"{task.prompt}: {value!r}"
        return
    assert isinstance(value, dict), f"{task.prompt}: {value!r}"
    assert set(value) == {key for pair in _LISTS[task.form] for key in pair}, f"{task.prompt}: {value!r}"
    for places_key, labels_key in _LISTS[task.form]:
        places, labels = value[places_key], value[labels_key]
        assert isinstance(places, list)
        assert isinstance(labels, list)
        assert len(places) == len(labels), f"{task.prompt}: {len(places)} {places_key}, {len(labels)} {labels_key}"
        assert all(isinstance(label, str) for label in labels)
        for place in places:
            _assert_place(places_key, place, size)


def _assert_place(key: str, place: Any, size: tuple[int, int]) -> None:
    assert isinstance(place, list)
    if key == "polygons":  # an instance is a list of polygons, each a flat list x1, y1, x2, y2, ...
        assert place, "an instance without polygons"
        for polygon in place:
            assert isinstance(polygon, list), f"{polygon!r}"
            assert len(polygon) % 2 == 0, f"half a point in {polygon!r}"
            _assert_within(polygon, size)
    else:
        assert len(place) == (4 if key == "bboxes" else 8), f"{key}: {place!r}"
        _assert_within(place, size)


def _assert_within(flat: list[Any], size: tuple[int, int]) -> None:
    for position, value in enumerate(flat):
        assert type(value) is int, f"coordinate {value!r} is not an integer"
        assert 0 <= value <= size[position % 2], f"coordinate {value} of {flat} is outside of {size}"
