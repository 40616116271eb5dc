"""Scenes: what they say is what they show."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from florence2_kserve.tasks import TASKS, TaskInput
from florence2_kserve.tiny import scenes
from florence2_kserve.tiny.scenes import COLORS, MAX_NOISE, SIDE, Scene, draw_scene, held_out_scene, location_tokens


@pytest.fixture(scope="module")
def some_scenes() -> list[Scene]:
    return [draw_scene(seed, words=(0, 2)) for seed in range(60)]


def test_same_seed_gives_the_same_scene() -> None:
    first, second = draw_scene(7), draw_scene(7)
    assert np.array_equal(first.image, second.image)
    assert first.objects == second.objects
    assert first.words == second.words
    assert not np.array_equal(first.image, draw_scene(8).image)


def test_held_out_scenes_have_seeds_of_their_own() -> None:
    assert np.array_equal(held_out_scene(3).image, draw_scene(scenes.HELD_OUT_SEED + 3).image)


def test_polygons_hold_their_objects_colour(some_scenes: list[Scene]) -> None:
    for scene in some_scenes:
        for item in scene.objects:
            canvas = Image.new("1", (SIDE, SIDE))
            ImageDraw.Draw(canvas).polygon(item.polygon, fill=1)
            inside = scene.image[np.asarray(canvas)].astype(int)
            assert len(inside) > 50
            assert np.abs(inside - COLORS[item.color]).max() <= MAX_NOISE


def test_boxes_bound_what_is_drawn(some_scenes: list[Scene]) -> None:
    for scene in some_scenes:
        background = np.array(scenes.BACKGROUNDS[scene.background])
        ink = (np.abs(scene.image.astype(int) - background) > MAX_NOISE).any(-1)
        # A font's box may leave some room beside the first and the last character.
        boxes = [(item.box, 1.5) for item in scene.objects] + [(word.box, 4.0) for word in scene.words]
        for (x1, y1, x2, y2), slack in boxes:
            window = (slice(int(y1), int(y2) + 2), slice(int(x1), int(x2) + 2))
            rows, columns = np.nonzero(ink[window])
            found = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) + [int(x1), int(y1)] * 2
            assert np.abs(found - [x1, y1, x2, y2]).max() <= slack
            ink[window] = False
        assert not ink.any(), "something is drawn that no box holds"


def test_polygons_start_at_the_top_and_go_clockwise(some_scenes: list[Scene]) -> None:
    for scene in some_scenes:
        for item in scene.objects:
            xs, ys = np.array(item.polygon).T
            assert ys[0] == pytest.approx(ys.min())
            # The shoelace sum is positive for clockwise outlines, since y points down.
            assert np.sum(xs * np.roll(ys, -1) - np.roll(xs, -1) * ys) > 0


def test_quads_go_clockwise_around_the_word() -> None:
    word = next(word for seed in range(20) for word in draw_scene(seed, words=(1, 1)).words)
    x1, y1, x2, y2 = word.box
    assert word.quad == (x1, y1, x2, y1, x2, y2, x1, y2)
    assert len(word.spans) == len(word.text)
    assert all(x1 - 2 <= left < right <= x2 + 3 for left, right in word.spans)


@pytest.mark.parametrize("task", list(TASKS))
def test_answers_agree_with_targets(task: str, some_scenes: list[Scene]) -> None:
    asked = [example for scene in some_scenes if (example := scene.truth(task, random.Random(1)))]
    assert len(asked) > 20
    for example in asked:
        assert bool(example.text) is (TASKS[task].takes is not TaskInput.NONE)
        if isinstance(example.answer, str):
            assert example.target == example.answer
            continue
        flat: list[float] = []
        for name in ("bboxes", "quad_boxes"):
            for box in example.answer.get(name, []):
                flat += box
        for group in example.answer.get("polygons", []):
            flat += group[0]
        assert "".join(re.findall(r"<loc_\d+>", example.target)) == location_tokens(flat)


def test_locations_are_bins_of_a_thousandth() -> None:
    assert location_tokens([0, SIDE / 2, SIDE - 0.001, SIDE, -1]) == "<loc_0><loc_500><loc_999><loc_999><loc_0>"


def test_tasks_about_words_have_nothing_to_ask_without_words() -> None:
    scene = draw_scene(1, words=(0, 0))
    assert scene.truth("<REGION_TO_OCR>") is None
    ocr = scene.truth("<OCR_WITH_REGION>")
    assert ocr is not None
    assert ocr.target == ""
    assert ocr.answer == {"quad_boxes": [], "labels": []}


def test_few_scenes_are_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = 0
    draw_once = scenes._draw_once

    def counting(*arguments: object) -> Scene:
        nonlocal draws
        draws += 1
        return draw_once(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scenes, "_draw_once", counting)
    for seed in range(200):
        draw_scene(seed)
    assert 200 < draws < 260
