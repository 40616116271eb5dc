"""Scores answers to held-out scenes, whoever gives them: the running service or transformers' own generate().

Each task has one main score in [0, 1] (for character errors, 0 is best) and may
have others beside it. Matching is one to one: of each label, the pairs of boxes
that overlap most are matched first.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.scenes import HELD_OUT_SEED, SIDE, Example, held_out_scene

# Answers one task on each image: (RGB uint8 [H, W, 3] images, task names, texts) -> the answers' values.
Infer = Callable[[Sequence[np.ndarray], Sequence[str], Sequence[str]], Sequence[Any]]

OVERLAP = 0.5  # intersection over union from which a box counts as found
SCORES_BEGIN, SCORES_END = "<!-- scores:begin -->", "<!-- scores:end -->"

Scores = dict[str, dict[str, float]]


def evaluate(
    infer: Infer,
    *,
    scenes: int = 500,
    batch_size: int = 16,
    tasks: Sequence[str] = tuple(TASKS),
    progress: Callable[[str], None] | None = None,
) -> Scores:
    """Asks `tasks` of held-out scenes and scores the answers.

    Args:
        infer: Who answers.
        scenes: How many held-out scenes, from the first on.
        batch_size: Images a call; all of a call have the same task.
        tasks: Task names.
        progress: Called with each task's name before it starts.

    Returns:
        For each task its scores by name, averaged over the scenes that have something to
        ask about, and their number as ``scenes``.
    """
    drawn = [held_out_scene(index) for index in range(scenes)]
    result: Scores = {}
    for task in tasks:
        if progress:
            progress(task)
        asked = []
        for index, scene in enumerate(drawn):
            if example := scene.truth(task, random.Random(HELD_OUT_SEED + index)):
                asked.append((scene.image, example))
        answers: list[Any] = []
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            answers += infer([image for image, _ in part], [task] * len(part), [example.text for _, example in part])
        result[task] = score_task(task, [example for _, example in asked], answers)
    return result


def score_task(task: str, examples: Sequence[Example], answers: Sequence[Any]) -> dict[str, float]:
    """Scores the answers to one task.

    Args:
        task: Task name.
        examples: The questions with their true answers.
        answers: The answers' values, in the same order; one of a wrong form scores as empty.

    Returns:
        The mean scores and the number of ``scenes``.
    """
    scorer = _SCORERS[task]
    rows = [scorer(example.answer, answer) for example, answer in zip(examples, answers, strict=True)]
    totals: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            totals[name].append(value)
    return {name: float(np.mean(values)) for name, values in totals.items()} | {"scenes": float(len(rows))}


# --- measures --------------------------------------------------------------------------------------------------------


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Gives the intersection over union of two boxes (x1, y1, x2, y2)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - common
    return common / union if union > 0 else 0.0


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def matches(
    true: Sequence[tuple[str, Sequence[float]]], given: Sequence[tuple[str, Sequence[float]]], threshold: float
) -> int:
    """Counts labeled boxes found: same label and enough overlap, each box in one pair at most, best pairs first."""
    pairs = [
        (overlap(box, other), i, j)
        for i, (label, box) in enumerate(true)
        for j, (name, other) in enumerate(given)
        if label == name
    ]
    used_true: set[int] = set()
    used_given: set[int] = set()
    for share, i, j in sorted(pairs, reverse=True):
        if share >= threshold and i not in used_true and j not in used_given:
            used_true.add(i)
            used_given.add(j)
    return len(used_true)


def f1(found: int, true: int, given: int) -> float:
    """Gives the harmonic mean of precision and recall; 1 where nothing was to be found and nothing was given."""
    return 2 * found / (true + given) if true + given else 1.0


def edit_distance(first: str, second: str) -> int:
    """Counts the insertions, deletions and substitutions that turn one string into the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def polygon_overlap(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Gives the intersection over union of two sets of polygons (x, y, x, y, …), drawn as masks."""
    one, other = _mask(first), _mask(second)
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 0.0


def _mask(polygons: Sequence[Sequence[float]]) -> np.ndarray:
    canvas = Image.new("1", (SIDE, SIDE))
    for polygon in polygons:
        if len(polygon) >= 6:
            ImageDraw.Draw(canvas).polygon([float(value) for value in polygon], fill=1)
    return np.asarray(canvas)


# --- one scorer a kind of answer -------------------------------------------------------------------------------------


def _field(answer: Any, name: str) -> list[Any]:
    value = answer.get(name) if isinstance(answer, Mapping) else None
    return list(value) if isinstance(value, list | tuple) else []


def _labeled(answer: Any, boxes: str = "bboxes", labels: str = "labels") -> list[tuple[str, Sequence[float]]]:
    return list(zip(_field(answer, labels), _field(answer, boxes), strict=False))


def _exact(true: str, given: Any) -> dict[str, float]:
    return {"exact": float(given == true)}


def _reading(true: str, given: Any) -> dict[str, float]:
    """Scores read text; the character error rate is of scenes with text only."""
    text = given if isinstance(given, str) else ""
    error = {"character_error": min(1.0, edit_distance(true, text) / len(true))} if true else {}
    return {"exact": float(text == true), **error}


def _detection(true: Any, given: Any) -> dict[str, float]:
    wanted, found = _labeled(true), _labeled(given)
    hits = matches(wanted, found, OVERLAP)
    return {
        "f1": f1(hits, len(wanted), len(found)),
        "precision": hits / len(found) if found else float(not wanted),
        "recall": hits / len(wanted) if wanted else 1.0,
    }


def _proposal(true: Any, given: Any) -> dict[str, float]:
    wanted = [("", box) for box in _field(true, "bboxes")]
    found = [("", box) for box in _field(given, "bboxes")]
    hits = matches(wanted, found, OVERLAP)
    return {"recall": hits / len(wanted) if wanted else 1.0, "f1": f1(hits, len(wanted), len(found))}


def _grounding(true: Any, given: Any) -> dict[str, float]:
    wanted = _labeled(true)
    return {"accuracy": matches(wanted, _labeled(given), OVERLAP) / len(wanted)}


def _open_vocabulary(true: Any, given: Any) -> dict[str, float]:
    wanted = _labeled(true, labels="bboxes_labels")
    return {"accuracy": matches(wanted, _labeled(given, labels="bboxes_labels"), OVERLAP) / len(wanted)}


def _segmentation(true: Any, given: Any) -> dict[str, float]:
    def polygons(answer: Any) -> list[Any]:
        return [polygon for group in _field(answer, "polygons") for polygon in group]

    return {"mean_iou": polygon_overlap(polygons(true), polygons(given))}


def _placed_reading(true: Any, given: Any) -> dict[str, float]:
    """Scores words with places, by the boxes around their quads; empty scenes ask for an empty answer."""
    wanted, found = (_quads(answer) for answer in (true, given))
    hits = matches(wanted, found, OVERLAP)
    placed = matches([("", box) for _, box in wanted], [("", box) for _, box in found], OVERLAP)
    score = {"f1": f1(hits, len(wanted), len(found))}
    if wanted:
        score |= {"word_recall": hits / len(wanted), "box_recall": placed / len(wanted)}
    return score


def _quads(answer: Any) -> list[tuple[str, Sequence[float]]]:
    return [
        (label, (min(quad[0::2]), min(quad[1::2]), max(quad[0::2]), max(quad[1::2])))
        for label, quad in _labeled(answer, boxes="quad_boxes")
        if len(quad) == 8
    ]


_SCORERS: dict[str, Callable[[Any, Any], dict[str, float]]] = {
    "<CAPTION>": _exact,
    "<DETAILED_CAPTION>": _exact,
    "<MORE_DETAILED_CAPTION>": _exact,
    "<OD>": _detection,
    "<DENSE_REGION_CAPTION>": _detection,
    "<REGION_PROPOSAL>": _proposal,
    "<CAPTION_TO_PHRASE_GROUNDING>": _grounding,
    "<OPEN_VOCABULARY_DETECTION>": _open_vocabulary,
    "<REFERRING_EXPRESSION_SEGMENTATION>": _segmentation,
    "<REGION_TO_SEGMENTATION>": _segmentation,
    "<REGION_TO_CATEGORY>": _exact,
    "<REGION_TO_DESCRIPTION>": _exact,
    "<OCR>": _reading,
    "<OCR_WITH_REGION>": _placed_reading,
    "<REGION_TO_OCR>": _reading,
}

# --- the model card's table ------------------------------------------------------------------------------------------

_MEANING = {
    "exact": "whole answer right",
    "f1": "F1 of label and box at IoU 0.5",
    "precision": "precision",
    "recall": "recall at IoU 0.5",
    "accuracy": "phrases found at IoU 0.5",
    "mean_iou": "mean IoU of the masks",
    "character_error": "character error rate (0 is best)",
    "word_recall": "words with right text at IoU 0.5",
    "box_recall": "words' boxes at IoU 0.5, whatever the text",
}


def scores_table(scores: Scores) -> str:
    """Writes the scores as a Markdown table, one row a task."""
    lines = ["| task | scores | scenes |", "|---|---|---|"]
    for task, values in scores.items():
        shown = ", ".join(f"{_MEANING[name]} **{value:.2f}**" for name, value in values.items() if name != "scenes")
        lines.append(f"| `{task}` | {shown} | {values['scenes']:.0f} |")
    return "\n".join(lines) + "\n"


def write_scores(card: Path, scores: Scores) -> None:
    """Puts the table between the model card's markers.

    Raises:
        ValueError: If the card lacks the markers.
    """
    text = card.read_text()
    before, begin, rest = text.partition(SCORES_BEGIN)
    _, end, after = rest.partition(SCORES_END)
    if not begin or not end:
        raise ValueError(f"{card} lacks the lines {SCORES_BEGIN} and {SCORES_END}")
    card.write_text(f"{before}{begin}\n{scores_table(scores)}{end}{after}")
