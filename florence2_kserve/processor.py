"""A checkpoint's tokenizer and image settings, without transformers.

Two kinds of folder are read. transformers' own has all tokens in ``tokenizer.json`` and the image
settings inside ``processor_config.json``. Microsoft's has a plain BART tokenizer, to which its
processor adds 1,024 tokens as it starts, and the image settings in ``preprocessor_config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from florence2_kserve.model_files import (
    OLD_TOKENIZER_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILE,
    Layout,
    ModelFiles,
    ModelFilesError,
    read_json,
)

LOCATIONS = 1000  # location tokens an axis
LOCATION_TOKENS = tuple(f"<loc_{bin_}>" for bin_ in range(LOCATIONS))
BOS, PAD, EOS = "<s>", "<pad>", "</s>"

# What Microsoft's processor adds to BART's tokenizer, in this order; the misspelling is theirs.
FLORENCE_TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *LOCATION_TOKENS,
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>", "<seg>", "</seg>"),
    *("<sep>", "<region_cap>", "</region_cap>", "<region_to_desciption>", "</region_to_desciption>"),
    *("<proposal>", "</proposal>", "<poly>", "</poly>", "<and>"),
)

# Phrases too vague to ground; conversions to transformers' layout carry the same list in processor_config.json.
FLORENCE_BANNED_PHRASES = frozenset(
    {
        *("it", "I", "me", "mine", "you", "your", "yours", "he", "him", "his", "she", "her", "hers", "they", "them"),
        *("their", "theirs", "one", "oneself", "we", "us", "our", "ours", "its", "myself", "yourself", "himself"),
        *("herself", "itself", "ourselves", "yourselves", "themselves", "this", "that", "these", "those", "who"),
        *("whom", "whose", "which", "what", "all", "another", "any", "anybody", "anyone", "anything", "each"),
        *("everybody", "everyone", "everything", "few", "many", "nobody", "none", "several", "some", "somebody"),
        *("someone", "something", "each other", "one another", "the image", "image", "images", "the", "a", "an"),
        *("a group", "other objects", "lots", "a set"),
    }
)

# transformers leaves out of a saved text_config or vision_config what equals these defaults.
_DEFAULT_POSITIONS = 1024
_DEFAULT_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_DEFAULT_PATCHES = {"patch_size": [7, 3, 3, 3], "patch_stride": [4, 2, 2, 2], "patch_padding": [3, 1, 1, 1]}


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How a picture becomes the model's input.

    Attributes:
        height: Pixels.
        width: Pixels.
        resample: Pillow's number of the resampling filter; 3 is bicubic.
        rescale_factor: What 8-bit values are multiplied with before they are normalised.
        mean: Mean of each channel, subtracted after rescaling.
        std: Standard deviation of each channel, divided by after that.
        image_seq_length: Tokens that one picture takes in front of the prompt.
    """

    height: int
    width: int
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_seq_length: int


@dataclass(frozen=True, slots=True, eq=False)
class Processor:
    """Tokenizer and settings of one checkpoint; nothing in it changes after `load`, so threads may share it.

    Attributes:
        image: Image settings.
        tokenizer: Tokenizer with all of Florence-2's tokens, neither truncating nor padding.
        banned_phrases: Phrases dropped from grounding answers.
        max_text_tokens: Longest prompt, `<s>` and `</s>` included, that fits beside the picture.
        max_target_tokens: Largest number of tokens that can be generated.
        bos_token_id: Id of `<s>`.
        eos_token_id: Id of `</s>`.
        pad_token_id: Id of `<pad>`.
        control_tokens: Special tokens other than locations, by id.
    """

    image: ImageSettings
    tokenizer: Tokenizer
    banned_phrases: frozenset[str]
    max_text_tokens: int
    max_target_tokens: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    control_tokens: Mapping[int, str]
    _longest_token: int

    @classmethod
    def load(cls, files: ModelFiles) -> Processor:
        """Reads the processor's files of a checkpoint.

        Raises:
            ModelFilesError: If one is missing or broken, or if they don't fit Florence-2 or one another.
        """
        text_config, vision_config = (_section(files.config, name) for name in ("text_config", "vision_config"))
        processor_config, image_config = _read_processor_files(files)
        image = _image_settings(image_config, vision_config)
        positions = text_config.get("max_position_embeddings", _DEFAULT_POSITIONS)
        if positions <= image.image_seq_length + 2:
            raise ModelFilesError(
                f"text_config.max_position_embeddings is {positions}, too few beside {image.image_seq_length} "
                "image tokens"
            )
        tokenizer = _load_tokenizer(files)
        _check_tokenizer(tokenizer, text_config)
        added = tokenizer.get_added_tokens_decoder()
        locations = frozenset(LOCATION_TOKENS)
        return cls(
            image=image,
            tokenizer=tokenizer,
            banned_phrases=_banned_phrases(processor_config),
            max_text_tokens=positions - image.image_seq_length,
            max_target_tokens=positions,
            bos_token_id=_id(tokenizer, BOS),
            eos_token_id=_id(tokenizer, EOS),
            pad_token_id=_id(tokenizer, PAD),
            control_tokens={id_: token.content for id_, token in added.items() if token.content not in locations},
            _longest_token=max(map(len, tokenizer.get_vocab())),
        )

    def input_ids(self, prompt: str) -> np.ndarray[Any, Any]:
        """Tokenises a prompt as transformers' Florence-2 processor does, the image's placeholders aside.

        Special tokens spelled out in `prompt` become those tokens, as they do there: give users'
        text to `check_user_text` first.

        Args:
            prompt: The sentence for the model, see ``Task.prompt``.

        Returns:
            INT64 [L]: `<s>`, the prompt, `</s>`. L may be over `max_text_tokens`.
        """
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        return np.array([self.bos_token_id, *ids, self.eos_token_id], dtype=np.int64)

    def check_user_text(self, text: str) -> None:
        """Checks that `text` can be put into a prompt: it may hold location tokens, but no other special ones.

        Raises:
            ValueError: If it spells a control token such as `</s>`, `<pad>` or `<image>`, which would end
                the prompt or stand for something else in it; if it isn't valid Unicode; or if it is far too
                long, so that it isn't even tokenised.
        """
        size = len(text.encode())
        if size > self.max_text_tokens * self._longest_token:  # each token stands for that many bytes at most
            raise ValueError(f"the text has {size:,} bytes, more than the model's {self.max_text_tokens} tokens hold")
        for id_ in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if id_ in self.control_tokens:
                raise ValueError(f"the text holds the control token {self.control_tokens[id_]}, which is not allowed")

    def token_bytes(self, id_: int) -> bytes:
        """Returns what a token adds to a decoded text, in UTF-8; a character's bytes may lie in several tokens."""
        token = self.tokenizer.id_to_token(id_) or ""
        try:
            return bytes(map(_BYTE_OF.__getitem__, token))
        except KeyError:  # a token that was added, in characters that stand for themselves
            return token.encode()


def _bytes_of_letters() -> dict[str, int]:
    """Returns the byte that each letter of a byte-level vocabulary stands for.

    Bytes that print in Latin-1 stand for themselves, the others for letters from U+0100 on, in their order
    (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and their encoder).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _bytes_of_letters()


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ModelFilesError(f"config.json has no {name}")
    return section


def _read_processor_files(files: ModelFiles) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns the processor's settings (empty where there are none) and the image settings."""
    nested, plain = (files.folder / name for name in PROCESSOR_FILES)
    processor_config = read_json(nested) if nested.is_file() else {}
    if isinstance(image_config := processor_config.get("image_processor"), dict):
        return processor_config, image_config
    if plain.is_file():
        return processor_config, read_json(plain)
    raise ModelFilesError(f"{files.folder} has no image settings, neither in {' nor in '.join(PROCESSOR_FILES)}")


def _banned_phrases(processor_config: Mapping[str, Any]) -> frozenset[str]:
    rules = processor_config.get("post_processor_config")
    if not rules:  # Microsoft's folders: the list is in their code
        return FLORENCE_BANNED_PHRASES
    return frozenset(rules.get("phrase_grounding", {}).get("banned_grounding_tokens", ()))


def _image_settings(stated: Mapping[str, Any], vision_config: Mapping[str, Any]) -> ImageSettings:
    for step, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True)):
        if stated.get(step, wanted) is not wanted:
            raise ModelFilesError(f"image settings: {step} is {stated[step]!r}, Florence-2 needs {wanted}")
    size = stated.get("size")
    if not isinstance(size, Mapping) or not all(_is_natural(size.get(side)) for side in ("height", "width")):
        raise ModelFilesError(f"image settings: size is {size!r}, expected height and width in pixels")
    # Left out, it isn't done: transformers' default crop of 224 fits no Florence-2.
    if stated.get("do_center_crop") and stated.get("crop_size") != size:
        raise ModelFilesError("image settings: a centre crop is asked for; Florence-2 looks at the whole picture")
    resample = stated.get("resample", Image.Resampling.BICUBIC)
    if resample not in list(Image.Resampling):
        raise ModelFilesError(f"image settings: resample is {resample!r}, expected the number of a filter of Pillow")
    length = stated.get("image_seq_length")
    if length is None:
        length = _count_image_tokens(size["height"], size["width"], vision_config)
    if not _is_natural(length):
        raise ModelFilesError(f"image settings: image_seq_length is {length!r}, expected a number of tokens")
    return ImageSettings(
        height=size["height"],
        width=size["width"],
        resample=int(resample),
        rescale_factor=_numbers("rescale_factor", [stated.get("rescale_factor", 1 / 255)], 1)[0],
        mean=_numbers("image_mean", stated.get("image_mean"), 3),
        std=_numbers("image_std", stated.get("image_std"), 3),
        image_seq_length=length,
    )


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(name: str, values: object, count: int) -> tuple[float, ...]:
    if isinstance(values, list) and len(values) == count:
        numbers = tuple(float(value) for value in values if isinstance(value, int | float))
        if len(numbers) == count and all(0 < number < math.inf for number in numbers):
            return numbers
    raise ModelFilesError(f"image settings: {name} is {values!r}, expected {count} positive number(s)")


def _count_image_tokens(height: int, width: int, vision_config: Mapping[str, Any]) -> int:
    """Returns one token for each cell that the vision tower's strides leave, and one for the mean of all."""
    names = ("patch_size", "patch_stride", "patch_padding")
    for kernel, stride, padding in zip(*(vision_config.get(n, _DEFAULT_PATCHES[n]) for n in names), strict=True):
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    return height * width + 1


def _load_tokenizer(files: ModelFiles) -> Tokenizer:
    if (path := files.folder / TOKENIZER_FILE).is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare exceptions
            raise ModelFilesError(f"{path} can't be read: {error}") from error
    else:
        tokenizer = _bart_tokenizer(files.folder)
    # Set in some folders; prompts are checked for their length instead.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if files.layout is Layout.ORIGINAL:
        _add_florence_tokens(tokenizer)
    return tokenizer


def _bart_tokenizer(folder: Path) -> Tokenizer:
    """Builds BART's tokenizer from the two files of older folders."""
    vocab, merges = (folder / name for name in OLD_TOKENIZER_FILES)
    if not (vocab.is_file() and merges.is_file()):
        raise ModelFilesError(f"{folder} has neither {TOKENIZER_FILE} nor both {vocab.name} and {merges.name}")
    try:
        tokenizer = Tokenizer(BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare exceptions
        raise ModelFilesError(f"{vocab} and {merges.name} can't be read: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in (BOS, PAD, EOS, "<unk>", "<mask>"):
        _id(tokenizer, token)
        tokenizer.add_special_tokens([AddedToken(token, lstrip=token == "<mask>", special=True)])
    return tokenizer


def _add_florence_tokens(tokenizer: Tokenizer) -> None:
    """Adds those of Florence-2's tokens that aren't there yet, and checks that their ids follow one another."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in FLORENCE_TOKENS])
    _check_consecutive(tokenizer, FLORENCE_TOKENS)


def _check_tokenizer(tokenizer: Tokenizer, text_config: Mapping[str, Any]) -> None:
    """Checks the ids that prompts and answers rely on."""
    for token, name in ((BOS, "bos_token_id"), (PAD, "pad_token_id"), (EOS, "eos_token_id")):
        id_, wanted = _id(tokenizer, token), text_config.get(name, _DEFAULT_IDS[name])
        if id_ != wanted:
            raise ModelFilesError(f"the tokenizer has {token} at {id_}, config.json says {name} {wanted}")
    _check_consecutive(tokenizer, LOCATION_TOKENS)
    added = tokenizer.get_added_tokens_decoder()
    for token in (BOS, PAD, EOS, *LOCATION_TOKENS):
        if _id(tokenizer, token) not in added:
            raise ModelFilesError(f"the tokenizer has {token} as an ordinary entry, so prompts would spell it out")
    largest, vocab_size = max(tokenizer.get_vocab().values()), text_config.get("vocab_size")
    if vocab_size is not None and largest >= vocab_size:
        raise ModelFilesError(f"the tokenizer has ids up to {largest}, the model only {vocab_size} embeddings")


def _check_consecutive(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    first = _id(tokenizer, tokens[0])
    for wanted, token in enumerate(tokens, first):
        if (id_ := _id(tokenizer, token)) != wanted:
            raise ModelFilesError(
                f"the tokenizer has {token} at {id_}, expected {wanted}: "
                f"{tokens[0]} to {tokens[-1]} have to follow one another"
            )


def _id(tokenizer: Tokenizer, token: str) -> int:
    id_ = tokenizer.token_to_id(token)
    if id_ is None:
        raise ModelFilesError(f"the tokenizer is none of Florence-2: it has no {token}")
    return id_
