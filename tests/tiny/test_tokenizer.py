"""The tokenizer: Florence-2's special tokens, whole words, spelt letters, any text."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.scenes import COLORS, SHAPES, WHOLE_SCENE_TASKS, held_out_scene
from florence2_kserve.tiny.tokenizer import added_tokens, build_tokenizer, token_id
from tests.tiny.conftest import CHECKPOINT


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def test_shipped_tokenizer_is_what_the_code_builds(tokenizer: Tokenizer) -> None:
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_special_tokens_have_florence_2s_order(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    ids = [token_id(tokenizer, token) for token in ("<mask>", *added_tokens())]
    assert ids == list(range(ids[0], tokenizer.get_vocab_size()))
    assert added_tokens()[:5] == ["<od>", "</od>", "<ocr>", "</ocr>", "<loc_0>"]
    assert added_tokens()[-1] == "<image>"


def test_words_are_single_tokens_and_rendered_words_are_spelt(tokenizer: Tokenizer) -> None:
    for word in (*COLORS, *SHAPES, "small", "large", "background", "left"):
        for form in (word, f" {word}"):
            assert len(tokenizer.encode(form, add_special_tokens=False).ids) == 1, form
    assert tokenizer.encode("KX7 PQ", add_special_tokens=False).tokens == ["K", "X", "7", "Ġ", "P", "Q"]
    assert tokenizer.encode("a red star").tokens == ["<s>", "a", "Ġred", "Ġstar", "</s>"]


@pytest.mark.parametrize("text", ["Résumé, 日本 🙂!", "two  spaces\nand a line", "<loc_17> in between <poly>", ""])
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.token_to_id("<unk>") not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_prompts_and_targets_survive(tokenizer: Tokenizer) -> None:
    for index in range(30):
        for task in TASKS.values():
            if example := held_out_scene(index).truth(task.name, random.Random(index)):
                for text in (task.prompt(example.text), example.target):
                    ids = tokenizer.encode(text, add_special_tokens=False).ids
                    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_no_answer_to_a_held_out_scene_repeats_a_trigram(tokenizer: Tokenizer) -> None:
    """Generation forbids repeated trigrams, so that such an answer could not be given."""
    repeated = []
    for index in range(500):
        scene = held_out_scene(index)
        for name in TASKS:
            example = scene.truth(name, random.Random(index))
            if example is None:
                continue
            ids = [2, *tokenizer.encode(example.target).ids]
            trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
            if len(set(trigrams)) < len(trigrams):
                repeated.append((index, name, example.target))
    assert not [row for row in repeated if row[1] in WHOLE_SCENE_TASKS]
    assert len(repeated) <= 5, repeated
