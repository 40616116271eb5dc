"""The contract as data: tensor names, the 15 tasks, and the form of each task's outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco

IMAGE, TASK, TEXT = "INPUT_IMAGE", "TASK_PROMPT", "TEXT_PROMPT"
PARSED, GENERATED, SCORES, MASKS, FINISH = "PARSED_JSON", "GENERATED_TEXT", "SCORES", "MASKS", "FINISH_REASON"
INPUTS = (IMAGE, TASK, TEXT)
OUTPUTS = (PARSED, GENERATED, SCORES, MASKS, FINISH)
JSON_OUTPUTS = (PARSED, SCORES, MASKS)


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


def assert_scores(task: TaskContract, scores: Any, answer: Any) -> None:
    """Asserts that `scores`, a parsed ``SCORES`` element, has the form that `task` promises.

    Args:
        task: The task that was asked.
        scores: The element, parsed from JSON.
        answer: The row's ``PARSED_JSON`` element, parsed from JSON.
    """
    assert set(scores) == {task.prompt}, f"{task.prompt}: {scores!r}"
    given, parsed = scores[task.prompt], answer[task.prompt]
    lists = set() if task.form is Form.TEXT else set(parsed)
    assert set(given) == {"sequence"} | (lists or {"text"}), f"{task.prompt}: {given!r}"
    sequence = given["sequence"]
    assert isinstance(sequence, int | float), f"{task.prompt}: {sequence!r}"
    assert math.isfinite(sequence), f"{task.prompt}: {sequence!r}"
    assert sequence <= 0, f"{task.prompt}: a log-probability of {sequence}"
    if not lists:
        _assert_probability(given["text"])
    for key in lists:
        assert len(given[key]) == len(parsed[key]), f"{task.prompt}: {key} {given[key]!r} of {parsed[key]!r}"
        for value in given[key]:
            _assert_probability(value)


def _assert_probability(value: Any) -> None:
    assert type(value) in (int, float), f"{value!r}"
    assert 0 <= value <= 1, f"{value!r} is no probability"


def assert_masks(task: TaskContract, masks: Any, answer: Any, size: tuple[int, int]) -> None:
    """Asserts that `masks`, a parsed ``MASKS`` element, covers what the answer's polygons cover.

    Args:
        task: The task that was asked.
        masks: The element, parsed from JSON.
        answer: The row's ``PARSED_JSON`` element, parsed from JSON.
        size: Width and height of the picture as shown, in pixels.
    """
    assert set(masks) == {task.prompt}, f"{task.prompt}: {masks!r}"
    given, parsed = masks[task.prompt], answer[task.prompt]
    assert set(given) == {"masks", "labels"}, f"{task.prompt}: {given!r}"
    has_polygons = task.form in (Form.POLYGONS, Form.BOXES_OR_POLYGONS)
    instances = parsed["polygons"] if has_polygons else []
    labels = parsed["labels" if task.form is Form.POLYGONS else "polygons_labels"] if has_polygons else []
    assert given["labels"] == labels, f"{task.prompt}: {given['labels']!r}, not {labels!r}"
    assert len(given["masks"]) == len(instances), f"{task.prompt}: {len(given['masks'])} masks of {len(instances)}"
    for mask, polygons in zip(given["masks"], instances, strict=True):
        _assert_mask(mask, polygons, size)


def _assert_mask(mask: Any, polygons: list[list[int]], size: tuple[int, int]) -> None:
    width, height = size
    assert set(mask) == {"size", "counts"}, f"{mask!r}"
    assert mask["size"] == [height, width], f"{mask['size']} is not the picture's [h, w], {[height, width]}"
    assert isinstance(mask["counts"], str), f"{mask['counts']!r}"
    pixels = coco.decode({"size": mask["size"], "counts": mask["counts"].encode()})
    assert pixels.shape == (height, width)
    drawn = Image.new("1", size)
    for polygon in polygons:
        if len(polygon) >= 6:
            ImageDraw.Draw(drawn).polygon(polygon, fill=1)
    # Which of the pixels on the line belong to the area is a matter of taste.
    on_the_line = sum(_length(polygon) for polygon in polygons) + 4
    differing = int(np.count_nonzero(pixels.astype(bool) != np.asarray(drawn)))
    assert differing <= on_the_line, f"{differing} pixels differ, of {pixels.sum()}; the polygons are {polygons}"


def _length(polygon: list[int]) -> float:
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    return sum(math.dist(start, end) for start, end in zip(points, [*points[1:], *points[:1]], strict=True))
