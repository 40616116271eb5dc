"""Typed answers, and what they convert to.

Which class a task's answers have follows from its kind of answer (``tasks.py``). They are frozen
dataclasses; those with places in the picture are iterable over their items. The conversions to
other libraries import these on the call, and say which extra to install where they are missing.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from florence2_kserve.client.errors import RowError, ServerError, reading_an_answer
from florence2_kserve.client.items import (
    Box,
    Detection,
    Item,
    OcrRegion,
    Polygon,
    Quad,
    RunLengths,
    Segment,
    Size,
)
from florence2_kserve.protocol.public import LENGTH
from florence2_kserve.tasks import AnswerKind, find_task

if TYPE_CHECKING:
    import pandas as pd
    import supervision as sv
    from matplotlib.axes import Axes

    from florence2_kserve.client.plots import Picture

ItemT = TypeVar("ItemT", bound=Item, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Answer(ABC):
    """An answer.

    Attributes:
        task: Task prompt that was asked, e.g. ``<OD>``.
        value: The structured answer as the service gave it: a text, or a mapping of lists.
        finish_reason: ``stop``, or ``length`` where the answer was cut off; None where unknown.
        sequence_score: The beam's score, a log-probability normalised by length; None where unknown.
    """

    task: str
    value: Any = field(repr=False, hash=False)
    finish_reason: str | None = None
    sequence_score: float | None = None

    @property
    def raw(self) -> dict[str, Any]:
        """The answer keyed by the task prompt, as `infer` gives it."""
        return {self.task: self.value}

    @property
    def is_truncated(self) -> bool:
        """Whether max_new_tokens cut the answer off, so that its lists may be incomplete."""
        return self.finish_reason == LENGTH

    def to_dict(self) -> dict[str, Any]:
        """Returns the answer as JSON's types: `task`, `value`, `scores`, `finish_reason`, `sequence_score`.

        `scores` are those of the items, of a caption its own; None where unknown.
        """
        return {
            "task": self.task,
            "value": self.value,
            "scores": self._plain_scores(),
            "finish_reason": self.finish_reason,
            "sequence_score": self.sequence_score,
        }

    @abstractmethod
    def _plain_scores(self) -> Any:
        """Returns what `to_dict` says of scores."""

    @abstractmethod
    def to_coco(self, image_id: int | str, category_ids: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """Returns the answer as entries of a COCO results file, which pycocotools' ``COCO.loadRes`` reads.

        Boxes are ``[x, y, width, height]``; masks come as run lengths. Of a text read in the picture the category is
        ``text``, and its words are in the entry's ``text``. A score that isn't known is 1.0, as COCO wants one.

        Args:
            image_id: The image's id in the annotations.
            category_ids: Category's id by label; items with other labels are left out. Without it, labels are
                numbered from 1 as they first appear in this answer.
        """

    @abstractmethod
    def to_pandas(self) -> pd.DataFrame:
        """Returns one row an item (extra ``pandas``).

        Columns are ``x1, y1, x2, y2`` (the box around the item), ``quad`` or ``polygons`` where there are such,
        ``label`` and ``score``; of a caption ``text`` and ``score``.

        Raises:
            ImportError: If pandas isn't installed.
        """

    @abstractmethod
    def plot(self, image: Picture, ax: Axes | None = None) -> Axes:
        """Draws the answer onto its picture (extra ``plot``).

        Args:
            image: The picture that was asked about: a path, encoded bytes, a Pillow image or uint8 [H, W, 3]. Its EXIF
                orientation is applied, as the service does.
            ax: Where to draw; without it, axes of a new figure as large as the picture, which needs no display:
                ``answer.plot(image).figure.savefig("answer.png")``.

        Raises:
            ImportError: If matplotlib isn't installed.
        """


@dataclass(frozen=True, kw_only=True)
class Caption(Answer):
    """A text: a caption, a region's category or description, or what is read in the picture.

    Attributes:
        text: The text.
        score: How sure the model is of it, 0 to 1; None where unknown.
    """

    text: str
    score: float | None = None

    def __str__(self) -> str:
        return self.text

    def _plain_scores(self) -> float | None:
        return self.score

    def to_coco(self, image_id: int | str, category_ids: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """Returns the one entry of a COCO caption results file."""
        return [{"image_id": image_id, "caption": self.text}]

    def to_pandas(self) -> pd.DataFrame:
        """Returns one row, ``text`` and ``score`` (extra ``pandas``)."""
        return _need("pandas", "pandas").DataFrame({"text": [self.text], "score": [self.score]})

    def plot(self, image: Picture, ax: Axes | None = None) -> Axes:
        """Shows the picture with the text above it (extra ``plot``)."""
        return _plots().draw_caption(self.text, image, ax)


@dataclass(frozen=True, kw_only=True)
class Places(Answer, Generic[ItemT]):
    """An answer with places in the picture, iterable over its items."""

    @abstractmethod
    def __iter__(self) -> Iterator[ItemT]: ...

    def to_coco(self, image_id: int | str, category_ids: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """See `Answer.to_coco`."""
        ids = _numbered([item.category for item in self], 1) if category_ids is None else category_ids
        return [
            {
                "image_id": image_id,
                "category_id": ids[item.category],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": 1.0 if item.score is None else item.score,
                **item.to_coco(),
            }
            for item in self
            if item.category in ids
            for x1, y1, x2, y2 in [item.box]
        ]

    def to_pandas(self) -> pd.DataFrame:
        """See `Answer.to_pandas`."""
        rows = [
            {
                **dict(zip(("x1", "y1", "x2", "y2"), item.box, strict=True)),
                **item.to_row(),
                "label": item.label,
                "score": item.score,
            }
            for item in self
        ]
        return _need("pandas", "pandas").DataFrame(
            rows, columns=["x1", "y1", "x2", "y2", *self._columns, "label", "score"]
        )

    def to_supervision(self, image_size: Size | None = None) -> sv.Detections:
        """Returns supervision's detections (extra ``supervision``).

        `class_id` numbers the labels from 0 as they first appear in this answer, ``data["class_name"]`` holds them.
        Quadrangles are in ``data["xyxyxyxy"]``, float32 [N, 4, 2], where supervision looks for oriented boxes.

        Args:
            image_size: (width, height) of the picture as shown. Only needed to draw masks from polygons where the
                answer has no masks, as one that was made by hand; without it there are none then.

        Raises:
            ImportError: If supervision isn't installed.
        """
        supervision = _need("supervision", "supervision")
        items = list(self)
        labels = [item.label for item in items]
        ids = _numbered(labels, 0)
        scores = [item.score for item in items if item.score is not None]
        masks = [mask for item in items if (mask := item.decode_mask(image_size)) is not None]
        data: dict[str, Any] = {"class_name": np.array(labels, dtype=str)}
        if quads := [item.quad for item in items if isinstance(item, OcrRegion)]:
            data[supervision.config.ORIENTED_BOX_COORDINATES] = np.array(quads, dtype=np.float32).reshape(-1, 4, 2)
        return supervision.Detections(
            xyxy=np.array([item.box for item in items], dtype=np.float32).reshape(-1, 4),
            confidence=np.array(scores, dtype=np.float32) if len(scores) == len(items) else None,
            class_id=np.array([ids[label] for label in labels], dtype=int),
            mask=np.stack(masks) if masks and len(masks) == len(items) else None,
            data=data,
        )

    def plot(self, image: Picture, ax: Axes | None = None) -> Axes:
        """See `Answer.plot`."""
        return _plots().draw_items(list(self), image, ax)

    def _plain_scores(self) -> list[float | None] | None:
        scores = [item.score for item in self]
        return None if None in scores else scores

    @property
    def _columns(self) -> Sequence[str]:
        """Names of what items have beside box, label and score."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Detections(Places[Detection]):
    """Boxes.

    Attributes:
        bboxes: (x1, y1, x2, y2) each, in pixels of the picture as shown.
        labels: One a box, "" where the task gives no labels.
        scores: One a box: score of the box × score of the label, 0 to 1; None where unknown.
    """

    bboxes: tuple[Box, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...] | None = None

    def __iter__(self) -> Iterator[Detection]:
        return map(Detection, self.bboxes, self.labels, self.scores or _unknown(self.labels))


@dataclass(frozen=True, kw_only=True)
class OcrRegions(Places[OcrRegion]):
    """Texts that are read in the picture, each in its quadrangle.

    Attributes:
        quad_boxes: (x1, y1, …, x4, y4) each, corners in pixels of the picture as shown.
        labels: The texts.
        scores: One a text: score of the quadrangle × score of the text, 0 to 1; None where unknown.
    """

    quad_boxes: tuple[Quad, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...] | None = None

    def __iter__(self) -> Iterator[OcrRegion]:
        return map(OcrRegion, self.quad_boxes, self.labels, self.scores or _unknown(self.labels))

    @property
    def _columns(self) -> Sequence[str]:
        return ("quad",)


@dataclass(frozen=True, kw_only=True)
class Masks(Places[Segment]):
    """Outlined areas.

    Attributes:
        polygons: For each area its parts, each (x1, y1, x2, y2, …) in pixels of the picture as shown.
        labels: One an area, "" where the task gives no labels.
        scores: One an area: score of the polygons × score of the label, 0 to 1; None where unknown.
        masks: One an area; None where unknown.
    """

    polygons: tuple[tuple[Polygon, ...], ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    masks: tuple[RunLengths, ...] | None = None

    def __iter__(self) -> Iterator[Segment]:
        unknown = _unknown(self.labels)
        return map(Segment, self.polygons, self.labels, self.scores or unknown, self.masks or unknown)

    @property
    def _columns(self) -> Sequence[str]:
        return ("polygons",)


@dataclass(frozen=True, kw_only=True)
class DetectionsOrMasks(Places[Detection | Segment]):
    """What the model finds of things that were named: boxes or areas, as it chose.

    Attributes:
        detections: The boxes.
        masks: The areas.
    """

    detections: Detections
    masks: Masks

    def __iter__(self) -> Iterator[Detection | Segment]:
        yield from self.detections
        yield from self.masks

    @property
    def _columns(self) -> Sequence[str]:
        return ("polygons",)


def gives_masks(task: str) -> bool:
    """Whether answers to `task` have masks; not so of a task that isn't known here."""
    try:
        return find_task(task).answer in (AnswerKind.POLYGONS, AnswerKind.BOXES_OR_POLYGONS)
    except KeyError:
        return False


def read_answer(
    task: str,
    parsed: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    masks: Mapping[str, Any] | None = None,
    finish_reason: str | None = None,
) -> Answer:
    """Builds a typed answer from one element of each of the service's outputs.

    Args:
        task: Task prompt, with or without angle brackets.
        parsed: Of PARSED_JSON: ``{"<OD>": {"bboxes": […], "labels": […]}}``.
        scores: Of SCORES: ``{"<OD>": {"sequence": …, "bboxes": […], "labels": […]}}``.
        masks: Of MASKS: ``{"<OD>": {"masks": [{"size": …, "counts": …}, …], "labels": […]}}``.
        finish_reason: Of FINISH_REASON.

    Raises:
        RowError: If the element says that this row has no answer, as with ``partial=true`` it may.
        ServerError: If the element is no answer to `task`.
    """
    if error := parsed.get("error"):
        raise RowError(str(error.get("message")), error.get("status"))
    try:
        known = find_task(task)
    except KeyError:
        raise ServerError(f"this client doesn't know the task {task!r}; infer gives its answer as it comes") from None
    with reading_an_answer():
        of_scores = None if scores is None else scores[known.name]
        common = {
            "task": known.name,
            "value": parsed[known.name],
            "finish_reason": finish_reason,
            "sequence_score": None if of_scores is None else of_scores["sequence"],
        }
        areas = None if masks is None else masks[known.name]["masks"]
        return _READERS[known.answer](parsed[known.name], of_scores, areas, common)


_Scores = Mapping[str, Any] | None
_Areas = Sequence[Mapping[str, Any]] | None


def _read_caption(value: Any, scores: _Scores, masks: _Areas, common: dict[str, Any]) -> Caption:
    return Caption(text=value, score=None if scores is None else scores["text"], **common)


def _read_detections(
    value: Any, scores: _Scores, masks: _Areas, common: dict[str, Any], labels: str = "labels"
) -> Detections:
    return Detections(
        bboxes=tuple(map(tuple, value["bboxes"])),
        labels=tuple(value[labels]),
        scores=_products(value, scores, "bboxes", labels),
        **common,
    )


def _read_ocr_regions(value: Any, scores: _Scores, masks: _Areas, common: dict[str, Any]) -> OcrRegions:
    return OcrRegions(
        quad_boxes=tuple(map(tuple, value["quad_boxes"])),
        labels=tuple(value["labels"]),
        scores=_products(value, scores, "quad_boxes", "labels"),
        **common,
    )


def _read_masks(value: Any, scores: _Scores, masks: _Areas, common: dict[str, Any], labels: str = "labels") -> Masks:
    if masks is not None and len(masks) != len(value["polygons"]):
        raise ValueError(f"{len(value['polygons'])} areas and {len(masks)} masks don't match")
    return Masks(
        polygons=tuple(tuple(map(tuple, instance)) for instance in value["polygons"]),
        labels=tuple(value[labels]),
        scores=_products(value, scores, "polygons", labels),
        masks=None if masks is None else tuple(RunLengths(tuple(mask["size"]), mask["counts"]) for mask in masks),
        **common,
    )


def _read_detections_or_masks(value: Any, scores: _Scores, masks: _Areas, common: dict[str, Any]) -> DetectionsOrMasks:
    return DetectionsOrMasks(
        detections=_read_detections(value, scores, None, common, "bboxes_labels"),
        masks=_read_masks(value, scores, masks, common, "polygons_labels"),
        **common,
    )


_READERS: Mapping[AnswerKind, Callable[[Any, _Scores, _Areas, dict[str, Any]], Answer]] = MappingProxyType(
    {
        AnswerKind.TEXT: _read_caption,
        AnswerKind.QUADS: _read_ocr_regions,
        AnswerKind.LABELED_BOXES: _read_detections,
        AnswerKind.PHRASE_BOXES: _read_detections,
        AnswerKind.BOXES: _read_detections,
        AnswerKind.POLYGONS: _read_masks,
        AnswerKind.BOXES_OR_POLYGONS: _read_detections_or_masks,
    }
)


def _products(value: Any, scores: _Scores, places: str, labels: str) -> tuple[float, ...] | None:
    """Returns the score of each place times that of its label, which counts as 1 where there is no label."""
    if len(value[places]) != len(value[labels]):
        raise ValueError(f"{len(value[places])} {places} and {len(value[labels])} {labels} don't match")
    if scores is None:
        return None
    columns = zip(value[labels], scores[places], scores[labels], strict=True)
    products = tuple(place * of_label if label else place for label, place, of_label in columns)
    if len(products) != len(value[places]):
        raise ValueError(f"{len(value[places])} {places} and {len(products)} scores don't match")
    return products


def _unknown(labels: Sequence[str]) -> tuple[None, ...]:
    return (None,) * len(labels)


def _numbered(names: Sequence[str], first: int) -> dict[str, int]:
    """Numbers names from `first` on as they first appear."""
    return {name: number for number, name in enumerate(dict.fromkeys(names), first)}


def _need(module: str, extra: str) -> Any:
    """Imports an optional package.

    Raises:
        ImportError: If it isn't installed; the message names the extra that has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module}: pip install 'florence2-kserve[{extra}]'") from error


def _plots() -> Any:
    _need("matplotlib", "plot")
    return importlib.import_module("florence2_kserve.client.plots")
