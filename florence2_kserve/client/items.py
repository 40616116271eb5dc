"""The single things that answers are made of: a labelled box, a word in its quadrangle, an outlined area."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from florence2_kserve.answers import run_lengths

Box: TypeAlias = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
Quad: TypeAlias = tuple[float, float, float, float, float, float, float, float]  # four corners x, y in pixels
Polygon: TypeAlias = tuple[float, ...]  # corners x1, y1, x2, y2, … in pixels
Size: TypeAlias = tuple[int, int]  # width, height

_OCR_CATEGORY = "text"


class Item(Protocol):
    """What all items have."""

    @property
    def label(self) -> str:
        """What it is, or the word that is read there; "" where the task gives no labels."""

    @property
    def score(self) -> float | None:
        """How sure the model is, 0 to 1: the score of its place times that of its label; None where unknown."""

    @property
    def box(self) -> Box:
        """The box around it."""

    @property
    def outlines(self) -> tuple[Polygon, ...]:
        """What is drawn of it."""

    @property
    def category(self) -> str:
        """The name of its category in COCO's sense."""

    def decode_mask(self, image_size: Size | None) -> np.ndarray[Any, Any] | None:
        """Returns its mask, bool [H, W], if it has one."""

    def to_coco(self) -> dict[str, Any]:
        """Returns what a COCO result says of it beside box, category and score."""

    def to_row(self) -> dict[str, Any]:
        """Returns the columns that it has beside box, label and score."""


@dataclass(frozen=True, slots=True)
class Detection:
    """A labelled box.

    Attributes:
        box: (x1, y1, x2, y2) in pixels of the picture as shown.
        label: What it is, "" where the task gives no labels.
        score: Score of the box × score of the label, 0 to 1; None where unknown.
    """

    box: Box
    label: str
    score: float | None = None

    @property
    def outlines(self) -> tuple[Polygon, ...]:
        """The box's corners."""
        x1, y1, x2, y2 = self.box
        return ((x1, y1, x2, y1, x2, y2, x1, y2),)

    @property
    def category(self) -> str:
        """The label."""
        return self.label

    def decode_mask(self, image_size: Size | None) -> None:
        """A box has no mask."""

    def to_coco(self) -> dict[str, Any]:
        """A box has nothing beside itself."""
        return {}

    def to_row(self) -> dict[str, Any]:
        """A box has nothing beside itself."""
        return {}


@dataclass(frozen=True, slots=True)
class OcrRegion:
    """A read text and the quadrangle around it.

    Attributes:
        quad: (x1, y1, …, x4, y4), its corners in pixels of the picture as shown.
        label: The text.
        score: Score of the quadrangle × score of the text, 0 to 1; None where unknown.
    """

    quad: Quad
    label: str
    score: float | None = None

    @property
    def box(self) -> Box:
        """The upright box around the quadrangle."""
        return _bounds((self.quad,))

    @property
    def outlines(self) -> tuple[Polygon, ...]:
        """The quadrangle."""
        return (self.quad,)

    @property
    def category(self) -> str:
        """All texts are of one category, ``text``."""
        return _OCR_CATEGORY

    def decode_mask(self, image_size: Size | None) -> None:
        """A text has no mask."""

    def to_coco(self) -> dict[str, Any]:
        """Returns the quadrangle as a polygon, and the text."""
        return {"segmentation": [list(self.quad)], "text": self.label}

    def to_row(self) -> dict[str, Any]:
        """Returns the quadrangle."""
        return {"quad": list(self.quad)}


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask, as COCO's compressed run lengths.

    Attributes:
        size: (height, width) in pixels.
        counts: The run lengths.
    """

    size: tuple[int, int]
    counts: str = field(repr=False)

    def to_coco(self) -> dict[str, Any]:
        """Returns the mask as pycocotools and COCO's files have it."""
        return {"size": list(self.size), "counts": self.counts}

    def decode(self) -> np.ndarray[Any, Any]:
        """Returns the mask as bool [H, W]."""
        from pycocotools import mask

        return mask.decode(self.to_coco()).astype(bool)


@dataclass(frozen=True, slots=True)
class Segment:
    """An outlined area; it may have several parts.

    Attributes:
        polygons: For each part its corners (x1, y1, x2, y2, …) in pixels of the picture as shown. The model may
            write parts of fewer than three corners, which have no area.
        label: What it is, "" where the task gives no labels.
        score: Score of the polygons × score of the label, 0 to 1; None where unknown.
        run_lengths: The area as a mask; None where unknown.
    """

    polygons: tuple[Polygon, ...]
    label: str
    score: float | None = None
    run_lengths: RunLengths | None = None

    @property
    def box(self) -> Box:
        """The box around all parts; (0, 0, 0, 0) where they have no corner at all."""
        return _bounds(self.polygons)

    @property
    def outlines(self) -> tuple[Polygon, ...]:
        """The polygons."""
        return self.polygons

    @property
    def category(self) -> str:
        """The label."""
        return self.label

    def decode_mask(self, image_size: Size | None) -> np.ndarray[Any, Any] | None:
        """Returns the mask as bool [H, W]; where there is none, the polygons drawn into `image_size`, if given."""
        if self.run_lengths is not None:
            return self.run_lengths.decode()
        if image_size is None:
            return None
        runs = run_lengths(self.polygons, image_size)
        return RunLengths(tuple(runs["size"]), runs["counts"]).decode()

    def to_coco(self) -> dict[str, Any]:
        """Returns the mask, or without one the polygons."""
        if self.run_lengths is not None:
            return {"segmentation": self.run_lengths.to_coco()}
        return {"segmentation": [list(polygon) for polygon in self.polygons]}

    def to_row(self) -> dict[str, Any]:
        """Returns the polygons."""
        return {"polygons": [list(polygon) for polygon in self.polygons]}


def _bounds(polygons: tuple[Polygon, ...]) -> Box:
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return (min(xs), min(ys), max(xs), max(ys)) if xs else (0, 0, 0, 0)
