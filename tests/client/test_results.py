"""Typed answers: read from the service's JSON, and given to other libraries."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from florence2_kserve.client import (
    Caption,
    Detection,
    Detections,
    DetectionsOrMasks,
    Masks,
    OcrRegion,
    OcrRegions,
    RowError,
    Segment,
    ServerError,
    read_answer,
)
from florence2_kserve.tasks import TASKS, AnswerKind

WIDTH, HEIGHT = 40, 30
SQUARE, CORNER = [10, 5, 20, 5, 20, 15, 10, 15], [0, 0, 6, 0, 0, 6]


def run_lengths(*polygons: list[int]) -> dict[str, object]:
    runs = coco_mask.merge(coco_mask.frPyObjects([list(polygon) for polygon in polygons], HEIGHT, WIDTH))
    return {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()}


def caption() -> Caption:
    return read_answer(
        "<CAPTION>", {"<CAPTION>": "a cat"}, {"<CAPTION>": {"sequence": -0.3, "text": 0.8}}, finish_reason="stop"
    )


def detections() -> Detections:
    value = {"bboxes": [[1, 2, 11, 22], [3, 4, 5, 6], [0, 0, 9, 9]], "labels": ["cat", "dog", "cat"]}
    scores = {"sequence": -0.2, "bboxes": [0.5, 0.25, 1.0], "labels": [0.5, 1.0, 0.75]}
    return read_answer("od", {"<OD>": value}, {"<OD>": scores}, {"<OD>": {"masks": [], "labels": []}}, "length")


def ocr_regions() -> OcrRegions:
    value = {"quad_boxes": [[2, 1, 12, 3, 11, 8, 1, 6], [0, 20, 9, 20, 9, 25, 0, 25]], "labels": ["EXIT", "$5 or $6"]}
    scores = {"sequence": -0.1, "quad_boxes": [0.5, 1.0], "labels": [1.0, 0.5]}
    return read_answer("<OCR_WITH_REGION>", {"<OCR_WITH_REGION>": value}, {"<OCR_WITH_REGION>": scores})


def areas(with_masks: bool = True) -> Masks:
    task = "<REFERRING_EXPRESSION_SEGMENTATION>"
    value = {"polygons": [[SQUARE, CORNER], [[30, 20, 39, 20, 39, 29]]], "labels": ["", ""]}
    scores = {"sequence": -0.4, "polygons": [0.5, 0.25], "labels": [1.0, 1.0]}
    masks = {"masks": [run_lengths(SQUARE, CORNER), run_lengths([30, 20, 39, 20, 39, 29])], "labels": ["", ""]}
    return read_answer(task, {task: value}, {task: scores}, {task: masks} if with_masks else None, "stop")


def found(*, polygons: bool) -> DetectionsOrMasks:
    task = "<OPEN_VOCABULARY_DETECTION>"
    value = {"bboxes": [], "bboxes_labels": [], "polygons": [], "polygons_labels": []}
    scores = {"sequence": -0.4, "bboxes": [], "bboxes_labels": [], "polygons": [], "polygons_labels": []}
    masks = {"masks": [], "labels": []}
    if polygons:
        value |= {"polygons": [[SQUARE]], "polygons_labels": ["roof"]}
        scores |= {"polygons": [0.5], "polygons_labels": [0.5]}
        masks = {"masks": [run_lengths(SQUARE)], "labels": ["roof"]}
    else:
        value |= {"bboxes": [[1, 2, 3, 4]], "bboxes_labels": ["door"]}
        scores |= {"bboxes": [0.5], "bboxes_labels": [0.25]}
    return read_answer(task, {task: value}, {task: scores}, {task: masks}, "stop")


ALL = [caption, detections, ocr_regions, areas, lambda: found(polygons=True), lambda: found(polygons=False)]


def test_a_caption():
    answer = caption()
    assert (answer.text, str(answer), answer.score, answer.sequence_score) == ("a cat", "a cat", 0.8, -0.3)
    assert answer.raw == {"<CAPTION>": "a cat"}


def test_boxes_are_scored_with_their_labels():
    answer = detections()
    assert answer.task == "<OD>"
    assert answer.is_truncated
    assert list(answer) == [
        Detection((1, 2, 11, 22), "cat", 0.25),
        Detection((3, 4, 5, 6), "dog", 0.25),
        Detection((0, 0, 9, 9), "cat", 0.75),
    ]
    assert answer.scores == (0.25, 0.25, 0.75)
    assert answer.bboxes[1] == (3, 4, 5, 6)


def test_a_place_without_a_label_is_scored_alone():
    value = {"bboxes": [[1, 2, 3, 4]], "labels": [""]}
    # Whatever the server says of a label that isn't there.
    for label_score in (1.0, 0.5, None):
        scores = {"sequence": 0.0, "bboxes": [0.5], "labels": [label_score]}
        answer = read_answer("<REGION_PROPOSAL>", {"<REGION_PROPOSAL>": value}, {"<REGION_PROPOSAL>": scores})
        assert answer.scores == (0.5,)


def test_words_have_quadrangles_and_boxes_around_them():
    first, second = ocr_regions()
    assert first == OcrRegion((2, 1, 12, 3, 11, 8, 1, 6), "EXIT", 0.5)
    assert first.box == (1, 1, 12, 8)
    assert second.score == 0.5


def test_areas_have_polygons_and_masks():
    first, second = areas()
    assert first.polygons == (tuple(SQUARE), tuple(CORNER))
    assert first.box == (0, 0, 20, 15)
    assert (first.score, second.score) == (0.5, 0.25)
    mask = first.run_lengths.decode()
    assert (mask.shape, mask.dtype) == ((HEIGHT, WIDTH), bool)
    assert mask[10, 15]
    assert mask[1, 1]
    assert not mask[25, 35]
    np.testing.assert_array_equal(next(iter(areas(with_masks=False))).decode_mask((WIDTH, HEIGHT)), mask)


@pytest.mark.parametrize(
    ("polygons", "box"),
    [((), (0, 0, 0, 0)), (((),), (0, 0, 0, 0)), (((3, 4),), (3, 4, 3, 4)), (((5, 2, 3, 4),), (3, 2, 5, 4))],
)
def test_polygons_without_an_area_are_no_obstacle(polygons, box):
    area = Segment(polygons, "")
    assert area.box == box
    assert not area.decode_mask((WIDTH, HEIGHT)).any()


def test_named_things_are_found_as_boxes_or_areas():
    (door,) = found(polygons=False)
    assert door == Detection((1, 2, 3, 4), "door", 0.125)
    (roof,) = found(polygons=True)
    assert isinstance(roof, Segment)
    assert (roof.label, roof.score) == ("roof", 0.25)


def test_without_scores_and_masks_they_are_unknown():
    value = {"polygons": [[SQUARE]], "labels": [""]}
    answer = read_answer("<REGION_TO_SEGMENTATION>", {"<REGION_TO_SEGMENTATION>": value})
    assert (answer.scores, answer.masks, answer.sequence_score, answer.finish_reason) == (None, None, None, None)
    (area,) = answer
    assert (area.score, area.run_lengths) == (None, None)


def test_every_kind_of_answer_has_a_class():
    values = {
        AnswerKind.TEXT: "",
        AnswerKind.QUADS: {"quad_boxes": [], "labels": []},
        AnswerKind.POLYGONS: {"polygons": [], "labels": []},
        AnswerKind.BOXES_OR_POLYGONS: {"bboxes": [], "bboxes_labels": [], "polygons": [], "polygons_labels": []},
    }
    boxes = {"bboxes": [], "labels": []}
    for task in TASKS.values():
        value = values.get(task.answer, boxes)
        assert read_answer(task.name, {task.name: value}).value == value


@pytest.mark.parametrize("make", ALL)
def test_answers_are_frozen_and_can_be_written_down(make):
    answer = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.task = "<OCR>"
    assert answer == make()
    assert hash(answer) == hash(make())
    written = answer.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert written["value"] == answer.value


def test_a_row_that_failed_is_an_error():
    element = {"error": {"status": 400, "message": "INPUT_IMAGE, row 1: is empty"}}
    with pytest.raises(RowError, match="INPUT_IMAGE, row 1: is empty") as caught:
        read_answer("<OD>", element, element, element, "error")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("parsed", "scores", "masks"),
    [
        ({}, None, None),
        ({"<OD>": "a text"}, None, None),
        ({"<OD>": {"bboxes": [[1, 2, 3, 4]], "labels": []}}, None, None),
        ({"<OD>": {"bboxes": [[1, 2, 3, 4]], "labels": ["cat"]}}, {"<OD>": {"bboxes": [], "labels": []}}, None),
        (
            {"<OD>": {"bboxes": [[1, 2, 3, 4]], "labels": ["cat"]}},
            {"<OD>": {"sequence": 0, "bboxes": [], "labels": []}},
            None,
        ),
    ],
)
def test_an_answer_of_another_shape_is_the_servers_fault(parsed, scores, masks):
    with pytest.raises(ServerError, match="can't be read"):
        read_answer("<OD>", parsed, scores, masks)


def test_masks_that_belong_to_no_polygon_are_the_servers_fault():
    task = "<REGION_TO_SEGMENTATION>"
    with pytest.raises(ServerError, match="1 areas and 0 masks"):
        read_answer(task, {task: {"polygons": [[SQUARE]], "labels": [""]}}, None, {task: {"masks": [], "labels": []}})


def test_a_task_of_a_newer_server_is_told_apart():
    with pytest.raises(ServerError, match="doesn't know the task '<NEW>'"):
        read_answer("<NEW>", {"<NEW>": "?"})


# --- COCO ------------------------------------------------------------------------------------------------------------


def load(results: list[dict[str, object]], categories: list[dict[str, object]]) -> COCO:
    """Lets pycocotools read results, as whoever scores them does."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 7, "width": WIDTH, "height": HEIGHT}],
        "annotations": [],
        "categories": categories,
    }
    with redirect_stdout(StringIO()):
        truth.createIndex()
        return truth.loadRes(results)


def test_boxes_become_coco_results():
    results = detections().to_coco(7, {"cat": 17, "person": 1})
    assert results == [
        {"image_id": 7, "category_id": 17, "bbox": [1, 2, 10, 20], "score": 0.25},
        {"image_id": 7, "category_id": 17, "bbox": [0, 0, 9, 9], "score": 0.75},
    ]
    loaded = load(results, [{"id": 17, "name": "cat"}])
    assert [annotation["area"] for annotation in loaded.anns.values()] == [200, 81]


def test_without_a_mapping_labels_are_numbered():
    assert [result["category_id"] for result in detections().to_coco("street.jpg")] == [1, 2, 1]


def test_masks_become_coco_results():
    results = areas().to_coco(7, {"": 3})
    loaded = load(json.loads(json.dumps(results)), [{"id": 3, "name": "thing"}])
    first, second = areas()
    np.testing.assert_array_equal(loaded.annToMask(loaded.anns[1]), first.decode_mask(None))
    np.testing.assert_array_equal(loaded.annToMask(loaded.anns[2]), second.decode_mask(None))
    assert results[0]["bbox"] == [0, 0, 20, 15]


def test_polygons_without_masks_become_coco_results():
    loaded = load(areas(with_masks=False).to_coco(7), [{"id": 1, "name": "thing"}])
    np.testing.assert_array_equal(loaded.annToMask(loaded.anns[1]), next(iter(areas())).decode_mask(None))


def test_read_texts_are_of_one_category():
    results = ocr_regions().to_coco(7, {"text": 9})
    assert [(result["category_id"], result["text"]) for result in results] == [(9, "EXIT"), (9, "$5 or $6")]
    assert results[0]["bbox"] == [1, 1, 11, 7]
    assert results[0]["segmentation"] == [[2, 1, 12, 3, 11, 8, 1, 6]]
    assert len(load(results, [{"id": 9, "name": "text"}]).anns) == 2


def test_captions_become_coco_results():
    results = caption().to_coco(7)
    assert results == [{"image_id": 7, "caption": "a cat"}]
    assert load(results, []).anns[1]["caption"] == "a cat"


def test_unknown_scores_count_as_one():
    answer = read_answer("<OD>", {"<OD>": {"bboxes": [[1, 2, 3, 4]], "labels": ["cat"]}})
    assert answer.to_coco(7)[0]["score"] == 1.0


# --- supervision and pandas ------------------------------------------------------------------------------------------


def test_boxes_become_supervisions_detections():
    converted = detections().to_supervision()
    np.testing.assert_array_equal(converted.xyxy, [[1, 2, 11, 22], [3, 4, 5, 6], [0, 0, 9, 9]])
    np.testing.assert_allclose(converted.confidence, [0.25, 0.25, 0.75])
    np.testing.assert_array_equal(converted.class_id, [0, 1, 0])
    np.testing.assert_array_equal(converted["class_name"], ["cat", "dog", "cat"])
    assert converted.mask is None
    assert len(converted[converted.class_id == 0]) == 2


def test_masks_become_supervisions_masks():
    converted = areas().to_supervision()
    assert (converted.mask.shape, converted.mask.dtype) == ((2, HEIGHT, WIDTH), bool)
    np.testing.assert_array_equal(areas(with_masks=False).to_supervision((WIDTH, HEIGHT)).mask, converted.mask)
    assert areas(with_masks=False).to_supervision().mask is None


def test_quadrangles_become_supervisions_oriented_boxes():
    converted = ocr_regions().to_supervision()
    np.testing.assert_array_equal(converted.xyxy[0], [1, 1, 12, 8])
    np.testing.assert_array_equal(converted["xyxyxyxy"][0], [[2, 1], [12, 3], [11, 8], [1, 6]])


@pytest.mark.parametrize("polygons", [True, False])
def test_found_things_become_supervisions_detections(polygons):
    converted = found(polygons=polygons).to_supervision()
    assert len(converted) == 1
    assert (converted.mask is not None) == polygons


def test_no_items_become_no_detections():
    converted = read_answer("<OD>", {"<OD>": {"bboxes": [], "labels": []}}).to_supervision()
    assert len(converted) == 0
    assert converted.xyxy.shape == (0, 4)


def test_items_become_rows():
    frame = detections().to_pandas()
    assert list(frame.columns) == ["x1", "y1", "x2", "y2", "label", "score"]
    assert frame.to_dict("records")[1] == {"x1": 3, "y1": 4, "x2": 5, "y2": 6, "label": "dog", "score": 0.25}
    assert frame.groupby("label").score.max()["cat"] == 0.75


def test_rows_hold_quadrangles_and_polygons():
    assert ocr_regions().to_pandas().quad[0] == [2, 1, 12, 3, 11, 8, 1, 6]
    assert areas().to_pandas().polygons[0] == [SQUARE, CORNER]
    assert found(polygons=True).to_pandas().polygons[0] == [SQUARE]
    assert caption().to_pandas().to_dict("records") == [{"text": "a cat", "score": 0.8}]


def test_no_items_are_no_rows():
    frame = read_answer("<OD>", {"<OD>": {"bboxes": [], "labels": []}}).to_pandas()
    assert (len(frame), list(frame.columns)) == (0, ["x1", "y1", "x2", "y2", "label", "score"])


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("supervision", "supervision", "to_supervision()"),
        ("pandas", "pandas", "to_pandas()"),
        ("matplotlib", "plot", "plot(b'')"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(module, extra, call):
    code = f"""
import sys
sys.modules[{module!r}] = None
from florence2_kserve.client import read_answer
answer = read_answer("<OD>", {{"<OD>": {{"bboxes": [], "labels": []}}}})
try:
    answer.{call}
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"this needs {module}: pip install 'florence2-kserve[{extra}]'\n"


def test_the_client_starts_without_what_conversions_need():
    late = {"pandas", "matplotlib", "supervision", "pycocotools"}
    code = f"import sys, florence2_kserve.client; print({late} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "set()\n"
