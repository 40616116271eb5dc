"""Scores: perfect answers get the best, broken ones less."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny import evaluate as ev
from florence2_kserve.tiny.scenes import HELD_OUT_SEED, held_out_scene

MAIN = {
    task: names[0]
    for names, tasks in {
        ("exact",): ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>", "<OCR>", "<REGION_TO_OCR>"),
        ("exact", ""): ("<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>"),
        ("f1",): ("<OD>", "<DENSE_REGION_CAPTION>", "<OCR_WITH_REGION>"),
        ("recall",): ("<REGION_PROPOSAL>",),
        ("accuracy",): ("<CAPTION_TO_PHRASE_GROUNDING>", "<OPEN_VOCABULARY_DETECTION>"),
        ("mean_iou",): ("<REFERRING_EXPRESSION_SEGMENTATION>", "<REGION_TO_SEGMENTATION>"),
    }.items()
    for task in tasks
}


class Oracle:
    """Answers from the truth, changed by `spoil`."""

    def __init__(self, spoil: Any = lambda answer: answer) -> None:
        self.spoil, self.calls = spoil, 0
        self.truths: dict[tuple[str, bytes, str], Any] = {}
        for index in range(12):
            scene = held_out_scene(index)
            for task in TASKS:
                if example := scene.truth(task, random.Random(HELD_OUT_SEED + index)):
                    self.truths[task, scene.image.tobytes(), example.text] = example.answer

    def __call__(self, images: Sequence[np.ndarray], tasks: Sequence[str], texts: Sequence[str]) -> list[Any]:
        self.calls += 1
        return [
            self.spoil(self.truths[task, image.tobytes(), text])
            for image, task, text in zip(images, tasks, texts, strict=True)
        ]


def test_truth_scores_best() -> None:
    scores = ev.evaluate(Oracle(), scenes=12, batch_size=5)
    assert set(scores) == set(TASKS)
    for task, values in scores.items():
        assert values[MAIN[task]] == pytest.approx(1.0), task
        assert values.get("character_error", 0.0) == 0.0
    assert scores["<CAPTION>"]["scenes"] == 12


@pytest.mark.parametrize("broken", [None, "", {}, {"bboxes": 3}, [1, 2]])
def test_wrong_forms_score_as_empty(broken: Any) -> None:
    scores = ev.evaluate(Oracle(lambda answer: broken), scenes=12, batch_size=12)
    for task, values in scores.items():
        # Scenes without words ask for an empty answer, so an empty one is right there.
        assert values[MAIN[task]] <= (0.75 if task in ("<OCR>", "<OCR_WITH_REGION>") else 0.0), task


def test_moved_boxes_are_not_found() -> None:
    def move(answer: Any) -> Any:
        return {**answer, "bboxes": [[value + 30 for value in box] for box in answer["bboxes"]]}

    scores = ev.evaluate(Oracle(move), scenes=12, tasks=["<OD>", "<REGION_PROPOSAL>"])
    assert scores["<OD>"]["f1"] < 0.4
    assert scores["<REGION_PROPOSAL>"]["recall"] < 0.4


def test_spare_boxes_cost_precision_only() -> None:
    def add(answer: Any) -> Any:
        return {"bboxes": answer["bboxes"] * 2, "labels": answer["labels"] * 2}

    scores = ev.evaluate(Oracle(add), scenes=12, tasks=["<OD>"])["<OD>"]
    assert scores["recall"] == 1.0
    assert scores["precision"] == pytest.approx(0.5)


def test_boxes_match_one_to_one_best_first() -> None:
    true = [("a", (0, 0, 10, 10)), ("a", (0, 0, 10, 14))]
    assert ev.matches(true, [("a", (0, 0, 10, 13))], 0.5) == 1
    assert ev.matches(true, [("b", (0, 0, 10, 10))], 0.5) == 0
    assert ev.matches(true, [("a", (0, 0, 10, 10)), ("a", (0, 0, 10, 13))], 0.5) == 2


def test_overlap_and_edit_distance() -> None:
    assert ev.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert ev.overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0
    assert ev.edit_distance("KITTEN", "SITTING") == 3
    assert ev.edit_distance("", "AB") == 2


def test_half_a_square_is_half_a_mask() -> None:
    square, half = [10.0, 10, 49, 10, 49, 49, 10, 49], [10.0, 10, 49, 10, 49, 29, 10, 29]
    assert ev.polygon_overlap([square], [half]) == pytest.approx(0.5)


def test_scores_go_between_the_markers(tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    card.write_text(f"before\n{ev.SCORES_BEGIN}\nold\n{ev.SCORES_END}\nafter\n")
    ev.write_scores(card, {"<OD>": {"f1": 0.5, "scenes": 3.0}})
    text = card.read_text()
    assert "old" not in text
    assert "| `<OD>` | F1 of label and box at IoU 0.5 **0.50** | 3 |" in text
    assert text.startswith("before\n")
    assert text.endswith(f"{ev.SCORES_END}\nafter\n")
    card.write_text("no markers")
    with pytest.raises(ValueError, match="lacks"):
        ev.write_scores(card, {})
