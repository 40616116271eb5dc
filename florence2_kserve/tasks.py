"""The one registry of Florence-2's 15 tasks.

Everything that depends on the task (prompt, whether a text or a region goes in,
how the answer is read, how many tokens it may take) is looked up here; no other
module lists tasks. Adding a task means adding one line to ``TASKS``.

Prompts are those that Florence-2 was trained on (Xiao et al., "Florence-2:
Advancing a Unified Representation for a Variety of Vision Tasks", 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

# Same cap for every task: a smaller one would cut long lists of boxes and change answers.
DEFAULT_MAX_NEW_TOKENS = 1024
_MOST_QUOTED = 60  # characters of what stands where a task's name should


class TaskInput(StrEnum):
    """What a task takes beside the image."""

    NONE = "none"
    TEXT = "text"
    REGION = "region"


class AnswerKind(StrEnum):
    """How a task's token string is read; each has one parser in ``answers.py``."""

    TEXT = "text"  # "a red circle"
    QUADS = "quads"  # text<loc>*8, ...
    LABELED_BOXES = "labeled_boxes"  # label<loc>*4, ... one label may hold several boxes
    PHRASE_BOXES = "phrase_boxes"  # as above, without phrases banned as too vague to ground
    BOXES = "boxes"  # <loc>*4, ... without labels
    POLYGONS = "polygons"  # <loc>*2n, ... without labels
    BOXES_OR_POLYGONS = "boxes_or_polygons"  # label then boxes, or label then <poly>...</poly>


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: Task prompt as clients send it, e.g. ``<OD>``; also the key of the answer.
        template: Sentence given to the model; ``{input}`` stands for the text or region.
        takes: What the task takes beside the image.
        answer: How its token string is read.
        max_new_tokens: Default bound on generated tokens.
    """

    name: str
    template: str
    takes: TaskInput
    answer: AnswerKind
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS

    def prompt(self, text: str = "") -> str:
        """Returns the sentence given to the model, with `text` (a text or a region) in its place."""
        return self.template.replace("{input}", text.strip())


_NONE, _TEXT, _REGION = TaskInput.NONE, TaskInput.TEXT, TaskInput.REGION

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("<CAPTION>", "What does the image describe?", _NONE, AnswerKind.TEXT),
            Task("<DETAILED_CAPTION>", "Describe in detail what is shown in the image.", _NONE, AnswerKind.TEXT),
            Task(
                "<MORE_DETAILED_CAPTION>",
                "Describe with a paragraph what is shown in the image.",
                _NONE,
                AnswerKind.TEXT,
            ),
            Task("<OD>", "Locate the objects with category name in the image.", _NONE, AnswerKind.LABELED_BOXES),
            Task(
                "<DENSE_REGION_CAPTION>",
                "Locate the objects in the image, with their descriptions.",
                _NONE,
                AnswerKind.LABELED_BOXES,
            ),
            Task("<REGION_PROPOSAL>", "Locate the region proposals in the image.", _NONE, AnswerKind.BOXES),
            Task(
                "<CAPTION_TO_PHRASE_GROUNDING>",
                "Locate the phrases in the caption: {input}",
                _TEXT,
                AnswerKind.PHRASE_BOXES,
            ),
            Task(
                "<OPEN_VOCABULARY_DETECTION>",
                "Locate {input} in the image.",
                _TEXT,
                AnswerKind.BOXES_OR_POLYGONS,
            ),
            Task(
                "<REFERRING_EXPRESSION_SEGMENTATION>",
                "Locate {input} in the image with mask",
                _TEXT,
                AnswerKind.POLYGONS,
            ),
            Task(
                "<REGION_TO_SEGMENTATION>",
                "What is the polygon mask of region {input}",
                _REGION,
                AnswerKind.POLYGONS,
            ),
            Task("<REGION_TO_CATEGORY>", "What is the region {input}?", _REGION, AnswerKind.TEXT),
            Task("<REGION_TO_DESCRIPTION>", "What does the region {input} describe?", _REGION, AnswerKind.TEXT),
            Task("<OCR>", "What is the text in the image?", _NONE, AnswerKind.TEXT),
            Task("<OCR_WITH_REGION>", "What is the text in the image, with regions?", _NONE, AnswerKind.QUADS),
            Task("<REGION_TO_OCR>", "What text is in the region {input}?", _REGION, AnswerKind.TEXT),
        )
    }
)


def find_task(name: str) -> Task:
    """Returns the task called `name`, with or without angle brackets, in any case.

    Raises:
        KeyError: If there is no such task; its message lists the known ones.
    """
    key = f"<{name.strip().strip('<>').upper()}>"
    if key not in TASKS:
        quoted = name if len(name) <= _MOST_QUOTED else f"{name[:_MOST_QUOTED]}…"
        raise KeyError(f"unknown task {quoted!r}; known tasks: {', '.join(TASKS)}")
    return TASKS[key]
