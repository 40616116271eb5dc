"""Drawn scenes with exact ground truth for all 15 tasks (base install: NumPy and Pillow only).

A scene holds coloured shapes and rendered words on a plain, slightly noisy
background. It is a pure function of its seed, and every answer that the service
could be asked for follows from what was drawn, so the scenes train the embedded
model and score the running service.

Seeds below ``HELD_OUT_SEED`` are for training; held-out scene `i` is
``held_out_scene(i)``, drawn from seed ``HELD_OUT_SEED + i``.

Generation forbids repeated trigrams of tokens (``no_repeat_ngram_size=3``), so an
answer that repeats one could never be given. The wording avoids repetition, and a
scene for which some whole-scene answer still repeats a trigram is drawn again.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 192  # pixels; scenes are square and as large as the embedded model's input
BINS = 1000  # location tokens per axis
HELD_OUT_SEED = 1_000_000_000

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 170),
    "orange": (245, 130, 30),
    "black": (30, 30, 30),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (190, 190, 190),
    "cyan": (190, 235, 240),
    "beige": (240, 225, 195),
}
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"  # without 0 and 1, too like O and I
WORD_COLORS = ((20, 20, 20), (120, 20, 20), (20, 20, 120))
WORD_LENGTHS = (2, 4)
FONT_SIZES = (20, 28)
RADII = {"small": (11.0, 19.0), "large": (24.0, 36.0)}  # pixels
MAX_NOISE = 14  # gray levels

Point = tuple[float, float]
Box = tuple[float, float, float, float]

WHOLE_SCENE_TASKS = (
    "<CAPTION>",
    "<DETAILED_CAPTION>",
    "<MORE_DETAILED_CAPTION>",
    "<OD>",
    "<DENSE_REGION_CAPTION>",
    "<REGION_PROPOSAL>",
    "<OCR>",
    "<OCR_WITH_REGION>",
)


class Chooser(Protocol):
    """What ``truth`` needs of ``random.Random``."""

    def random(self) -> float: ...

    def choice(self, seq: Sequence[Any], /) -> Any: ...

    def sample(self, population: Sequence[Any], k: int) -> list[Any]: ...

    def randint(self, a: int, b: int) -> int: ...


@dataclass(frozen=True, slots=True)
class DrawnObject:
    """A filled shape.

    Attributes:
        shape: One of ``SHAPES``.
        color: A key of ``COLORS``.
        size: "small" or "large".
        center: (x, y) in pixels.
        polygon: Outline in pixels, clockwise from the topmost (then leftmost) corner.
    """

    shape: str
    color: str
    size: str
    center: Point
    polygon: tuple[Point, ...]

    @property
    def name(self) -> str:
        """The object as captions call it, e.g. "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> Box:
        """(x1, y1, x2, y2) in pixels, tight around the polygon."""
        return _bounds(self.polygon)

    @property
    def place(self) -> str:
        """The quadrant that holds the centre, e.g. "top left"."""
        x, y = self.center
        return f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"


@dataclass(frozen=True, slots=True)
class DrawnWord:
    """A rendered word.

    Attributes:
        text: Its characters, all from ``CHARACTERS``.
        box: (x1, y1, x2, y2) in pixels, tight around the ink.
        spans: (left, right) of each character, in pixels.
    """

    text: str
    box: Box
    spans: tuple[tuple[float, float], ...]

    @property
    def quad(self) -> tuple[float, ...]:
        """The box's corners as x, y pairs, clockwise from the top left."""
        x1, y1, x2, y2 = self.box
        return (x1, y1, x2, y1, x2, y2, x1, y2)


@dataclass(frozen=True, slots=True)
class Example:
    """One question about a scene with its answer.

    Attributes:
        task: Task name, e.g. ``<OD>``.
        text: The text or region that goes in, or "".
        target: The answer as the model writes it, with location tokens.
        answer: The answer as the service gives it: a string or a dict, in pixels.
    """

    task: str
    text: str
    target: str
    answer: Any


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A drawn scene.

    Attributes:
        image: uint8 [SIDE, SIDE, 3], RGB.
        objects: From left to right, by the left edge.
        words: From top to bottom, by the top edge.
        background: A key of ``BACKGROUNDS``.
    """

    image: np.ndarray
    objects: tuple[DrawnObject, ...]
    words: tuple[DrawnWord, ...]
    background: str

    def truth(self, task: str, chooser: Chooser | None = None) -> Example | None:
        """Asks `task` of this scene.

        Args:
            task: Task name, e.g. ``<OD>``.
            chooser: Chooses what is asked about where the task takes an input; without
                it the first object or word, named plainly.

        Returns:
            The question and its answer, or None where the scene has nothing to ask about.

        Raises:
            KeyError: If there is no such task.
        """
        return _TRUTHS[task](self, chooser or _FirstChoice())


def draw_scene(seed: int, *, objects: tuple[int, int] = (1, 4), words: tuple[int, int] = (0, 1)) -> Scene:
    """Draws the scene that belongs to `seed`.

    Args:
        seed: Any whole number; the same seed and bounds give the same scene.
        objects: Fewest and most shapes; fewer are drawn where no free place is found.
        words: Fewest and most words; likewise.
    """
    rng = random.Random(seed)
    while True:
        scene = _draw_once(rng, objects, words)
        if scene.objects and not repeats_trigram(scene):
            return scene


def held_out_scene(index: int) -> Scene:
    """Draws held-out scene `index`, never seen in training."""
    return draw_scene(HELD_OUT_SEED + index)


def location_tokens(values: Sequence[float]) -> str:
    """Writes pixel coordinates as location tokens, one each: ``<loc_0>`` … ``<loc_999>``."""
    return "".join(f"<loc_{min(BINS - 1, max(0, int(value * BINS / SIDE)))}>" for value in values)


# A target's tokens as far as repetition goes: location tokens, words, single letters of rendered words.
_TOKEN = re.compile(r"<loc_\d+>|[a-z]+| (?=[A-Z0-9])|[^\sa-z]")


def repeats_trigram(scene: Scene) -> bool:
    """Tells whether some whole-scene answer repeats three consecutive tokens."""
    for task in WHOLE_SCENE_TASKS:
        example = scene.truth(task)
        tokens = _TOKEN.findall(example.target) if example else []
        trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        if len(set(trigrams)) < len(trigrams):
            return True
    return False


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw_once(rng: random.Random, objects: tuple[int, int], words: tuple[int, int]) -> Scene:
    background = rng.choice(list(BACKGROUNDS))
    canvas = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background])
    draw = ImageDraw.Draw(canvas)
    taken: list[Box] = []
    drawn_words = [word for _ in range(rng.randint(*words)) if (word := _place_word(rng, draw, taken))]
    drawn_objects: list[DrawnObject] = []
    for _ in range(rng.randint(*objects)):
        if placed := _place_object(rng, draw, taken, {item.name for item in drawn_objects}):
            drawn_objects.append(placed)
    return Scene(
        image=_add_noise(np.asarray(canvas, np.uint8), rng),
        objects=tuple(sorted(drawn_objects, key=lambda item: item.box[0])),
        words=tuple(sorted(drawn_words, key=lambda item: item.box[1])),
        background=background,
    )


def _place_word(rng: random.Random, draw: ImageDraw.ImageDraw, taken: list[Box]) -> DrawnWord | None:
    text = "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(*WORD_LENGTHS)))
    font = _font(rng.randint(*FONT_SIZES))
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left, bottom - top
    for _ in range(10):
        x, y = rng.randint(2, int(SIDE - width - 4)), rng.randint(2, int(SIDE - height - 4))
        box = (float(x), float(y), float(x + width), float(y + height))
        if _is_free(box, taken):
            draw.text((x - left, y - top), text, fill=rng.choice(WORD_COLORS), font=font)
            edges = [x - left + font.getlength(text[:count]) for count in range(len(text) + 1)]
            taken.append(box)
            return DrawnWord(text, box, tuple(pairwise(edges)))
    return None


def _place_object(
    rng: random.Random, draw: ImageDraw.ImageDraw, taken: list[Box], names: set[str]
) -> DrawnObject | None:
    for _ in range(20):
        shape, color, size = rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(("small", "large"))
        radius = rng.uniform(*RADII[size])
        center = (rng.uniform(radius + 1, SIDE - radius - 1), rng.uniform(radius + 1, SIDE - radius - 1))
        item = DrawnObject(shape, color, size, center, _outline(shape, center, radius))
        if item.name not in names and _is_free(item.box, taken):
            draw.polygon(item.polygon, fill=COLORS[color])
            taken.append(item.box)
            return item
    return None


def _outline(shape: str, center: Point, radius: float) -> tuple[Point, ...]:
    """Gives the outline of `shape`, clockwise from the topmost (then leftmost) corner."""
    offsets = _unit_outline(shape)
    return tuple((center[0] + radius * x, center[1] + radius * y) for x, y in offsets)


@cache
def _unit_outline(shape: str) -> tuple[Point, ...]:
    if shape == "circle":
        return tuple((math.sin(k * math.pi / 8), -math.cos(k * math.pi / 8)) for k in range(16))
    if shape == "square":
        return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if shape == "triangle":
        return ((0.0, -1.0), (0.95, 0.8), (-0.95, 0.8))
    if shape == "diamond":
        return ((0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0))
    if shape == "star":
        reach = [1.0 if k % 2 == 0 else 0.45 for k in range(10)]
        return tuple((r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(reach))
    a = 0.35  # half the width of the cross's arms
    upper_right = ((-a, -1.0), (a, -1.0), (a, -a), (1.0, -a), (1.0, a), (a, a))
    return upper_right + tuple((-x, -y) for x, y in upper_right)


def _bounds(points: Sequence[Point]) -> Box:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return (min(xs), min(ys), max(xs), max(ys))


def _is_free(box: Box, taken: Sequence[Box], margin: float = 3.0) -> bool:
    return all(
        box[2] + margin < other[0]
        or other[2] + margin < box[0]
        or box[3] + margin < other[1]
        or other[3] + margin < box[1]
        for other in taken
    )


def _add_noise(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Adds uniform noise of a random strength to seven images in ten."""
    if rng.random() >= 0.7:
        return image
    low, high = -rng.randint(1, MAX_NOISE), rng.randint(1, MAX_NOISE)
    noise = np.random.Generator(np.random.SFC64(rng.getrandbits(64))).integers(
        low, high, image.shape, dtype=np.int8, endpoint=True
    )
    return np.clip(image.astype(np.int16) + noise, 0, 255).astype(np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


# --- questions and answers -------------------------------------------------------------------------------------------


class _FirstChoice:
    """Chooses the first of everything."""

    def random(self) -> float:
        return 0.0

    def choice(self, seq: Sequence[Any], /) -> Any:
        return seq[0]

    def sample(self, population: Sequence[Any], k: int) -> list[Any]:
        return list(population[:k])

    def randint(self, a: int, b: int) -> int:
        return a


def _listed(parts: Sequence[str]) -> str:
    """Joins parts as English does: "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _text_example(task: str, target: str, text: str = "") -> Example:
    return Example(task, text, target, target)


def _by_place(scene: Scene, *, with_size: bool) -> str:
    """Describes the objects by quadrant, each quadrant named once: "red circle and blue star top left, …"."""
    groups: dict[str, list[str]] = {}
    for item in sorted(scene.objects, key=lambda item: _PLACES.index(item.place)):
        groups.setdefault(item.place, []).append(f"{item.size} {item.name}" if with_size else item.name)
    return ", ".join(f"{' and '.join(names)} {place}" for place, names in groups.items())


_PLACES = ("top left", "top right", "bottom left", "bottom right")


def _caption(scene: Scene, _: Chooser) -> Example:
    return _text_example("<CAPTION>", _listed([f"a {item.name}" for item in scene.objects]))


def _detailed_caption(scene: Scene, _: Chooser) -> Example:
    return _text_example("<DETAILED_CAPTION>", _by_place(scene, with_size=False))


def _more_detailed_caption(scene: Scene, _: Chooser) -> Example:
    text = f"the text reads {_read(scene)}" if scene.words else "there is no text"
    return _text_example(
        "<MORE_DETAILED_CAPTION>", f"{scene.background} background. {_by_place(scene, with_size=True)}. {text}"
    )


def _labeled_boxes(task: str, labels: Sequence[str], boxes: Sequence[Box], text: str = "") -> Example:
    target = "".join(label + location_tokens(box) for label, box in zip(labels, boxes, strict=True))
    return Example(task, text, target, {"bboxes": [list(box) for box in boxes], "labels": list(labels)})


def _object_detection(scene: Scene, _: Chooser) -> Example:
    return _labeled_boxes("<OD>", [item.shape for item in scene.objects], [item.box for item in scene.objects])


def _dense_region_caption(scene: Scene, _: Chooser) -> Example:
    labels = [f"{item.size} {item.name}" for item in scene.objects]
    return _labeled_boxes("<DENSE_REGION_CAPTION>", labels, [item.box for item in scene.objects])


def _region_proposal(scene: Scene, _: Chooser) -> Example:
    return _labeled_boxes("<REGION_PROPOSAL>", [""] * len(scene.objects), [item.box for item in scene.objects])


def _grounding(scene: Scene, chooser: Chooser) -> Example:
    """Asks for all objects half the time, else for some of them in any order."""
    asked = list(scene.objects)
    if chooser.random() >= 0.5:
        asked = chooser.sample(asked, chooser.randint(1, len(asked)))
    labels = [f"a {item.name}" for item in asked]
    return _labeled_boxes("<CAPTION_TO_PHRASE_GROUNDING>", labels, [item.box for item in asked], _listed(labels))


def _expression(item: DrawnObject, chooser: Chooser) -> str:
    return chooser.choice(("", "", "a ", "the ")) + item.name


def _open_vocabulary_detection(scene: Scene, chooser: Chooser) -> Example:
    item = chooser.choice(scene.objects)
    answer = {"bboxes": [list(item.box)], "bboxes_labels": [item.name], "polygons": [], "polygons_labels": []}
    target = item.name + location_tokens(item.box)
    return Example("<OPEN_VOCABULARY_DETECTION>", _expression(item, chooser), target, answer)


def _segmentation(task: str, item: DrawnObject, text: str) -> Example:
    flat = [value for point in item.polygon for value in point]
    return Example(task, text, location_tokens(flat), {"polygons": [[flat]], "labels": [""]})


def _referring_segmentation(scene: Scene, chooser: Chooser) -> Example:
    item = chooser.choice(scene.objects)
    return _segmentation("<REFERRING_EXPRESSION_SEGMENTATION>", item, _expression(item, chooser))


def _region_to_segmentation(scene: Scene, chooser: Chooser) -> Example:
    item = chooser.choice(scene.objects)
    return _segmentation("<REGION_TO_SEGMENTATION>", item, location_tokens(item.box))


def _region_to_category(scene: Scene, chooser: Chooser) -> Example:
    item = chooser.choice(scene.objects)
    return _text_example("<REGION_TO_CATEGORY>", item.shape, location_tokens(item.box))


def _region_to_description(scene: Scene, chooser: Chooser) -> Example:
    item = chooser.choice(scene.objects)
    return _text_example("<REGION_TO_DESCRIPTION>", f"a {item.size} {item.name}", location_tokens(item.box))


def _read(scene: Scene) -> str:
    return " ".join(word.text for word in scene.words)


def _ocr(scene: Scene, _: Chooser) -> Example:
    return _text_example("<OCR>", _read(scene))


def _ocr_with_region(scene: Scene, _: Chooser) -> Example:
    target = "".join(word.text + location_tokens(word.quad) for word in scene.words)
    answer = {"quad_boxes": [list(word.quad) for word in scene.words], "labels": [word.text for word in scene.words]}
    return Example("<OCR_WITH_REGION>", "", target, answer)


def _region_to_ocr(scene: Scene, chooser: Chooser) -> Example | None:
    if not scene.words:
        return None
    word = chooser.choice(scene.words)
    return _text_example("<REGION_TO_OCR>", word.text, location_tokens(word.box))


_TRUTHS = {
    "<CAPTION>": _caption,
    "<DETAILED_CAPTION>": _detailed_caption,
    "<MORE_DETAILED_CAPTION>": _more_detailed_caption,
    "<OD>": _object_detection,
    "<DENSE_REGION_CAPTION>": _dense_region_caption,
    "<REGION_PROPOSAL>": _region_proposal,
    "<CAPTION_TO_PHRASE_GROUNDING>": _grounding,
    "<OPEN_VOCABULARY_DETECTION>": _open_vocabulary_detection,
    "<REFERRING_EXPRESSION_SEGMENTATION>": _referring_segmentation,
    "<REGION_TO_SEGMENTATION>": _region_to_segmentation,
    "<REGION_TO_CATEGORY>": _region_to_category,
    "<REGION_TO_DESCRIPTION>": _region_to_description,
    "<OCR>": _ocr,
    "<OCR_WITH_REGION>": _ocr_with_region,
    "<REGION_TO_OCR>": _region_to_ocr,
}
