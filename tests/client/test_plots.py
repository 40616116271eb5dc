"""Answers drawn onto pictures."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from florence2_kserve.client import read_answer
from tests.client.pictures import png
from tests.client.test_results import SQUARE, areas, caption, detections, found, ocr_regions

BLANK = np.full((30, 40, 3), 128, dtype=np.uint8)


def outlines(ax) -> list[list[list[float]]]:
    """Returns the corners of what is outlined."""
    return [patch.get_xy()[:-1].tolist() for patch in ax.patches if not patch.get_fill()]


def words(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_boxes_are_outlined_and_labelled():
    ax = detections().plot(BLANK)
    assert outlines(ax)[0] == [[1, 2], [11, 2], [11, 22], [1, 22]]
    assert words(ax) == ["cat 0.25", "dog 0.25", "cat 0.75"]
    assert not [patch for patch in ax.patches if patch.get_fill()]


def test_labels_have_colours_of_their_own():
    ax = detections().plot(BLANK)
    cat, dog, other_cat = [patch.get_edgecolor() for patch in ax.patches]
    assert cat == other_cat != dog
    value = {"bboxes": [[1, 2, 3, 4]] * 30, "labels": [str(number) for number in range(30)]}
    many = read_answer("<OD>", {"<OD>": value}).plot(BLANK)
    assert len({patch.get_edgecolor() for patch in many.patches}) == 30


def test_areas_are_filled_and_let_the_picture_through():
    ax = areas().plot(BLANK)
    filled = [patch for patch in ax.patches if patch.get_fill()]
    assert len(filled) == len(outlines(ax)) == 3
    assert all(0 < patch.get_facecolor()[3] < 1 for patch in filled)
    assert [SQUARE[:2], SQUARE[2:4], SQUARE[4:6], SQUARE[6:]] in outlines(ax)
    assert words(ax) == ["0.50", "0.25"]


def test_words_stand_at_their_quadrangles():
    ax = ocr_regions().plot(BLANK)
    assert outlines(ax)[0] == [[2, 1], [12, 3], [11, 8], [1, 6]]
    assert words(ax) == ["EXIT 0.50", "$5 or $6 0.50"]


def test_dollar_signs_make_no_formula():
    """One that TeX can't read would raise."""
    value = {"bboxes": [[1, 2, 11, 22]], "labels": [r"$\frac$"]}
    read_answer("<OD>", {"<OD>": value}).plot(BLANK).figure.canvas.draw()
    read_answer("<CAPTION>", {"<CAPTION>": r"$\frac$"}).plot(BLANK).figure.canvas.draw()


@pytest.mark.parametrize("polygons", [True, False])
def test_found_things_are_drawn(polygons):
    assert len(outlines(found(polygons=polygons).plot(BLANK))) == 1


def test_a_caption_is_the_title():
    ax = caption().plot(BLANK)
    assert ax.get_title() == "a cat"
    long = read_answer("<CAPTION>", {"<CAPTION>": "word " * 100}).plot(BLANK)
    assert len(long.get_title().splitlines()) > 3
    title = long.title.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= long.figure.bbox.width
    assert title.y1 <= long.figure.bbox.height


def test_labels_lie_within_the_picture_and_apart():
    value = {
        "bboxes": [[0, 0, 380, 280], [2, 2, 100, 100], [300, 2, 400, 100], [320, 250, 400, 300], [2, 2, 60, 60]],
        "labels": ["a very large thing", "thing", "a thing at the right edge", "low thing", "small thing"],
    }
    ax = read_answer("<OD>", {"<OD>": value}).plot(np.zeros((300, 400, 3), dtype=np.uint8))
    boxes = [text.get_window_extent().transformed(ax.transData.inverted()) for text in ax.texts]
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= 400
        assert 0 <= min(box.y0, box.y1) < max(box.y0, box.y1) <= 300
        assert not any(box.overlaps(other) for other in boxes[:index])


@pytest.mark.parametrize("polygons", [[[]], [[3, 4]], [[1, 2, 30, 25]]])
def test_polygons_without_an_area_are_drawn_as_points(polygons):
    task = "<REGION_TO_SEGMENTATION>"
    ax = read_answer(task, {task: {"polygons": [polygons], "labels": [""]}}).plot(BLANK)
    assert [len(line.get_xdata()) for line in ax.lines] == [len(polygons[0]) // 2]
    ax.figure.canvas.draw()


def test_pictures_come_in_many_forms(tmp_path):
    path = tmp_path / "scene.png"
    path.write_bytes(png())
    image = Image.open(path)
    pictures = [path, str(path), png(), image, np.asarray(image), image.convert("L"), image.convert("RGBA")]
    shown = [caption().plot(picture).images[0].get_array() for picture in pictures]
    for pixels in (*shown[:5], shown[6]):
        np.testing.assert_array_equal(pixels, shown[0])
    assert shown[5].shape == shown[0].shape


def test_a_picture_is_turned_as_the_service_turns_it():
    """Stored lying, by its EXIF orientation upright: its left edge is up."""
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, :10] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    for picture in (buffer.getvalue(), Image.open(buffer)):
        ax = detections().plot(picture)
        shown = ax.images[0].get_array()
        assert shown.shape == (60, 20, 3)
        assert shown[5, 10].tolist() == [255, 0, 0]
        assert (ax.get_xlim(), ax.get_ylim()) == ((0, 20), (60, 0))


def test_axes_of_ones_own_are_drawn_into():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert detections().plot(BLANK, left) is left
    assert caption().plot(BLANK, ax=right) is right
    assert left.patches
    assert right.get_title() == "a cat"


def test_no_display_is_needed_and_no_backend_chosen():
    code = """
import sys
import numpy as np
from florence2_kserve.client import read_answer
answer = read_answer("<OD>", {"<OD>": {"bboxes": [[1, 2, 3, 4]], "labels": ["cat"]}})
answer.plot(np.zeros((30, 40, 3), dtype=np.uint8)).figure.savefig(sys.stdout.buffer)
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {"MPLBACKEND": "TkAgg"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True, env=environment)
    assert result.stdout.startswith(b"\x89PNG")
