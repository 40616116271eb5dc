"""Answers drawn onto their pictures with matplotlib (extra ``plot``)."""

from __future__ import annotations

import colorsys
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon as Outline
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageOps

from florence2_kserve.answers import FEWEST_COORDINATES
from florence2_kserve.client.items import Box, Item, Polygon, Segment

Picture: TypeAlias = str | Path | bytes | Image.Image | np.ndarray[Any, Any]
Color: TypeAlias = tuple[float, float, float]

_SIDE_IN = 8.0  # the longer side of the picture in a new figure
_POINTS_PER_INCH = 72
_LABEL_PT, _TITLE_PT = 10, 12
_LINE, _CHARACTER = 1.4, 0.55  # height of a line and mean width of a character, by the size of the font
_PAD_PT = 2
_LINE_PT, _HALO_PT = 2.0, 4.0
_FILL = 0.35  # opacity
_LONGEST_LABEL = 40  # characters
_FIRST_HUE, _HUE_STEP = 0.92, 0.618034  # the golden ratio keeps any number of hues apart


def draw_items(items: Sequence[Item], image: Picture, ax: Axes | None) -> Axes:
    """Draws items and their labels onto their picture; see ``Answer.plot``."""
    pixels = _pixels(image)
    ax = _show(pixels, ax, "")
    colors = {label: _color(index) for index, label in enumerate(dict.fromkeys(item.label for item in items))}
    for item in items:
        for outline in item.outlines:
            _draw_outline(ax, outline, colors[item.label], filled=isinstance(item, Segment))
    taken: list[Bbox] = []
    for item in items:
        if words := _words(item):
            taken.append(_write(ax, words, item.box, colors[item.label], pixels.shape[:2], taken))
    return ax


def draw_caption(text: str, image: Picture, ax: Axes | None) -> Axes:
    """Shows a picture with a text above it; see ``Answer.plot``."""
    return _show(_pixels(image), ax, text)


def _pixels(image: Picture) -> np.ndarray[Any, Any]:
    """Returns a picture as the service sees it, uint8 [H, W, 3]."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _show(pixels: np.ndarray[Any, Any], ax: Axes | None, title: str) -> Axes:
    height, width = pixels.shape[:2]
    if ax is None:
        ax = _new_axes(width, height, title)
    # Coordinates lie on the edges of pixels, not in their middle.
    ax.imshow(pixels, extent=(0, width, height, 0))
    ax.autoscale(False)
    ax.set_axis_off()
    if title:
        ax.set_title("\n".join(_title_lines(title, _width_in(ax))), fontsize=_TITLE_PT, parse_math=False)
    return ax


def _new_axes(width: int, height: int, title: str) -> Axes:
    """Returns axes of a figure that the picture fills, with room for the title above."""
    inches = _SIDE_IN / max(width, height)
    across, down = max(1.0, width * inches), max(1.0, height * inches)
    above = len(_title_lines(title, across)) * _TITLE_PT * _LINE / _POINTS_PER_INCH + (0.2 if title else 0.0)
    figure = Figure(figsize=(across, down + above))
    FigureCanvasAgg(figure)  # of this figure alone: what the process draws with stays as it is
    return figure.add_axes((0, 0, 1, down / (down + above)))


def _width_in(ax: Axes) -> float:
    return ax.get_window_extent().width / ax.figure.dpi


def _title_lines(title: str, inches: float) -> list[str]:
    characters = int(inches * _POINTS_PER_INCH / (_TITLE_PT * _CHARACTER))
    return [line for part in title.splitlines() for line in textwrap.wrap(part, max(10, characters))]


def _color(index: int) -> Color:
    hue = (_FIRST_HUE + index * _HUE_STEP) % 1.0
    return colorsys.hsv_to_rgb(hue, 0.9, 0.9)


def _draw_outline(ax: Axes, outline: Polygon, color: Color, *, filled: bool) -> None:
    corners = np.array(outline, dtype=float).reshape(-1, 2)
    halo = [patheffects.Stroke(linewidth=_HALO_PT, foreground="white", alpha=0.8), patheffects.Normal()]
    if len(outline) < FEWEST_COORDINATES:  # no area: the model wrote one or two points
        ax.plot(*corners.T, color=color, linewidth=_LINE_PT, marker="o", path_effects=halo)
        return
    if filled:
        ax.add_patch(Outline(corners, closed=True, facecolor=(*color, _FILL), edgecolor="none"))
    ax.add_patch(Outline(corners, closed=True, fill=False, edgecolor=color, linewidth=_LINE_PT, path_effects=halo))


def _words(item: Item) -> str:
    score = "" if item.score is None else f"{item.score:.2f}"
    return " ".join(filter(None, (textwrap.shorten(item.label, _LONGEST_LABEL, placeholder="…"), score)))


def _write(ax: Axes, words: str, box: Box, color: Color, picture: tuple[int, ...], taken: Sequence[Bbox]) -> Bbox:
    """Writes words at a box, where there is room within the picture; returns what they cover."""
    ax.apply_aspect()
    text = ax.text(
        0,
        0,
        words,
        fontsize=_LABEL_PT,
        color="white" if _luminance(color) < 0.5 else "black",
        verticalalignment="top",
        parse_math=False,
        bbox={"facecolor": color, "edgecolor": "none", "pad": _PAD_PT},
    )
    width, height, pad = _covered(ax, text)
    x1, y1, x2, y2 = box
    corners = [(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2), (x1, y1), (x1, y2 - height)]
    places = [
        Bbox.from_bounds(_clamp(left, picture[1] - width), _clamp(top, picture[0] - height), width, height)
        for left, top in corners
    ]
    place = next((place for place in places if not any(place.overlaps(other) for other in taken)), places[0])
    text.set_position((place.x0 + pad, place.y0 + pad))
    return place


def _covered(ax: Axes, text: Text) -> tuple[float, float, float]:
    """Returns width and height of what a text covers, and its margin, in pixels of the picture."""
    extent = text.get_window_extent()
    pad = _PAD_PT * ax.figure.dpi / _POINTS_PER_INCH
    scale = ax.transData.inverted().get_matrix()[0, 0]
    return (extent.width + 2 * pad) * scale, (extent.height + 2 * pad) * scale, pad * scale


def _clamp(value: float, most: float) -> float:
    return max(0.0, min(value, most))


def _luminance(color: Color) -> float:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue
