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

import codecs
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, assert_never

import numpy as np

from florence2_kserve.tasks import AnswerKind, Task

if TYPE_CHECKING:
    from florence2_kserve.processor import Processor

# A text, or lists that run in parallel, such as {"bboxes": [[x1, y1, x2, y2], ...], "labels": [...]}.
Answer: TypeAlias = str | dict[str, list[Any]]
Scores: TypeAlias = dict[str, float | list[float]]
Size: TypeAlias = tuple[int, int]  # width, height
Span: TypeAlias = tuple[int, int]  # begin and end in a text

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
FEWEST_COORDINATES = 6  # of a polygon with an area
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
    text = _decode(token_ids, processor)
    if task.answer is AnswerKind.TEXT:
        return _without_ends(text).strip()
    answer: dict[str, list[Any]] = {}
    for column in _columns(task, _items(text), image_size, processor.banned_phrases):
        answer[column.places] = [item.place for item in column.items]
        answer[column.labels] = [item.label for item in column.items]
    return answer


def score_answer(
    task: Task, token_ids: Sequence[int], token_logprobs: Sequence[float], processor: Processor, image_size: Size
) -> Scores:
    """Returns how sure the model was of each part of the answer that ``parse_answer`` reads.

    A part's score is the geometric mean of its tokens' probabilities, exp(mean log-probability), so that
    a long label isn't less sure for its length alone. transformers' processor gives none.

    Args:
        task: The task that was asked.
        token_ids: T tokens, as for ``parse_answer``.
        token_logprobs: T log-probabilities.
        processor: The checkpoint's processor.
        image_size: (width, height) of the image as sent, in pixels.

    Returns:
        For a text ``text``; for others, lists under the answer's own names, parallel to its lists: of a place
        for its location tokens, of a label for its own, 1 where it is empty. All between 0 and 1.
    """
    tokens = _TokenText(token_ids, token_logprobs, processor)
    if task.answer is AnswerKind.TEXT:
        tokens.remove("<s>", "</s>")
        return {"text": tokens.score((0, len(tokens.text)))}
    tokens.remove("<s>", "</s>", "<pad>")
    scores: Scores = {}
    for column in _columns(task, tokens.text, image_size, processor.banned_phrases):
        scores[column.places] = [tokens.score(item.place_span) for item in column.items]
        scores[column.labels] = [tokens.score(item.label_span) for item in column.items]
    return scores


def mask_answer(answer: Answer, image_size: Size) -> dict[str, list[Any]]:
    """Returns the polygons of an answer as masks, in COCO's compressed run-length code.

    Args:
        answer: As ``parse_answer`` gives it.
        image_size: (width, height) of the image as sent, in pixels.

    Returns:
        ``masks``, for each instance of the answer's polygons ``{"size": [height, width], "counts": "…"}`` as
        ``pycocotools.mask`` reads it, and ``labels``; empty lists where there are no polygons. A polygon without an
        area, such as one of two points, adds nothing to its instance's mask.
    """
    if not isinstance(answer, dict) or "polygons" not in answer:
        return {"masks": [], "labels": []}
    labels = answer["polygons_labels"] if "polygons_labels" in answer else answer["labels"]
    return {"masks": [run_lengths(instance, image_size) for instance in answer["polygons"]], "labels": labels}


def run_lengths(polygons: Sequence[Sequence[float]], size: Size) -> dict[str, Any]:
    """Returns one instance's polygons as a mask, as ``mask_answer`` does.

    Args:
        polygons: [x1, y1, x2, y2, …] each, in pixels.
        size: (width, height) of the image as sent, in pixels.
    """
    from pycocotools import mask

    width, height = size
    # pycocotools takes four numbers for a box, and no polygon at all for an error.
    areas = [list(polygon) for polygon in polygons if len(polygon) >= FEWEST_COORDINATES] or [[0] * FEWEST_COORDINATES]
    runs = mask.merge(mask.frPyObjects(areas, height, width))
    return {"size": [height, width], "counts": runs["counts"].decode()}


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


@lru_cache(maxsize=64)
def _pixels_per_bin(size: Size) -> np.ndarray[Any, Any]:
    return (np.asarray(size) / BINS).astype(np.float32)


def _decode(token_ids: Sequence[int], processor: Processor) -> str:
    return processor.tokenizer.decode(_without_padding(token_ids, processor), skip_special_tokens=False)


def _without_padding(token_ids: Sequence[int], processor: Processor) -> list[int]:
    ids = [int(token) for token in token_ids]
    while ids and ids[-1] == processor.pad_token_id:
        ids.pop()
    return ids


class _TokenText:
    """Generated tokens as text that knows which token each character came from.

    Attributes:
        text: As the tokenizer decodes the tokens, less what was removed.
    """

    def __init__(self, token_ids: Sequence[int], token_logprobs: Sequence[float], processor: Processor) -> None:
        ids = _without_padding(token_ids, processor)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces: list[str] = []
        self._begins: list[int] = []  # of each token in the text; one that only begins a character begins with it
        length = 0
        for id_ in ids:
            self._begins.append(length)
            pieces.append(decoder.decode(processor.token_bytes(id_)))
            length += len(pieces[-1])
        pieces.append(decoder.decode(b"", final=True))
        self.text = "".join(pieces)
        self._logprobs = token_logprobs
        self._origins: Sequence[int] = range(len(self.text) + 1)  # where each character was before any was removed

    def remove(self, *pieces: str) -> None:
        """Removes each of `pieces` wherever it occurs, one after the other, as ``str.replace`` does."""
        for piece in pieces:
            at = self.text.find(piece)
            if at < 0:
                continue
            origins: list[int] = []
            kept: list[str] = []
            begin = 0
            while at >= 0:
                kept.append(self.text[begin:at])
                origins.extend(self._origins[begin:at])
                begin = at + len(piece)
                at = self.text.find(piece, begin)
            kept.append(self.text[begin:])
            origins.extend(self._origins[begin:])
            self.text, self._origins = "".join(kept), origins

    def score(self, span: Span) -> float:
        """Returns the geometric mean of the probabilities of the tokens in `span`, white space at its ends aside.

        Where there are none it is 1.
        """
        written = self.text[slice(*span)]
        begin = span[0] + len(written) - len(written.lstrip())
        end = begin + len(written.strip())
        if begin >= end:
            return 1.0
        # The token in which the first character lies, to the one in which the last lies.
        first = bisect_right(self._begins, self._origins[begin]) - 1
        while first > 0 and self._begins[first - 1] == self._begins[first]:
            first -= 1  # its bytes lie in several tokens
        last = bisect_left(self._begins, self._origins[end - 1] + 1)
        logprobs = [float(logprob) for logprob in self._logprobs[first:last]]
        return math.exp(math.fsum(logprobs) / len(logprobs))


def _without_ends(text: str) -> str:
    return text.replace("<s>", "").replace("</s>", "")


def _items(text: str) -> str:
    return _without_ends(text).replace("<pad>", "")


class _Item(NamedTuple):
    """A place and its label, each with where it is written: begin and end in the text."""

    place: list[Any]
    label: str
    place_span: Span
    label_span: Span


def _label(text: str) -> str | None:
    """Returns a label without white space around it, or None where a line ends in it or behind it."""
    return None if "\n" in text.lstrip() else text.strip()


def _boxes(text: str, begin: int, end: int, size: Size) -> Iterator[tuple[list[int], Span]]:
    """Yields the boxes that a run of locations holds, a rest of fewer than four left out."""
    bins = list(_BIN.finditer(text, begin, end))
    for start in range(0, len(bins) - 3, 4):
        box = bins[start : start + 4]
        yield _dequantize([int(bin_[1]) for bin_ in box], size), (box[0].start(), box[-1].end())


def _find_text(text: str, size: Size) -> Iterator[_Item]:
    yield _Item([], text.strip(), (0, 0), (0, len(text)))


def _find_labeled_boxes(text: str, size: Size) -> Iterator[_Item]:
    for match in _LABELED_BOXES.finditer(text):
        label = _label(match[1])
        if label is not None:
            yield from (_Item(box, label, span, match.span(1)) for box, span in _boxes(text, *match.span(2), size))


def _find_boxes(text: str, size: Size) -> Iterator[_Item]:
    for match in _BOXES.finditer(text):
        yield from (_Item(box, "", span, (0, 0)) for box, span in _boxes(text, *match.span(), size))


def _find_quads(text: str, size: Size) -> Iterator[_Item]:
    begin = 0
    for line in text.split("\n"):
        start = 0
        while quad := _QUAD.search(line, start + 1):  # at least one character is the text
            place = _dequantize([int(bin_) for bin_ in _BIN.findall(quad[0])], size)
            place_span, label_span = quad.span(), (start, quad.start())
            yield _Item(place, line[slice(*label_span)].strip(), _moved(place_span, begin), _moved(label_span, begin))
            start = quad.end()
        begin += len(line) + 1


def _find_polygons(text: str, size: Size, *, labeled: bool = False) -> Iterator[_Item]:
    """Yields instances: a label ("" as a rule, where none is expected) and polygons."""
    for match in (_LABELED_POLYGONS if labeled else _POLYGONS).finditer(text):
        # Without labels, what lies between the first location and the next counts as one.
        first = _FIRST_LOCATION.match(match[0])
        item_begin = match.start() + (first.end() if first else 0)
        begin = _POLYGONS_BEGIN.search(text, item_begin, match.end())
        label = _label(text[item_begin : begin.start()]) if begin else None
        if begin is None or label is None:
            continue
        instances = [(begin.start() if labeled else match.start(), match.end())]
        if POLY in match[0] and END_POLY in match[0]:
            instances = [instance.span(1) for instance in _INSTANCE.finditer(text, *match.span())]
        for span in instances:
            parts = text[slice(*span)].split(SEP)
            runs = [_bins(run[0]) for part in parts if (run := _LAST_LOCATIONS.search(part))]
            if runs:
                polygons = [_dequantize(run[: len(run) // 2 * 2], size) for run in runs]
                yield _Item(polygons, label, span, (item_begin, begin.start()))


def _bins(text: str) -> list[int]:
    return [int(bin_) for bin_ in _BIN.findall(text)]


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


class _Column(NamedTuple):
    """A pair of parallel lists of an answer, and the items in them."""

    places: str
    labels: str
    items: list[_Item]


def _columns(task: Task, text: str, size: Size, banned: frozenset[str]) -> list[_Column]:
    """Finds the items of an answer that has any: `text` is clean of ends and padding."""
    match task.answer:
        case AnswerKind.QUADS:
            return [_Column("quad_boxes", "labels", list(_find_quads(text, size)))]
        case AnswerKind.LABELED_BOXES:
            return [_Column("bboxes", "labels", list(_find_labeled_boxes(text, size)))]
        case AnswerKind.PHRASE_BOXES:
            items = [item for item in _find_labeled_boxes(text, size) if item.label not in banned]
            return [_Column("bboxes", "labels", items)]
        case AnswerKind.BOXES:
            return [_Column("bboxes", "labels", list(_find_boxes(text, size)))]
        case AnswerKind.POLYGONS:
            return [_Column("polygons", "labels", list(_find_polygons(text, size)))]
        case AnswerKind.BOXES_OR_POLYGONS:
            is_polygons = POLY in text
            boxes = [] if is_polygons else list(_find_labeled_boxes(text, size))
            polygons = list(_find_polygons(text, size, labeled=True)) if is_polygons else []
            return [_Column("bboxes", "bboxes_labels", boxes), _Column("polygons", "polygons_labels", polygons)]
        case AnswerKind.TEXT:
            return []
    assert_never(task.answer)
