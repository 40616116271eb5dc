"""Requests to the embedded model, and their answers by transformers' own ``generate``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from florence2_kserve.engine.interface import Engine, GenerationRequest, GenerationResult
from florence2_kserve.images import resize_image
from florence2_kserve.model_files import locate_model
from florence2_kserve.processor import Processor
from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.scenes import held_out_scene
from florence2_kserve.weights import LoadedModel, load_model


@cache
def processor() -> Processor:
    return Processor.load(locate_model())


@cache
def loaded() -> LoadedModel:
    """The model; engines may share it, as they don't change what it computes."""
    return load_model(locate_model())


def request(index: int = 0, task: str = "<CAPTION>", **changes: Any) -> GenerationRequest:
    """Returns a request about held-out scene `index`, with `changes` to its fields."""
    scene = held_out_scene(index)
    example = scene.truth(task)
    assert example is not None
    fields: dict[str, Any] = {
        "pixel_values": resize_image(Image.fromarray(scene.image), processor().image),
        "image_key": str(index).encode(),
        "input_ids": processor().input_ids(TASKS[task].prompt(example.text)),
        "max_new_tokens": 60,
    }
    return GenerationRequest(**(fields | changes))


def scene_with_words() -> int:
    """Returns the index of a scene that has a truth for the text tasks too."""
    return next(i for i in range(50) if held_out_scene(i).words)


def answer(engine: Engine, *requests: GenerationRequest) -> list[GenerationResult]:
    return [future.result(60) for future in engine.submit(list(requests))]


@torch.inference_mode()
def by_generate(row: GenerationRequest, **options: Any) -> tuple[list[int], float]:
    """The whole way through transformers: placeholders in the prompt, images normalised in numpy."""
    image, model = processor().image, loaded().model
    scaled = row.pixel_values.astype(np.float32) * np.float32(image.rescale_factor)
    normal = (scaled - np.float32(image.mean)) / np.float32(image.std)
    ids = torch.tensor([[model.config.image_token_id] * image.image_seq_length + row.input_ids.tolist()])
    output = model.generate(
        input_ids=ids,
        pixel_values=torch.from_numpy(normal).permute(2, 0, 1)[None],
        max_new_tokens=row.max_new_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    score = output.sequences_scores[0].item() if "sequences_scores" in output else float("nan")
    return output.sequences[0].tolist(), score
