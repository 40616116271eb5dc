"""Writes the checkpoint folder in transformers' native layout, and reads it back for a check by its own generate()."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    CLIPImageProcessor,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
)

from florence2_kserve.tiny.architecture import BOS, EOS, IMAGE_MEAN, IMAGE_STD, IMAGE_TOKENS, PAD
from florence2_kserve.tiny.scenes import SIDE
from florence2_kserve.tiny.tokenizer import wrap_tokenizer

BICUBIC = 3

# Phrases too vague to ground; the answers to a grounding task leave them out.
VAGUE_PHRASES = (
    *("it", "they", "them", "he", "she", "we", "you", "I", "me", "us", "him", "her", "this", "that", "these", "those"),
    *("its", "their", "his", "my", "your", "our", "itself", "themselves", "something", "anything", "everything"),
    *("the image", "an image", "image", "images", "the images", "a picture", "the picture", "picture", "pictures"),
    *("the photo", "a photo", "photo", "photos", "the scene", "a scene", "scene"),
    *("a side", "the side", "the sides", "the top", "the bottom", "the left", "the right", "the background"),
    *("foreground", "background", "the foreground", "left", "right", "top", "bottom", "the middle", "the center"),
    *("a group", "the group", "one", "all", "some", "many", "other", "others", "who", "which", "what", "there"),
)
PARSERS: dict[str, dict[str, Any]] = {
    "ocr": {"PATTERN": r"(.+?)" + r"<loc_(\d+)>" * 8, "AREA_THRESHOLD": 0.0},
    "phrase_grounding": {"banned_grounding_tokens": sorted(VAGUE_PHRASES)},
    "pure_text": {},
    "description_with_bboxes": {},
    "description_with_polygons": {},
    "polygons": {},
    "bboxes": {},
    "description_with_bboxes_or_polygons": {},
}


def build_processor(tokenizer: Tokenizer) -> Florence2Processor:
    """Builds the processor that belongs to the embedded model."""
    image_processor = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        resample=BICUBIC,
        do_resize=True,
        do_center_crop=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_convert_rgb=True,
    )
    image_processor.image_seq_length = IMAGE_TOKENS
    return Florence2Processor(
        image_processor=image_processor, tokenizer=wrap_tokenizer(tokenizer), post_processor_config=PARSERS
    )


def generation_config() -> GenerationConfig:
    """Gives Florence-2's own defaults of generation; ``max_new_tokens`` is the caller's."""
    return GenerationConfig(
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_bos_token_id=BOS,
        forced_eos_token_id=EOS,
        no_repeat_ngram_size=3,
        num_beams=3,
        length_penalty=1.0,
        early_stopping=True,
    )


def export_checkpoint(model: Florence2ForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes model, tokenizer and processor; each file replaces an earlier one whole.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        folder: Where the files go; made if need be.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = generation_config()
    model.save_pretrained(partial)
    build_processor(tokenizer).save_pretrained(partial)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        if file.suffix == ".json" and file.name != "tokenizer.json":
            # Sorted, and without a trailing difference between versions, so that a rerun shows what changed.
            file.write_text(json.dumps(json.loads(file.read_text()), indent=2, sort_keys=True) + "\n")
        file.chmod(0o644)
        file.replace(folder / file.name)
    partial.rmdir()


class Reader:
    """Answers by transformers' own generate(): the reference beside the service's engine."""

    def __init__(self, model: Florence2ForConditionalGeneration, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(cls, folder: Path) -> Reader:
        """Reads an exported checkpoint."""
        model = Florence2ForConditionalGeneration.from_pretrained(folder)
        return cls(model, Florence2Processor.from_pretrained(folder))

    @torch.inference_mode()
    def infer(self, images: Sequence[np.ndarray], tasks: Sequence[str], texts: Sequence[str]) -> list[Any]:
        """Answers one task on each image; see ``evaluate.Infer``."""
        answers: list[Any] = []
        prompts = [task + text for task, text in zip(tasks, texts, strict=True)]
        inputs = self.processor(
            images=[image.copy() for image in images], text=prompts, padding=True, return_tensors="pt"
        )
        generated = self.model.generate(**inputs, max_new_tokens=100)
        for row, task, image in zip(generated.tolist(), tasks, images, strict=True):
            text = self.processor.tokenizer.decode(
                [token for token in row if token not in (BOS, PAD, EOS)], skip_special_tokens=False
            )
            size = (image.shape[1], image.shape[0])
            answers.append(self.processor.post_process_generation(text=text, task=task, image_size=size)[task])
        return answers
