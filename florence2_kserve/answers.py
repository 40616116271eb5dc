r"""Generated tokens → structured answers.

A model writes an answer as text with location tokens in it, ``cat<loc_1><loc_2><loc_3><loc_4>``.
Answers here equal those of ``Florence2Processor.post_process_generation(sequence=...)`` in
transformers, down to odd strings, with these differences, all meant:

- **Characters survive.** transformers decodes token by token, so that a character whose bytes lie
  in several tokens becomes U+FFFD, and it drops everything but ASCII from the labels of boxes.
  Here tokens are decoded together and labels keep all their characters.
- **Padding behind the answer is not part of it.** transformers leaves ``<pad>`` in texts.
- **Nothing the model writes raises.** transformers fails on an empty sequence, and on a location
  of more digits than an integer holds, which only ordinary tokens can spell; here one of more
  than six digits is ordinary text.

An item needs its label on one line: a label with a line break in it is dropped with its places.
Where a label is expected and the text has none, the tail of the token before it counts as one
(``<loc_1>…<loc_5>`` is a box labelled ``loc_1>``), there as here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from florence2_kserve.tasks import AnswerKind, Task

if TYPE_CHECKING:
    from florence2_kserve.processor import Processor

# A text, or lists that run in parallel, such as {"bboxes": [[x1, y1, x2, y2], ...], "labels": [...]}.
Answer: TypeAlias = str | dict[str, list[Any]]
Size: TypeAlias = tuple[int, int]  # width, height

BINS = 1000  # locations an axis
POLY, END_POLY, SEP = "<poly>", "</poly>", "<sep>"

_LOCATION = r"<loc_\d{1,6}>"
_PIECE = rf"(?:{_LOCATION}|{SEP}|{POLY}|{END_POLY})"
# A label begins behind a token or an item and holds no "<". Saying so keeps the search linear.
_LABEL = r"(?<![^<>])[^<]++"
_BIN = re.compile(r"<loc_(\d+)>")
_QUAD = re.compile(rf"(?:{_LOCATION}){{8}}")
_BOXES = re.compile(rf"(?:{_LOCATION}){{4,}}")
_LABELED_BOXES = re.compile(rf"({_LABEL})((?:{_LOCATION}){{4,}})")
_POLYGONS = re.compile(rf"{_PIECE}{{4,}}")
_LABELED_POLYGONS = re.compile(rf"{_LABEL}{_PIECE}{{4,}}")
_FIRST_LOCATION = re.compile(rf"\A{_LOCATION}")
_POLYGONS_BEGIN = re.compile(f"<loc_|{POLY}")
_INSTANCE = re.compile(f"{POLY}(.*?){END_POLY}")
_LAST_LOCATIONS = re.compile(rf"(?:{_LOCATION})++\Z")
_REGION = re.compile(r"(?:<loc_(?:0|[1-9][0-9]{0,2})>){4}")
_REGION_FORMS = "<loc_…> four times, or a pixel box [x1,y1,x2,y2]"


def parse_answer(task: Task, token_ids: Sequence[int], processor: Processor, image_size: Size) -> Answer:
    """Reads the answer to `task` from generated tokens.

    Args:
        task: The task that was asked.
        token_ids: As generated, with or without start token, ``<s>``, ``</s>`` and padding.
        processor: The checkpoint's processor.
        image_size: (width, height) of the image as sent, in pixels; coordinates come out in these.

    Returns:
        By the task's kind of answer:

        - text: the text, stripped;
        - quads: ``quad_boxes`` [[x1, y1, …, x4, y4], …], ``labels``;
        - labelled boxes, phrase boxes, boxes: ``bboxes`` [[x1, y1, x2, y2], …], ``labels`` ("" for boxes);
        - polygons: ``polygons``, for each instance a list of polygons [x1, y1, x2, y2, …], and ``labels``;
        - boxes or polygons: ``bboxes``, ``bboxes_labels``, ``polygons``, ``polygons_labels``.
    """
    return _PARSERS[task.answer](_decode(token_ids, processor), image_size, processor.banned_phrases)


def generated_text(token_ids: Sequence[int], processor: Processor) -> str:
    """Returns generated tokens as text, location tokens included, without ``<s>``, ``</s>`` and padding behind."""
    return _without_ends(_decode(token_ids, processor))


def region_text(text: str, image_size: Size) -> str:
    """Returns a region as the model reads it: four location tokens.

    Args:
        text: Four location tokens, left as they are, or a JSON list [x1, y1, x2, y2] in pixels.
        image_size: (width, height) of the image as sent, in pixels.

    Raises:
        ValueError: If it is neither, or if the box is empty or not within the image.
    """
    text = text.strip()
    if _REGION.fullmatch(text):
        return text
    x1, y1, x2, y2 = _read_box(text)
    width, height = image_size
    # NaN and numbers too large for a float fail here too.
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(
            f"the box {_shorten(text)} doesn't lie within the image: expected 0 ≤ x1 < x2 ≤ {width} "
            f"and 0 ≤ y1 < y2 ≤ {height}"
        )
    return "".join(f"<loc_{bin_}>" for bin_ in _quantize((x1, y1, x2, y2), image_size))


def _read_box(text: str) -> list[float]:
    try:
        box = json.loads(text)
    except (ValueError, RecursionError):
        box = None
    if not isinstance(box, list):
        raise ValueError(f"{_shorten(text)} is no region; expected {_REGION_FORMS}")
    if len(box) != 4 or not all(isinstance(number, int | float) and not isinstance(number, bool) for number in box):
        raise ValueError(f"{_shorten(text)} is no box; expected four numbers [x1,y1,x2,y2] in pixels")
    return box


def _shorten(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _quantize(pixels: Sequence[float], size: Size) -> list[int]:
    """Returns the location bins of pixel coordinates x, y, x, y, …, in float32 as transformers does."""
    points = np.asarray(pixels, dtype=np.float32).reshape(-1, 2)
    flat: list[int] = np.clip(points / _pixels_per_bin(size), 0, BINS - 1).astype(np.int64).ravel().tolist()
    return flat


def _dequantize(bins: Sequence[int], size: Size) -> list[int]:
    """Returns pixel coordinates of bins x, y, x, y, …: the middle of each bin, in float32 as transformers does.

    In float64 some come out one pixel apart: of an image 144 wide, the middle of bin 312 would be 45 and not 44.
    """
    points = np.asarray(bins, dtype=np.float32).reshape(-1, 2)
    flat: list[int] = ((points + np.float32(0.5)) * _pixels_per_bin(size)).astype(np.int64).ravel().tolist()
    return flat


def _pixels_per_bin(size: Size) -> np.ndarray[Any, Any]:
    return (np.asarray(size) / BINS).astype(np.float32)


def _decode(token_ids: Sequence[int], processor: Processor) -> str:
    ids = [int(token) for token in token_ids]
    while ids and ids[-1] == processor.pad_token_id:
        ids.pop()
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def _without_ends(text: str) -> str:
    return text.replace("<s>", "").replace("</s>", "")


def _items(text: str) -> str:
    return _without_ends(text).replace("<pad>", "")


def _bins(text: str) -> list[int]:
    return [int(bin_) for bin_ in _BIN.findall(text)]


def _label(text: str) -> str | None:
    """Returns a label without white space around it, or None where a line ends in it or behind it."""
    return None if "\n" in text.lstrip() else text.strip()


def _boxes(text: str, size: Size) -> list[list[int]]:
    """Returns the boxes that a run of locations holds, a rest of fewer than four left out."""
    bins = _bins(text)
    return [_dequantize(bins[start : start + 4], size) for start in range(0, len(bins) - 3, 4)]


def _find_labeled_boxes(text: str, size: Size) -> Iterator[tuple[str, list[int]]]:
    for match in _LABELED_BOXES.finditer(_items(text)):
        label = _label(match[1])
        if label is not None:
            yield from ((label, box) for box in _boxes(match[2], size))


def _find_polygons(text: str, size: Size, *, labeled: bool) -> Iterator[tuple[str, list[list[int]]]]:
    """Yields instances: a label ("" as a rule, where none is expected) and polygons."""
    for match in (_LABELED_POLYGONS if labeled else _POLYGONS).finditer(_items(text)):
        # Without labels, what lies between the first location and the next counts as one.
        item = _FIRST_LOCATION.sub("", match[0])
        begin = _POLYGONS_BEGIN.search(item)
        label = _label(item[: begin.start()]) if begin else None
        if label is None:
            continue
        instances = _INSTANCE.findall(match[0]) if POLY in match[0] and END_POLY in match[0] else [match[0]]
        for instance in instances:
            runs = [_bins(run[0]) for part in instance.split(SEP) if (run := _LAST_LOCATIONS.search(part))]
            if runs:
                yield label, [_dequantize(run[: len(run) // 2 * 2], size) for run in runs]


def _columns(names: tuple[str, str], pairs: Iterator[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    """Returns pairs of a label and places as two lists, called `names`: places first."""
    pairs_list = list(pairs)
    return {names[0]: [places for _, places in pairs_list], names[1]: [label for label, _ in pairs_list]}


def _parse_text(text: str, size: Size, banned: frozenset[str]) -> Answer:
    return _without_ends(text).strip()


def _parse_quads(text: str, size: Size, banned: frozenset[str]) -> Answer:
    return _columns(("quad_boxes", "labels"), _find_quads(text, size))


def _find_quads(text: str, size: Size) -> Iterator[tuple[str, list[int]]]:
    for line in _items(text).split("\n"):
        start = 0
        while quad := _QUAD.search(line, start + 1):  # at least one character is the text
            yield line[start : quad.start()].strip(), _dequantize(_bins(quad[0]), size)
            start = quad.end()


def _parse_labeled_boxes(text: str, size: Size, banned: frozenset[str]) -> Answer:
    return _columns(("bboxes", "labels"), _find_labeled_boxes(text, size))


def _parse_phrase_boxes(text: str, size: Size, banned: frozenset[str]) -> Answer:
    pairs = ((label, box) for label, box in _find_labeled_boxes(text, size) if label not in banned)
    return _columns(("bboxes", "labels"), pairs)


def _parse_boxes(text: str, size: Size, banned: frozenset[str]) -> Answer:
    pairs = (("", box) for run in _BOXES.findall(_items(text)) for box in _boxes(run, size))
    return _columns(("bboxes", "labels"), pairs)


def _parse_polygons(text: str, size: Size, banned: frozenset[str]) -> Answer:
    return _columns(("polygons", "labels"), _find_polygons(text, size, labeled=False))


def _parse_boxes_or_polygons(text: str, size: Size, banned: frozenset[str]) -> Answer:
    is_polygons = POLY in text
    boxes = iter(()) if is_polygons else _find_labeled_boxes(text, size)
    polygons = _find_polygons(text, size, labeled=True) if is_polygons else iter(())
    return _columns(("bboxes", "bboxes_labels"), boxes) | _columns(("polygons", "polygons_labels"), polygons)


_PARSERS: dict[AnswerKind, Callable[[str, Size, frozenset[str]], Answer]] = {
    AnswerKind.TEXT: _parse_text,
    AnswerKind.QUADS: _parse_quads,
    AnswerKind.LABELED_BOXES: _parse_labeled_boxes,
    AnswerKind.PHRASE_BOXES: _parse_phrase_boxes,
    AnswerKind.BOXES: _parse_boxes,
    AnswerKind.POLYGONS: _parse_polygons,
    AnswerKind.BOXES_OR_POLYGONS: _parse_boxes_or_polygons,
}
