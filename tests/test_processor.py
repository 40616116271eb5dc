"""Prompts against transformers' processor, and what is read off a checkpoint's folder."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.florence2.processing_florence2 import Florence2Processor

from florence2_kserve.model_files import EMBEDDED, Layout, ModelFilesError, locate_model
from florence2_kserve.processor import FLORENCE_BANNED_PHRASES, FLORENCE_TOKENS, ImageSettings, Processor
from florence2_kserve.tasks import TASKS, TaskInput

from .small_processor import (
    IMAGE_CONFIG,
    IMAGE_TOKENS,
    SIDE,
    bart_tokenizer,
    model_files,
    native_folder,
    original_folder,
    their_processor,
)

TEXTS = [
    "a red circle",
    "",
    "  two  spaces ",
    "tab\tand\nnew line\r\n",
    "<loc_1><loc_2><loc_3><loc_999>",
    "a circle <loc_5> , <loc_6>",
    "<loc_1000><loc_-1><loc_05><LOC_5>< loc_5>",
    "café naïve",
    "日本語 🙂\u200d🙂 \u00a0\u2028",
    "e\u0301 and \u00e9",
    "\x00\x7f",
    "<od",
    "a < b > c",
    "I'm, you're; they'll",
    "x" * 300,
    "1234567890",
]
SPECIALS = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<image>", "<od>", "<sep>", "<and>", "</region_to_desciption>"]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.load(native_folder(tmp_path_factory.mktemp("native")))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.load(original_folder(tmp_path_factory.mktemp("original")))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Florence2Processor:
    folder = tmp_path_factory.mktemp("theirs")
    native_folder(folder)
    return Florence2Processor.from_pretrained(str(folder))


def their_prompt_ids(theirs: Florence2Processor, texts: list[str]) -> list[list[int]]:
    """Returns what transformers feeds behind the image's placeholders."""
    images = [Image.new("RGB", (8, 8))] * len(texts)
    rows = theirs(images=images, text=texts)["input_ids"]
    assert all(row[:IMAGE_TOKENS] == [theirs.image_token_id] * IMAGE_TOKENS for row in rows)
    return [row[IMAGE_TOKENS:] for row in rows]


@pytest.mark.parametrize("layout", ["native", "original"])
def test_prompts_of_all_tasks_equal_those_of_transformers(
    layout: str, theirs: Florence2Processor, request: pytest.FixtureRequest
) -> None:
    processor: Processor = request.getfixturevalue(layout)
    for task in TASKS.values():
        texts = [""] if task.takes is TaskInput.NONE else TEXTS
        expected = their_prompt_ids(theirs, [task.name + text for text in texts])
        assert [processor.input_ids(task.prompt(text)).tolist() for text in texts] == expected


@pytest.mark.parametrize("layout", ["native", "original"])
def test_any_prompt_is_tokenised_as_transformers_does(
    layout: str, theirs: Florence2Processor, request: pytest.FixtureRequest
) -> None:
    processor: Processor = request.getfixturevalue(layout)
    chance = random.Random(0)
    alphabet = [*"abc ,.'\n\t<>_é日🙂\u00a0", "loc_", "<loc_12>", "<loc_7>", "the", " image", "  ", "<o", "d>"]
    prompts = TEXTS + ["".join(chance.choices(alphabet, k=chance.randint(1, 30))) for _ in range(2000)]
    prompts = [prompt for prompt in prompts if not any(token in prompt for token in SPECIALS)]
    assert [processor.input_ids(prompt).tolist() for prompt in prompts] == their_prompt_ids(theirs, prompts)


def test_input_ids_are_int64(native: Processor) -> None:
    ids = native.input_ids("a red circle")
    assert (ids.dtype, ids.ndim) == (np.dtype("int64"), 1)
    assert ids.flags.writeable


def test_threads_may_share_a_tokenizer(original: Processor) -> None:
    prompts = [f"{text} {number}" for number in range(50) for text in TEXTS]
    expected = [original.input_ids(prompt).tolist() for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        rounds = [list(pool.map(original.input_ids, prompts)) for _ in range(3)]
    assert all([ids.tolist() for ids in results] == expected for results in rounds)


@pytest.mark.parametrize("text", TEXTS)
def test_users_may_write_anything_but_control_tokens(native: Processor, text: str) -> None:
    native.check_user_text(text)
    control = set(native.control_tokens)
    assert not control.intersection(native.input_ids(text)[1:-1].tolist())


@pytest.mark.parametrize("token", SPECIALS)
@pytest.mark.parametrize("text", ["{}", "a dog{}", "{} a dog", "<<loc_5>{}<loc_6>"])
def test_control_tokens_are_refused_by_name(native: Processor, token: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"control token {token}, which is not allowed"):
        native.check_user_text(text.format(token))


def test_every_special_token_but_locations_is_refused(native: Processor, theirs: Florence2Processor) -> None:
    tokenizer: PreTrainedTokenizerBase = theirs.tokenizer
    for token in tokenizer.added_tokens_decoder.values():
        if token.content.startswith("<loc_"):
            native.check_user_text(token.content)
        else:
            with pytest.raises(ValueError, match="control token"):
                native.check_user_text(token.content)


def test_a_lone_surrogate_is_refused(native: Processor) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        native.check_user_text("a\ud800")


def test_a_text_that_cannot_fit_is_refused_unread(native: Processor) -> None:
    longest = max(native.tokenizer.get_vocab(), key=len)
    text = "é" * (len(longest) * native.max_text_tokens // 2)
    native.check_user_text(text)
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, more than the model's 123 tokens hold"):
        native.check_user_text(text + "é")


def test_what_a_native_folder_says(native: Processor) -> None:
    assert native.image == ImageSettings(
        height=SIDE,
        width=SIDE,
        resample=3,
        rescale_factor=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_seq_length=IMAGE_TOKENS,
    )
    assert (native.max_text_tokens, native.max_target_tokens) == (128 - IMAGE_TOKENS, 128)
    assert (native.bos_token_id, native.pad_token_id, native.eos_token_id) == (0, 1, 2)


def test_an_original_folder_says_the_same(native: Processor, original: Processor) -> None:
    assert original.image == native.image
    assert original.banned_phrases == native.banned_phrases
    assert (original.max_text_tokens, original.max_target_tokens) == (123, 128)
    native_vocab = native.tokenizer.get_vocab()
    assert original.tokenizer.get_vocab() == {token: id_ for token, id_ in native_vocab.items() if token != "<image>"}


def test_florences_tokens_follow_the_vocabulary_in_microsofts_order(original: Processor) -> None:
    tokenizer = original.tokenizer
    base = bart_tokenizer().get_vocab_size()
    assert len(FLORENCE_TOKENS) == 1024
    assert [tokenizer.token_to_id(token) for token in FLORENCE_TOKENS] == list(range(base, base + 1024))
    # Florence-2's own ids, which lie behind a vocabulary of 50,265.
    real = {"<od>": 50_265, "<loc_0>": 50_269, "<loc_999>": 51_268, "<cap>": 51_269, "<and>": 51_288}
    assert {token: tokenizer.token_to_id(token) - base + 50_265 for token in real} == real


def test_tokens_that_are_there_already_are_not_added_again(tmp_path: Path, original: Processor) -> None:
    files = original_folder(tmp_path)
    original.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Processor.load(files).tokenizer.get_vocab() == original.tokenizer.get_vocab()


def test_vocabulary_and_merges_do_without_a_tokenizer_file(tmp_path: Path, original: Processor) -> None:
    files = original_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    bart = bart_tokenizer()
    bart.model.save(str(tmp_path))
    (tmp_path / "vocab.json").write_text(json.dumps(bart.get_vocab()))
    loaded = Processor.load(files)
    assert loaded.tokenizer.get_vocab() == original.tokenizer.get_vocab()
    assert [loaded.input_ids(text).tolist() for text in TEXTS] == [original.input_ids(text).tolist() for text in TEXTS]
    assert loaded.control_tokens == original.control_tokens


def test_truncation_and_padding_of_a_tokenizer_file_are_off(tmp_path: Path, native: Processor) -> None:
    files = native_folder(tmp_path)
    tokenizer = Processor.load(files).tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a red circle and a blue square"
    assert np.array_equal(Processor.load(files).input_ids(text), native.input_ids(text))


def test_the_list_of_banned_phrases_is_the_folders(tmp_path: Path) -> None:
    files = native_folder(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    config["post_processor_config"]["phrase_grounding"] = {"banned_grounding_tokens": ["a thing"]}
    path.write_text(json.dumps(config))
    assert Processor.load(files).banned_phrases == {"a thing"}
    del config["post_processor_config"]["phrase_grounding"]
    path.write_text(json.dumps(config))
    assert Processor.load(files).banned_phrases == frozenset()
    del config["post_processor_config"]
    path.write_text(json.dumps(config))
    assert Processor.load(files).banned_phrases == FLORENCE_BANNED_PHRASES
    assert len(FLORENCE_BANNED_PHRASES) == 72


def test_older_native_folders_have_image_settings_of_their_own_file(tmp_path: Path, native: Processor) -> None:
    files = native_folder(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config.pop("image_processor")))
    path.write_text(json.dumps(config))
    assert Processor.load(files).image == native.image


@pytest.mark.parametrize(("side", "tokens"), [(768, 577), (384, 145), (100, 17)])
def test_image_tokens_are_counted_where_none_are_stated(tmp_path: Path, side: int, tokens: int) -> None:
    original_folder(tmp_path, size={"height": side, "width": side}, image_seq_length=None)
    processor = Processor.load(model_files(tmp_path, Layout.ORIGINAL, max_position_embeddings=1024))
    assert processor.image.image_seq_length == tokens
    assert processor.max_text_tokens == 1024 - tokens


def test_the_embedded_model_counts_its_image_tokens_alike(tmp_path: Path) -> None:
    files = locate_model(EMBEDDED, with_weights=False)
    stated = Processor.load(files)
    copy = tmp_path / "copy"
    shutil.copytree(files.folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((copy / "processor_config.json").read_text())
    del config["image_processor"]["image_seq_length"]
    (copy / "processor_config.json").write_text(json.dumps(config))
    assert Processor.load(locate_model(str(copy), with_weights=False)).image == stated.image


def test_the_embedded_models_prompts_equal_those_of_transformers() -> None:
    files = locate_model(EMBEDDED, with_weights=False)
    processor = Processor.load(files)
    theirs = Florence2Processor.from_pretrained(str(files.folder))
    for task in TASKS.values():
        text = "" if task.takes is TaskInput.NONE else "a red <loc_5> café"
        row = theirs(images=Image.new("RGB", (8, 8)), text=task.name + text)["input_ids"][0]
        placeholders = [theirs.image_token_id] * processor.image.image_seq_length
        assert row == [*placeholders, *processor.input_ids(task.prompt(text))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize is False, Florence-2 needs True"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"do_center_crop": True, "crop_size": {"height": 9, "width": 9}}, "a centre crop is asked for"),
        ({"size": {"shortest_edge": 768}}, "size is .*shortest_edge.*, expected height and width in pixels"),
        ({"size": 768}, "size is 768, expected height and width"),
        ({"size": {"height": 0, "width": 768}}, "size is .* expected height and width"),
        ({"resample": 17}, "resample is 17, expected the number of a filter"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"image_seq_length": -1}, "image_seq_length is -1"),
        ({"image_seq_length": 127}, "max_position_embeddings is 128, too few beside 127"),
        ({"rescale_factor": 0}, r"rescale_factor is \[0\], expected 1 positive"),
        ({"image_mean": None}, "image_mean is None, expected 3 positive"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], expected 3"),
        ({"image_std": [0.2, 0.2, 0]}, "image_std is .*, expected 3 positive"),
        ({"image_std": [0.2, 0.2, "a"]}, "image_std is .*, expected 3 positive"),
    ],
)
def test_image_settings_that_are_none_of_florence_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    files = original_folder(tmp_path, **change)
    with pytest.raises(ModelFilesError, match=message):
        Processor.load(files)


def test_a_crop_that_cuts_nothing_off_is_accepted(tmp_path: Path) -> None:
    files = original_folder(tmp_path, do_center_crop=True, crop_size=IMAGE_CONFIG["size"])
    assert Processor.load(files).image.height == SIDE


def test_a_folder_without_image_settings_is_refused(tmp_path: Path) -> None:
    files = original_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelFilesError, match=r"no image settings.*preprocessor_config\.json"):
        Processor.load(files)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    files = original_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json can't be read"):
        Processor.load(files)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelFilesError, match=r"neither tokenizer\.json nor both vocab\.json and merges\.txt"):
        Processor.load(files)


def test_a_config_without_a_text_side_is_refused(tmp_path: Path) -> None:
    files = original_folder(tmp_path)
    del files.config["text_config"]
    with pytest.raises(ModelFilesError, match=r"config\.json has no text_config"):
        Processor.load(files)


def test_a_plain_bart_tokenizer_is_refused_in_a_native_folder(tmp_path: Path) -> None:
    original_folder(tmp_path)
    with pytest.raises(ModelFilesError, match="none of Florence-2: it has no <loc_0>"):
        Processor.load(model_files(tmp_path, Layout.NATIVE))


def test_tokens_in_another_order_are_refused(tmp_path: Path) -> None:
    files = original_folder(tmp_path)
    tokenizer = bart_tokenizer()
    base = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<od>", "<loc_0>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFilesError, match=f"has </od> at {base + 2}, expected {base + 1}"):
        Processor.load(files)


def test_special_ids_other_than_the_models_are_refused(tmp_path: Path) -> None:
    original_folder(tmp_path)
    with pytest.raises(ModelFilesError, match=r"has </s> at 2, config\.json says eos_token_id 7"):
        Processor.load(model_files(tmp_path, Layout.ORIGINAL, eos_token_id=7))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    files = original_folder(tmp_path)
    size = Processor.load(files).tokenizer.get_vocab_size()
    Processor.load(model_files(tmp_path, Layout.ORIGINAL, vocab_size=size))
    with pytest.raises(ModelFilesError, match=f"ids up to {size - 1}, the model only {size - 1} embeddings"):
        Processor.load(model_files(tmp_path, Layout.ORIGINAL, vocab_size=size - 1))


def test_location_tokens_that_a_prompt_would_spell_out_are_refused(tmp_path: Path) -> None:
    files = native_folder(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    plain = [token for token in content["added_tokens"] if token["content"].startswith("<loc_")]
    content["added_tokens"] = [token for token in content["added_tokens"] if token not in plain]
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in plain}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelFilesError, match="<loc_0> as an ordinary entry"):
        Processor.load(files)


def test_their_processor_is_built_as_conversions_are(theirs: Florence2Processor, tmp_path: Path) -> None:
    """The one that other tests build by hand reads the same tokenizer as the one loaded from a folder."""
    native_folder(tmp_path)
    built = their_processor(tmp_path / "tokenizer.json")
    assert their_prompt_ids(built, TEXTS) == their_prompt_ids(theirs, TEXTS)
    assert built.image_token_id == theirs.image_token_id
