"""Loads the checkpoint's processor, under transformers 4.57 as under 5."""
# ruff: noqa: E402 -- what is hidden from transformers is hidden first

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# transformers imports these where they are installed and does without. Triton's stub takes numpy 1 only, and where
# that was put before a machine's own numpy 2, packages built for the latter don't load.
hidden: dict[str, Any] = dict.fromkeys(("scipy", "sklearn", "pandas"))
sys.modules.update(hidden)

import transformers
from transformers import AutoImageProcessor, AutoProcessor, BartTokenizerFast, Florence2Processor

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_processor(folder: Path) -> Florence2Processor:
    """Returns the checkpoint's processor, which resizes pictures by Pillow.

    Args:
        folder: A checkpoint in transformers' own layout.
    """
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return AutoProcessor.from_pretrained(folder, backend="pil")
    # Version 4 doesn't know the classes that version 5 names in tokenizer_config.json.
    settings = json.loads((folder / "processor_config.json").read_text())
    return Florence2Processor(
        image_processor=AutoImageProcessor.from_pretrained(folder, use_fast=False),
        tokenizer=_load_tokenizer(folder),
        num_additional_image_tokens=settings.get("num_additional_image_tokens", 0),
        post_processor_config=settings["post_processor_config"],
    )


def _load_tokenizer(folder: Path) -> BartTokenizerFast:
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    named = {name: saved[name] for name in _SPECIAL_TOKENS if name in saved}
    extra = {"image_token": saved.get("image_token", "<image>")}
    tokenizer_file = str(folder / "tokenizer.json")
    return BartTokenizerFast(tokenizer_file=tokenizer_file, extra_special_tokens=extra, **named)
