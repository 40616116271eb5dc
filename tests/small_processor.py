"""A small checkpoint's processor files, made anew: ours and transformers' processor read the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.florence2.processing_florence2 import Florence2Processor

from florence2_kserve.model_files import Layout, ModelFiles
from florence2_kserve.processor import FLORENCE_BANNED_PHRASES, FLORENCE_TOKENS

BART_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
SIDE, IMAGE_TOKENS = 64, 5
IMAGE_CONFIG: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "image_seq_length": IMAGE_TOKENS,
}
PARSERS = (
    "pure_text ocr phrase_grounding description_with_bboxes description_with_polygons polygons bboxes "
    "description_with_bboxes_or_polygons"
).split()
_CORPUS = [
    "a red circle and a blue square in the image",
    "The quick brown fox jumps over the lazy dog. What does the image describe?",
    "café naïve façade élan né année",  # so that é and the like become tokens of their own
    "two cars on the left of a tall green tree, 12 34 567",
    "Locate the objects with category name in the image.",
]


def bart_tokenizer() -> Tokenizer:
    """Trains a byte-level BPE with BART's special tokens in BART's places, `<mask>` last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=BART_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer


def florence_tokenizer() -> Tokenizer:
    """Returns the same with Florence-2's tokens and `<image>`, as conversions to transformers' layout have it."""
    tokenizer = bart_tokenizer()
    tokens = [*FLORENCE_TOKENS, "<image>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    return tokenizer


def model_files(folder: Path, layout: Layout, **text_config: Any) -> ModelFiles:
    """Returns the files of a model whose text side is as `text_config` says."""
    config = {"text_config": {"max_position_embeddings": 128, **text_config}, "vision_config": {}}
    return ModelFiles(reference=str(folder), folder=folder, layout=layout, revision=None, config=config)


def original_folder(folder: Path, **image_config: Any) -> ModelFiles:
    """Writes a folder as Microsoft's are, with `image_config` changed."""
    bart_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_CONFIG | image_config))
    return model_files(folder, Layout.ORIGINAL)


def their_processor(tokenizer_file: Path, banned: frozenset[str] = FLORENCE_BANNED_PHRASES) -> Florence2Processor:
    """Returns transformers' processor on a tokenizer that has Florence-2's tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    rules: dict[str, Any] = {name: {} for name in PARSERS}
    rules["phrase_grounding"] = {"banned_grounding_tokens": sorted(banned)}
    return Florence2Processor(CLIPImageProcessorPil(**IMAGE_CONFIG), tokenizer, post_processor_config=rules)


def native_folder(folder: Path) -> ModelFiles:
    """Lets transformers write a folder of its own layout."""
    florence_tokenizer().save(str(folder / "made.json"))
    their_processor(folder / "made.json").save_pretrained(str(folder))
    return model_files(folder, Layout.NATIVE)
