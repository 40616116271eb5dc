"""The shipped files: transformers loads them, and they agree with each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from florence2_kserve.tasks import TASKS
from florence2_kserve.tiny.architecture import IMAGE_TOKENS
from florence2_kserve.tiny.export import Reader
from florence2_kserve.tiny.scenes import SIDE, held_out_scene
from tests.tiny.conftest import CHECKPOINT


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.set_num_threads(1)
    return Reader.load(CHECKPOINT)


def test_weights_fit_in_git() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 16_000_000


def test_sizes_agree(reader: Reader) -> None:
    config, tokenizer = reader.model.config, reader.processor.tokenizer
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1
    assert reader.processor.num_image_tokens == IMAGE_TOKENS
    assert config.text_config.max_position_embeddings == 1024
    output = reader.model.get_output_embeddings().weight
    assert output.data_ptr() == reader.model.get_input_embeddings().weight.data_ptr(), "the embeddings are tied"


def test_generation_is_florence_2s() -> None:
    settings = json.loads((CHECKPOINT / "generation_config.json").read_text())
    settings.pop("transformers_version")
    assert settings == {
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "eos_token_id": 2,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 3,
        "num_beams": 3,
        "pad_token_id": 1,
    }


def test_prompts_are_those_of_the_task_registry(reader: Reader) -> None:
    image = held_out_scene(0).image
    for task in TASKS.values():
        text = "" if task.prompt("x") == task.prompt("") else "<loc_1><loc_2><loc_3><loc_4>"
        inputs = reader.processor(images=[image], text=[task.name + text], return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
        ids = inputs["input_ids"][0].tolist()
        assert ids[:IMAGE_TOKENS] == [reader.model.config.image_token_id] * IMAGE_TOKENS
        assert ids[IMAGE_TOKENS:] == reader.processor.tokenizer(task.prompt(text))["input_ids"]


def test_every_task_is_answered(reader: Reader) -> None:
    scene = held_out_scene(0)
    for name in TASKS:
        example = scene.truth(name)
        answer = reader.infer([scene.image], [name], [example.text if example else "<loc_9><loc_9><loc_99><loc_99>"])[
            0
        ]
        assert isinstance(answer, str if example is None or isinstance(example.answer, str) else dict)


def test_it_sees(reader: Reader) -> None:
    """Well above chance (1 in 6 shapes, 1 in 96 descriptions), so that swapped colours or a broken tower show."""
    scenes = [held_out_scene(index) for index in range(8)]
    for task in ("<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>"):
        examples = [scene.truth(task) for scene in scenes]
        asked = [(scene.image, example) for scene, example in zip(scenes, examples, strict=True) if example]
        answers = reader.infer([image for image, _ in asked], [task] * 8, [example.text for _, example in asked])
        assert np.mean([answer == example.answer for answer, (_, example) in zip(answers, asked, strict=True)]) > 0.6
