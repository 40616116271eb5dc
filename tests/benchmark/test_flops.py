"""The formulas against what torch counts while the model runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput

from florence2_kserve.benchmark.flops import Flops, ModelFlops
from florence2_kserve.benchmark.models import build_model, find_shape

# No two numbers agree where a mix-up could hide behind that.
SHAPE = replace(
    find_shape("quick", "vision-bound"), d_model=96, layers=(2, 3), heads=4, ffn=(160, 224), vocab_size=701
)
TOKENS = 37


@pytest.fixture(scope="module")
def model():
    loaded = build_model(SHAPE, seed=1, dtype=torch.float32, device=torch.device("cpu"))
    loaded.model.set_attn_implementation("eager")  # whose products the counter sees one by one
    return loaded.model


@pytest.fixture(scope="module")
def flops(model):
    return ModelFlops(model.config, SHAPE.image_size)


@torch.inference_mode()
def counted(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def test_encoder(model, flops):
    states = torch.randn(1, TOKENS, SHAPE.d_model)
    total, _ = counted(lambda: model.model.language_model.encoder(inputs_embeds=states))
    assert flops.encoder(TOKENS) == total


def test_cross_kv_and_decode_steps(model, flops):
    encoded = BaseModelOutput(last_hidden_state=torch.randn(1, TOKENS, SHAPE.d_model))

    def step(token, cache=None):
        return model(
            encoder_outputs=encoded, decoder_input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
        )

    first, output = counted(lambda: step(2))
    second, output = counted(lambda: step(0, output.past_key_values))
    third, _ = counted(lambda: step(5, output.past_key_values))
    assert flops.cross_kv(TOKENS) + flops.decode_step(TOKENS, 1) == first
    assert flops.decode_step(TOKENS, 2) == second
    assert flops.decode_step(TOKENS, 3) == third
    assert flops.decode(TOKENS, 3) == pytest.approx(first + second + third - flops.cross_kv(TOKENS))


def test_image(model, flops):
    pixels = torch.randn(1, 3, SHAPE.image_size, SHAPE.image_size)
    total, _ = counted(lambda: model.model.get_image_features(pixels))
    assert flops.image == pytest.approx(total, rel=0.01)


def test_bytes(model, flops):
    layers = model.model.language_model.decoder.layers
    read = sum(
        module.weight.nbytes
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in ("encoder_attn.k_proj", "encoder_attn.v_proj")
    )
    assert flops.decoder_weight_bytes(4) == read + model.lm_head.weight.nbytes
    encoded = BaseModelOutput(last_hidden_state=torch.randn(1, TOKENS, SHAPE.d_model))
    cache = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([[2, 0]]), use_cache=True).past_key_values
    own, cross = (
        sum(layer.keys.nbytes + layer.values.nbytes for layer in part.layers)
        for part in (cache.self_attention_cache, cache.cross_attention_cache)
    )
    assert flops.self_kv_bytes(2, 4) == own
    assert flops.cross_kv_bytes(TOKENS, 4) == cross


def test_parts_add_up():
    both = Flops(1, 2, 3, 4) + Flops(10, 20, 30, 40)
    assert both == Flops(11, 22, 33, 44)
    assert both.total == 110
