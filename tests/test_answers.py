"""Answers against transformers' own post-processing, over many thousands of token strings, odd ones included."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_codec
from tokenizers import Tokenizer
from transformers.models.florence2.processing_florence2 import Florence2Processor

from florence2_kserve.answers import (
    Answer,
    _dequantize,
    _quantize,
    _TokenText,
    generated_text,
    mask_answer,
    parse_answer,
    region_text,
    score_answer,
)
from florence2_kserve.model_files import EMBEDDED, locate_model
from florence2_kserve.processor import Processor
from florence2_kserve.tasks import TASKS, AnswerKind, Task, find_task

from .small_processor import native_folder, their_processor

STRINGS_PER_TASK = 1400
LOCATION_SIZES = [(1, 1), (32, 20), (144, 688), (640, 480), (768, 768), (4000, 3000), (17, 4096)]
START, BOS, EOS, PAD = 2, 0, 2, 1
OVERLONG = re.compile(r"<loc_\d{7}")

WORDS = [
    *"a the red blue circle square car dog left of two it image STOP 12 tree café naïve é x<y i>j".split() * 8,
    *("日本", "语", "\u00a0", "🙂"),
]
LABELS = [
    "a red circle",
    " dog",
    "it",
    "the image",
    "a group ",
    "I",
    "café",
    "日本語",
    "naïve élan",
    "\u00a0it",
    "éit",
    "two\nlines",
    "\nleading line",
    "trailing line\n",
    "\n",
    " ",
    "a < b",
    "i > j",
    ">>",
    "tab\tand\rreturn",
    "line\u2028separator",
]
# Ordinary tokens that spell what looks like special ones, cut where no special token is seen.
SPELLED = [
    ("<lo", "c_5>"),
    ("<loc", "_0007>"),
    ("<loc_", "1234>"),
    ("<loc_", "٣>"),
    ("<gro", "und>"),
    ("<ob", "j>"),
    ("<o", "d>"),
    ("</bbo", "x>"),
    ("<po", "ly>"),
    ("</po", "ly>"),
    ("<se", "p>"),
    ("<", "s>"),
    ("</", "s>"),
    ("<pa", "d>"),
    ("<", "<"),
    ("</", "/"),
]
STRAY = "<s> </s> <pad> <sep> <poly> </poly> <and> <od> </od> <cap> <grounding> <unk> <mask> <image>".split()


@dataclass
class Writer:
    """Writes random answers as token ids: by each kind's grammar, spoilt in half of the cases.

    Attributes:
        tokenizer: Vocabulary.
        random: Source of chance.
    """

    tokenizer: Tokenizer
    random: random.Random
    ordinary: list[int] = field(init=False)
    partial: frozenset[int] = field(init=False)
    _ids: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        special = self.tokenizer.get_added_tokens_decoder()
        self.ordinary = [id_ for id_ in sorted(self.tokenizer.get_vocab().values()) if id_ not in special]
        # Tokens with only some of a character's bytes.
        self.partial = frozenset(id_ for id_ in self.ordinary if "\ufffd" in self.tokenizer.decode([id_]))

    def encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._ids[text]

    def write(self, kind: AnswerKind) -> list[int]:
        choose = self.random.random
        written = kind if choose() < 0.85 else self.random.choice(list(AnswerKind))
        ids = [] if choose() < 0.02 else self._GRAMMAR[written](self)
        if choose() < 0.5:
            ids = self._spoil(ids)
        if choose() < 0.9:  # as generated
            return [START, BOS, *ids, EOS, *[PAD] * self.random.choice([0, 0, 0, 1, 7])]
        return [*[BOS] * self.random.randint(0, 1), *ids, *[EOS] * self.random.randint(0, 2)] or [EOS]

    def _locations(self, count: int) -> list[int]:
        first = self.tokenizer.token_to_id("<loc_0>")
        return [first + self.random.randrange(1000) for _ in range(count)]

    def _some_locations(self, unit: int) -> list[int]:
        """Mostly a whole number of units, sometimes one or two more or less."""
        odd = self.random.choice([0, 0, 0, 0, -2, -1, 1, 2])
        return self._locations(max(0, unit * self.random.choice([1, 1, 1, 2, 3]) + odd))

    def _words(self, at_most: int) -> list[int]:
        return self.encode(" ".join(self.random.choices(WORDS, k=self.random.randint(1, at_most))))

    def _label(self) -> list[int]:
        return self.encode(self.random.choice(LABELS)) if self.random.random() < 0.6 else self._words(3)

    def _text(self) -> list[int]:
        return self._words(12)

    def _repeat(self, *parts: Callable[[], list[int]]) -> list[int]:
        return [id_ for _ in range(self.random.randint(1, 4)) for part in parts for id_ in part()]

    def _labeled_boxes(self) -> list[int]:
        return self._repeat(self._label, lambda: self._some_locations(4))

    def _quads(self) -> list[int]:
        return self._repeat(self._label, lambda: self._locations(self.random.choice([8, 8, 8, 8, 8, 7, 9, 16])))

    def _boxes(self) -> list[int]:
        return self._repeat(lambda: self._some_locations(4))

    def _shape(self) -> list[int]:
        """Polygons between separators, mostly within <poly> and </poly>."""
        sep, begin, end = (self.tokenizer.token_to_id(token) for token in ("<sep>", "<poly>", "</poly>"))
        ids: list[int] = []
        for _ in range(self.random.randint(1, 3)):
            ids += [*self._some_locations(6), *[sep] * (self.random.random() < 0.4)]
        return [begin, *ids, end] if self.random.random() < 0.6 else ids

    def _polygons(self) -> list[int]:
        return self._repeat(self._shape)

    def _boxes_or_polygons(self) -> list[int]:
        return self._repeat(self._label, self._shape) if self.random.random() < 0.6 else self._labeled_boxes()

    def _spoil(self, ids: list[int]) -> list[int]:
        """Drops, doubles, swaps, cuts or slips in one to three tokens or spelled-out markers."""
        ids = list(ids)
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randint(0, len(ids))
            match self.random.randrange(8):
                case 0:
                    del ids[at : at + self.random.randint(1, 2)]
                case 1:
                    ids[at:at] = ids[at : at + self.random.randint(1, 3)]
                case 2:
                    ids[at:at] = [self.random.choice(self.ordinary)]
                case 3:
                    ids[at:at] = self.encode(self.random.choice("\n < > <loc_7> <loc_".split(" ")))
                case 4 | 5:
                    ids[at:at] = [self.tokenizer.token_to_id(self.random.choice(STRAY)) or PAD]
                case 6:
                    for piece in self.random.choice(SPELLED):
                        encoded = self.encode(piece)
                        ids[at:at] = encoded
                        at += len(encoded)
                case 7:
                    other = self.random.randint(0, len(ids))
                    ids[min(at, other) : max(at, other)] = reversed(ids[min(at, other) : max(at, other)])
        return ids

    _GRAMMAR: ClassVar[dict[AnswerKind, Callable[[Writer], list[int]]]] = {
        AnswerKind.TEXT: _text,
        AnswerKind.QUADS: _quads,
        AnswerKind.LABELED_BOXES: _labeled_boxes,
        AnswerKind.PHRASE_BOXES: _labeled_boxes,
        AnswerKind.BOXES: _boxes,
        AnswerKind.POLYGONS: _polygons,
        AnswerKind.BOXES_OR_POLYGONS: _boxes_or_polygons,
    }


@dataclass
class Tally:
    """What a comparison has seen."""

    compared: Counter[str] = field(default_factory=Counter)
    with_content: Counter[str] = field(default_factory=Counter)
    split_characters: int = 0

    def __str__(self) -> str:
        least, name = min((self.with_content[name] / count, name) for name, count in self.compared.items())
        return (
            f"{self.compared.total()} strings compared, {self.with_content.total()} with content, at least "
            f"{least:.0%} ({name}); {self.split_characters} with characters split between tokens"
        )


def has_content(answer: Answer) -> bool:
    return bool(answer) if isinstance(answer, str) else any(answer.values())


def as_transformers_labels(answer: Answer, task: Task) -> Answer:
    """Returns the answer with what transformers drops from the labels of boxes dropped too."""
    if isinstance(answer, str) or task.answer in (AnswerKind.QUADS, AnswerKind.POLYGONS):
        return answer
    key = "bboxes_labels" if task.answer is AnswerKind.BOXES_OR_POLYGONS else "labels"
    return answer | {key: [label.encode("ascii", "ignore").decode() for label in answer[key]]}


def compare(processor: Processor, theirs: Florence2Processor, strings_per_task: int, seed: int) -> Tally:
    """Asserts that our answers equal transformers' for random strings of every task."""
    writer = Writer(processor.tokenizer, random.Random(seed))
    tally = Tally()
    for task in TASKS.values():
        for _ in range(strings_per_task):
            ids = writer.write(task.answer)
            if OVERLONG.search(processor.tokenizer.decode(ids)):
                continue  # transformers' integers overflow
            size = writer.random.choice(LOCATION_SIZES)
            answer = parse_answer(task, ids, processor, size)
            while task.answer is AnswerKind.TEXT and ids[-1] == PAD:
                ids.pop()  # transformers takes padding for text
            given: dict[str, Any] = {"sequence": ids}
            if not writer.partial.isdisjoint(ids):
                # Decoded together: token by token, transformers makes U+FFFD of them.
                given = {"text": theirs.tokenizer.decode(ids, skip_special_tokens=False)}
                tally.split_characters += 1
            expected = theirs.post_process_generation(**given, task=task.name, image_size=size)[task.name]
            assert as_transformers_labels(answer, task) == expected, (task.name, given, ids)
            tally.compared[task.name] += 1
            tally.with_content[task.name] += has_content(answer)
    return tally


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Processor, Florence2Processor]:
    folder = tmp_path_factory.mktemp("native")
    return Processor.load(native_folder(folder)), their_processor(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def processor(pair: tuple[Processor, Florence2Processor]) -> Processor:
    return pair[0]


def test_answers_equal_those_of_transformers(pair: tuple[Processor, Florence2Processor]) -> None:
    tally = compare(*pair, STRINGS_PER_TASK, seed=0)
    print(tally)
    assert tally.compared.total() >= 20_000
    assert len(tally.compared) == 15
    assert 1000 < tally.split_characters < tally.compared.total() / 2
    for name, count in tally.compared.items():
        assert tally.with_content[name] >= count / 2, name


def test_answers_of_the_embedded_model_equal_those_of_transformers() -> None:
    files = locate_model(EMBEDDED, with_weights=False)
    processor = Processor.load(files)
    theirs = their_processor(files.folder / "tokenizer.json", processor.banned_phrases)
    tally = compare(processor, theirs, strings_per_task=150, seed=1)
    print(tally)
    assert len(tally.compared) == 15
    assert all(tally.with_content[name] >= count / 2 for name, count in tally.compared.items())


def test_pixels_of_every_bin_equal_those_of_transformers(pair: tuple[Processor, Florence2Processor]) -> None:
    theirs = pair[1].post_processor
    bins = torch.arange(1000).repeat_interleave(2).reshape(-1, 2)
    for width in range(1, 4097):
        size = (width, 4097 - width)
        assert _dequantize(bins.flatten().tolist(), size) == theirs.dequantize(bins, size).flatten().tolist(), size


def test_bins_of_every_pixel_equal_those_of_transformers(pair: tuple[Processor, Florence2Processor]) -> None:
    theirs = pair[1].post_processor
    for side in range(1, 4097):
        pixels = np.arange(side + 1, dtype=np.float64).repeat(2)
        pixels[2::2] -= 0.25  # x between pixels, y on them
        points = torch.tensor(pixels.reshape(-1, 2), dtype=torch.float32)
        expected = theirs.quantize(points, (side, side)).flatten()
        assert np.array_equal(_quantize(pixels, (side, side)), expected.numpy()), side


def encode(processor: Processor, text: str) -> list[int]:
    """Returns the tokens of an answer as generated."""
    return [START, BOS, *processor.tokenizer.encode(text, add_special_tokens=False).ids, EOS]


def answer_both(pair: tuple[Processor, Florence2Processor], task: str, text: str) -> tuple[Answer, Answer]:
    """Returns our answer and transformers'."""
    processor, theirs = pair
    ids = encode(processor, text)
    expected = theirs.post_process_generation(sequence=ids, task=task, image_size=(1000, 1000))
    return parse_answer(find_task(task), ids, processor, (1000, 1000)), expected[task]


BOX, OTHER_BOX = "<loc_1><loc_2><loc_3><loc_4>", "<loc_5><loc_6><loc_7><loc_8>"


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("<CAPTION>", " a red circle ", "a red circle"),
        ("<OCR>", "STOP<loc_5>", "STOP<loc_5>"),
        ("<OD>", f"car{BOX}dog{OTHER_BOX}", {"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["car", "dog"]}),
        ("<OD>", f"car{BOX}{OTHER_BOX}", {"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["car", "car"]}),
        ("<OD>", f"two\nlines{BOX}dog{OTHER_BOX}", {"bboxes": [[5, 6, 7, 8]], "labels": ["dog"]}),
        ("<OD>", f"car\n{BOX}", {"bboxes": [], "labels": []}),
        ("<OD>", f"\ncar{BOX}", {"bboxes": [[1, 2, 3, 4]], "labels": ["car"]}),
        ("<OD>", f"car{BOX}<loc_5>", {"bboxes": [[1, 2, 3, 4]], "labels": ["car"]}),
        ("<OD>", "car<loc_1><loc_2><loc_3>", {"bboxes": [], "labels": []}),
        ("<OD>", f"<loc_0>{BOX}", {"bboxes": [[1, 2, 3, 4]], "labels": ["loc_0>"]}),
        ("<OD>", f"a < b{BOX}", {"bboxes": [[1, 2, 3, 4]], "labels": ["b"]}),
        ("<OD>", "", {"bboxes": [], "labels": []}),
        ("<CAPTION_TO_PHRASE_GROUNDING>", f"it{BOX}cat{OTHER_BOX}", {"bboxes": [[5, 6, 7, 8]], "labels": ["cat"]}),
        ("<REGION_PROPOSAL>", f"{BOX}{OTHER_BOX}", {"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "labels": ["", ""]}),
        (
            "<OCR_WITH_REGION>",
            f"HI 5{BOX}{OTHER_BOX}",
            {"quad_boxes": [[1, 2, 3, 4, 5, 6, 7, 8]], "labels": ["HI 5"]},
        ),
        (
            "<REFERRING_EXPRESSION_SEGMENTATION>",
            f"{BOX}<loc_9><sep>{OTHER_BOX}",
            {"polygons": [[[1, 2, 3, 4], [5, 6, 7, 8]]], "labels": [""]},
        ),
        (
            "<OPEN_VOCABULARY_DETECTION>",
            f"car<poly>{BOX}</poly><poly>{OTHER_BOX}</poly>",
            {
                "bboxes": [],
                "bboxes_labels": [],
                "polygons": [[[1, 2, 3, 4]], [[5, 6, 7, 8]]],
                "polygons_labels": ["car", "car"],
            },
        ),
        (
            "<OPEN_VOCABULARY_DETECTION>",
            f"car{BOX}",
            {"bboxes": [[1, 2, 3, 4]], "bboxes_labels": ["car"], "polygons": [], "polygons_labels": []},
        ),
    ],
)
def test_examples(pair: tuple[Processor, Florence2Processor], task: str, text: str, expected: Answer) -> None:
    assert answer_both(pair, task, text) == (expected, expected)


@pytest.mark.parametrize(
    ("task", "text", "labels", "their_labels"),
    [
        ("<OD>", f"café{BOX}", ["café"], ["caf"]),
        ("<OD>", f"日本{BOX}", ["日本"], [""]),
        ("<CAPTION_TO_PHRASE_GROUNDING>", f"naïve 🙂{BOX}", ["naïve 🙂"], ["nave "]),
        ("<OPEN_VOCABULARY_DETECTION>", f"café{BOX}", ["café"], ["caf"]),
        ("<OCR_WITH_REGION>", f"日本{BOX}{BOX}", ["日本"], ["\ufffd" * 6]),
    ],
)
def test_characters_survive_that_transformers_loses(
    pair: tuple[Processor, Florence2Processor], task: str, text: str, labels: list[str], their_labels: list[str]
) -> None:
    answer, expected = answer_both(pair, task, text)
    key = "bboxes_labels" if "bboxes_labels" in answer else "labels"
    assert isinstance(answer, dict)
    assert isinstance(expected, dict)
    assert (answer[key], expected[key]) == (labels, their_labels)
    assert {**answer, key: []} == {**expected, key: []}


def test_characters_split_between_tokens_survive_in_texts(pair: tuple[Processor, Florence2Processor]) -> None:
    answer, expected = answer_both(pair, "<CAPTION>", "the word 日本 on a café")
    assert answer == "the word 日本 on a café"
    assert expected == f"the word {chr(0xFFFD) * 6} on a café"


def test_a_character_cut_off_by_the_limit_becomes_a_replacement_character(processor: Processor) -> None:
    ids = encode(processor, "at 日本")[:-2]
    assert parse_answer(find_task("<CAPTION>"), ids, processor, (9, 9)) == "at 日\ufffd"


def test_padding_is_no_text(pair: tuple[Processor, Florence2Processor]) -> None:
    processor, theirs = pair
    ids = [*encode(processor, "a dog"), PAD, PAD]
    expected = theirs.post_process_generation(sequence=ids, task="<CAPTION>", image_size=(9, 9))
    assert expected == {"<CAPTION>": "a dog<pad><pad>"}
    assert parse_answer(find_task("<CAPTION>"), ids, processor, (9, 9)) == "a dog"


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("ids", [[], [EOS], [START, BOS, EOS], [PAD, PAD], [START, BOS, EOS, PAD]], ids=str)
def test_an_answer_may_be_empty(processor: Processor, task: Task, ids: list[int]) -> None:
    assert not has_content(parse_answer(task, ids, processor, (640, 480)))


def test_numpy_tokens_are_tokens(processor: Processor) -> None:
    ids = list(np.array(encode(processor, f"car{BOX}")))
    assert parse_answer(find_task("<OD>"), ids, processor, (1000, 1000)) == {
        "bboxes": [[1, 2, 3, 4]],
        "labels": ["car"],
    }


def test_an_endless_location_is_text(pair: tuple[Processor, Florence2Processor]) -> None:
    processor, theirs = pair
    ids = encode(processor, f"car{BOX}<lo") + encode(processor, f"c_{'1' * 5000}>{BOX}")[2:]
    assert parse_answer(find_task("<OD>"), ids, processor, (1000, 1000)) == {
        "bboxes": [[1, 2, 3, 4], [1, 2, 3, 4]],
        "labels": ["car", f"loc_{'1' * 5000}>"],
    }
    with pytest.raises(ValueError, match="Exceeds the limit"):
        theirs.post_process_generation(sequence=ids, task="<OD>", image_size=(1000, 1000))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
@pytest.mark.parametrize("filler", ["ab ", "<<", "a>", "<loc_1>", "<loc_1>\n", "<poly><loc_1>", " \n"])
def test_long_answers_without_an_end_take_no_time(processor: Processor, task: Task, filler: str) -> None:
    ids = encode(processor, filler * (1000 if "loc" in filler else 10_000))
    started = time.process_time()
    parse_answer(task, ids, processor, (640, 480))
    assert time.process_time() - started < 3


def test_generated_text_keeps_locations_and_leaves_out_the_ends(processor: Processor) -> None:
    assert generated_text([*encode(processor, f" café{BOX}"), PAD], processor) == f" café{BOX}"


def test_transformers_reads_the_same_answer_from_the_generated_text(
    pair: tuple[Processor, Florence2Processor],
) -> None:
    processor, theirs = pair
    ids = encode(processor, f"car{BOX}a dog{OTHER_BOX}")
    expected = theirs.post_process_generation(text=generated_text(ids, processor), task="<OD>", image_size=(640, 480))
    assert {"<OD>": parse_answer(find_task("<OD>"), ids, processor, (640, 480))} == expected


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("<loc_0><loc_52><loc_332><loc_999>", (10, 10), "<loc_0><loc_52><loc_332><loc_999>"),
        (" <loc_9><loc_9><loc_9><loc_9>\n", (10, 10), "<loc_9><loc_9><loc_9><loc_9>"),
        ("[50, 48, 150, 147]", (500, 375), "<loc_100><loc_128><loc_300><loc_392>"),
        ("[0, 0, 640, 480]", (640, 480), "<loc_0><loc_0><loc_999><loc_999>"),
        ("[0.5,1e0,2.25,3]", (4, 4), "<loc_124><loc_249><loc_562><loc_749>"),
        ("[0, 0, 1, 1]", (1, 1), "<loc_0><loc_0><loc_999><loc_999>"),
    ],
)
def test_regions(text: str, size: tuple[int, int], expected: str) -> None:
    assert region_text(text, size) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no region; expected <loc_…> four times, or a pixel box"),
        ("in the middle", "'in the middle' is no region"),
        ("<loc_1><loc_2><loc_3>", "is no region"),
        ("<loc_1><loc_2><loc_3><loc_4><loc_5>", "is no region"),
        ("<loc_1><loc_2><loc_3><loc_1000>", "is no region"),
        ("<loc_1><loc_2><loc_3><loc_04>", "is no region"),
        ("<loc_1><loc_2><loc_3><loc_٣>", "is no region"),
        ("<loc_1><loc_2><loc_3><loc_4></s>", "is no region"),
        ("[1, 2, 3, 4", "is no region"),
        ('{"x1": 1}', "is no region"),
        ("null", "is no region"),
        ("[" * 100_000, "is no region"),
        ("[1, 2, 3]", "is no box; expected four numbers"),
        ("[1, 2, 3, 4, 5]", "is no box"),
        ('["1", 2, 3, 4]', "is no box"),
        ("[true, 2, 3, 4]", "is no box"),
        ("[[1, 2, 3, 4]]", "is no box"),
        ("[1, 2, NaN, 4]", "doesn't lie within the image"),
        ("[1, 2, Infinity, 4]", "doesn't lie within the image"),
        (f"[1, 2, 1{'0' * 400}, 4]", "doesn't lie within the image"),
        ("[-1, 2, 3, 4]", "doesn't lie within the image: expected 0 ≤ x1 < x2 ≤ 640 and 0 ≤ y1 < y2 ≤ 480"),
        ("[1, 2, 641, 4]", "doesn't lie within the image"),
        ("[1, 2, 3, 480.5]", "doesn't lie within the image"),
        ("[3, 2, 3, 4]", "doesn't lie within the image"),
        ("[1, 4, 3, 2]", "doesn't lie within the image"),
    ],
)
def test_what_is_no_region_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        region_text(text, (640, 480))
    assert len(str(caught.value)) < 300


def test_regions_of_random_boxes_equal_those_of_transformers(pair: tuple[Processor, Florence2Processor]) -> None:
    chance = random.Random(0)
    for _ in range(2000):
        width, height = size = chance.randint(1, 5000), chance.randint(1, 5000)
        (x1, x2), (y1, y2) = (sorted(chance.uniform(0, side) for _ in "12") for side in size)
        bins = pair[1].post_processor.quantize(torch.tensor([[x1, y1, x2, y2]]), (width, height))[0].tolist()
        assert region_text(json.dumps([x1, y1, x2, y2]), size) == "".join(f"<loc_{bin_}>" for bin_ in bins)


def test_scores_are_read_from_the_tokens_of_each_part(pair):
    """Hand-made: of every token's log-probability one knows which part it belongs to."""
    processor, _ = pair
    label, box, other = _ids(processor, " a dog"), _locations(processor, 1, 2, 3, 4), _ids(processor, "cat")
    second, third = _locations(processor, 5, 6, 7, 8), _locations(processor, 9, 10, 11, 12)
    parts = [
        ([START, BOS], 0.0),
        (label, -1.0),
        (box, -2.0),
        (second, -3.0),
        (other, -4.0),
        (third, -5.0),
        ([EOS], -9.0),
    ]
    ids = [id_ for part, _ in parts for id_ in part]
    logprobs = [logprob for part, logprob in parts for _ in part]
    answer = parse_answer(TASKS["<OD>"], ids, processor, (1000, 1000))
    assert answer["labels"] == ["a dog", "a dog", "cat"]
    scores = score_answer(TASKS["<OD>"], [*ids, PAD, PAD], [*logprobs, 0.0, 0.0], processor, (1000, 1000))
    assert scores == {
        "bboxes": pytest.approx([math.exp(-2), math.exp(-3), math.exp(-5)]),
        "labels": pytest.approx([math.exp(-1), math.exp(-1), math.exp(-4)]),
    }


def test_a_score_is_the_geometric_mean_over_its_tokens(pair):
    processor, _ = pair
    words = _ids(processor, "a red dog and a blue cat")
    logprobs = [-(n + 1.0) for n in range(len(words))]
    scores = score_answer(TASKS["<CAPTION>"], [BOS, *words, EOS], [0.0, *logprobs, -50.0], processor, (10, 10))
    assert scores == {"text": pytest.approx(math.exp(sum(logprobs) / len(words)))}


@pytest.mark.parametrize("ended", [True, False], ids=["whole", "cut off"])
def test_a_polygons_score_is_without_its_label(pair, ended):
    processor, _ = pair
    begin, end = (processor.tokenizer.token_to_id(token) for token in ("<poly>", "</poly>"))
    label, places = _ids(processor, "red circle"), _locations(processor, 1, 2, 3, 4, 5, 6)
    ids = [*label, begin, *places, *([end] if ended else [])]
    logprobs = [-3.0 if id_ in label else -1.0 for id_ in ids]
    scores = score_answer(TASKS["<OPEN_VOCABULARY_DETECTION>"], ids, logprobs, processor, (100, 100))
    assert scores["polygons"] == pytest.approx([math.exp(-1)])
    assert scores["polygons_labels"] == pytest.approx([math.exp(-3)])


def test_what_has_no_tokens_has_the_score_one(pair):
    processor, _ = pair
    assert score_answer(TASKS["<OCR>"], [BOS, EOS], [0.0, -1.0], processor, (9, 9)) == {"text": 1.0}
    boxes = _locations(processor, *range(8))
    scores = score_answer(TASKS["<REGION_PROPOSAL>"], boxes, [-1.0] * 8, processor, (9, 9))
    assert scores == {"bboxes": pytest.approx([math.exp(-1)] * 2), "labels": [1.0, 1.0]}


def test_scores_run_parallel_to_every_answer_whatever_was_generated(pair):
    """Over random strings; and the text that they are found in is the tokenizer's own, character for character."""
    processor, _ = pair
    writer = Writer(processor.tokenizer, random.Random(7))
    split = 0
    for task in TASKS.values():
        for _ in range(300):
            ids = writer.write(task.answer)
            logprobs = [-writer.random.random() for _ in ids]
            without_padding = list(ids)
            while without_padding and without_padding[-1] == PAD:
                without_padding.pop()
            text = processor.tokenizer.decode(without_padding, skip_special_tokens=False)
            assert _TokenText(ids, logprobs, processor).text == text
            split += not writer.partial.isdisjoint(ids)
            answer = parse_answer(task, ids, processor, (640, 480))
            scores = score_answer(task, ids, logprobs, processor, (640, 480))
            if isinstance(answer, str):
                assert list(scores) == ["text"]
            else:
                assert {name: len(column) for name, column in scores.items()} == {
                    name: len(column) for name, column in answer.items()
                }
            for values in scores.values():
                assert all(math.exp(-1) <= value <= 1 for value in (values if isinstance(values, list) else [values]))
    assert split > 100


@pytest.mark.parametrize("task", ["<REFERRING_EXPRESSION_SEGMENTATION>", "<OPEN_VOCABULARY_DETECTION>"])
def test_masks_cover_what_polygons_enclose(pair, task):
    processor, _ = pair
    size = (100, 50)
    label = [] if task.startswith("<REF") else _ids(processor, "dog")
    begin, end, sep = (processor.tokenizer.token_to_id(token) for token in ("<poly>", "</poly>", "<sep>"))
    square = _locations(processor, 100, 200, 500, 200, 500, 600, 100, 600)
    corner = _locations(processor, 800, 0, 999, 0, 999, 300)
    answer = parse_answer(TASKS[task], [*label, begin, *square, sep, *corner, end], processor, size)
    masks = mask_answer(answer, size)
    assert masks["labels"] == [answer.get("polygons_labels", answer.get("labels"))[0]]
    (runs,) = masks["masks"]
    decoded = mask_codec.decode(runs)
    assert decoded.shape == (50, 100)
    drawn = Image.new("1", size)
    for polygon in answer["polygons"][0]:
        ImageDraw.Draw(drawn).polygon(polygon, fill=1)
    differing = np.asarray(drawn).astype(bool) ^ decoded.astype(bool)
    assert decoded.sum() > 800
    assert differing.sum() < 0.15 * decoded.sum()  # the outlines: Pillow draws them, COCO's code halves their pixels


@pytest.mark.parametrize("polygons", [[[5, 5]], [[1, 1, 9, 9]], [[]], [[0] * 6]])
def test_a_polygon_without_area_is_an_empty_mask(polygons):
    masks = mask_answer({"polygons": [polygons], "labels": [""]}, (20, 10))
    assert mask_codec.decode(masks["masks"][0]).tolist() == np.zeros((10, 20)).tolist()


@pytest.mark.parametrize(
    "answer", ["a dog", {"bboxes": [[1, 2, 3, 4]], "labels": ["a"]}, {"polygons": [], "labels": []}]
)
def test_answers_without_polygons_have_no_masks(answer):
    assert mask_answer(answer, (20, 10)) == {"masks": [], "labels": []}


def _ids(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def _locations(processor: Processor, *bins: int) -> list[int]:
    return [processor.tokenizer.token_to_id(f"<loc_{bin_}>") for bin_ in bins]
