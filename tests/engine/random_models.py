"""Models of seeded random weights, made without any file, that behave enough like trained ones.

Weights straight from an initialiser would prove little: biases are zero and norms the identity, so
that whoever forgets one isn't found out; logits are nearly uniform; and the end token is hardly
ever among the candidates, so that nothing stops early. Here all parameters are drawn, at scales
that keep every branch of the network about equally loud, and the end token's embedding is moved
towards the decoder's mean state until as many searches end as asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from florence2_kserve.benchmark.models import GENERATION
from florence2_kserve.model_files import Layout
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel

BOS, PAD, EOS = 0, 1, 2
FIRST_WORD = 4  # first id that prompts are drawn from; the last id stands for the image

_LOGIT_STD = 3.0
_FIRST_STEPS = 4


@dataclass(frozen=True, slots=True)
class _Shape:
    d_model: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    ffn_dim: int
    vocab_size: int
    positions: int
    image_side: int


_SHAPES = {
    "d128": _Shape(128, 4, 2, 2, 512, 1500, 256, 64),
    # The text side of Florence-2-base, with a short encoder.
    "base-width": _Shape(768, 12, 1, 6, 3072, 51289, 256, 64),
}


@dataclass(frozen=True, slots=True, eq=False)
class RandomModel:
    """A model and the settings of its images.

    Attributes:
        loaded: The model.
        image: Its image settings.
    """

    loaded: LoadedModel
    image: ImageSettings

    def with_early_stopping(self, early_stopping: Any) -> RandomModel:
        """Returns the same weights that stop another way."""
        generation = replace(self.loaded.generation, early_stopping=early_stopping)
        return replace(self, loaded=replace(self.loaded, generation=generation))


def random_model(
    width: str = "d128",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    end_share: float = 0.9,
    device: str = "cpu",
    **generation: Any,
) -> RandomModel:
    """Builds a model.

    Args:
        width: ``d128`` or ``base-width``.
        dtype: Of weights and activations.
        seed: Of the weights.
        end_share: About the share of greedy searches that end within 16 tokens.
        device: Where it goes.
        **generation: Fields of GenerationSettings that differ from Florence-2's.
    """
    shape = _SHAPES[width]
    settings = replace(GENERATION, **generation)
    with torch.device("meta"):  # no time spent on weights that are drawn below
        model = Florence2ForConditionalGeneration(_config(shape))
    model = model.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
    model.tie_weights()
    _draw_parameters(model, torch.Generator().manual_seed(seed))
    _raise_end_token(model, end_share, shape.image_side, seed)
    model.generation_config = GenerationConfig(**settings.to_transformers())
    loaded = LoadedModel(
        model=model.to(device),
        generation=settings,
        layout=Layout.NATIVE,
        reference=f"random {width}",
        revision=None,
        fingerprint=f"random-{width}-{seed}",
    )
    return RandomModel(loaded=loaded, image=_image_settings(loaded, shape.image_side))


def random_image(rng: np.random.Generator, image: ImageSettings) -> np.ndarray:
    """Draws large patches of colour, which a random tower tells apart better than noise.

    Returns:
        uint8 [H, W, 3].
    """
    return _patches(rng, image.height, image.width)


def random_prompt(rng: np.random.Generator, loaded: LoadedModel, length: int) -> np.ndarray:
    """Draws a prompt of `length` tokens, begin and end included: int64 [length]."""
    return _prompt(rng, loaded.vocab_size, length)


def _config(shape: _Shape) -> Florence2Config:
    dims = (32, 48, 64, 96)
    text = BartConfig(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn_dim,
        decoder_ffn_dim=shape.ffn_dim,
        max_position_embeddings=shape.positions,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )
    return Florence2Config(
        vision_config={
            "depths": [1, 1, 1, 1],
            "embed_dim": list(dims),
            "patch_stride": [4, 2, 2, 2],
            "num_heads": [dim // 16 for dim in dims],
            "num_groups": [dim // 16 for dim in dims],
            "window_size": 4,
            "drop_path_rate": 0.0,
            "projection_dim": shape.d_model,
        },
        text_config=text.to_dict(),
        image_token_id=shape.vocab_size - 1,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def _draw_parameters(model: Florence2ForConditionalGeneration, generator: torch.Generator) -> None:
    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * std + mean)

    d_model, layers = model.config.text_config.d_model, model.config.text_config.decoder_layers
    for name, module in model.named_modules():
        if module is model.lm_head:
            continue  # tied to the embeddings
        if isinstance(module, nn.LayerNorm):
            normal(module.weight, 0.1, 1.0)
            normal(module.bias, 0.1)
        elif isinstance(module, nn.Embedding):
            normal(module.weight, _LOGIT_STD / math.sqrt(d_model) if "language_model" in name else 0.5)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            inputs = module.weight[0].numel()
            normal(module.weight, _gain(name, layers) / math.sqrt(inputs))
            if module.bias is not None:
                normal(module.bias, 0.2)
    temporal = model.model.multi_modal_projector.visual_temporal_embed
    temporal.pos_idx_to_embed.copy_(type(temporal)(model.config).pos_idx_to_embed)
    normal(model.model.multi_modal_projector.image_projection.weight, 1 / math.sqrt(d_model))


def _prompt(rng: np.random.Generator, vocab_size: int, length: int) -> np.ndarray:
    prompt = rng.integers(FIRST_WORD, vocab_size - 1, length)
    prompt[0], prompt[-1] = BOS, EOS
    return prompt


def _patches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    patches = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.ascontiguousarray(patches[np.arange(height) * 3 // height][:, np.arange(width) * 3 // width])


def _gain(name: str, layers: int) -> float:
    if name.endswith(("q_proj", "k_proj")):
        return 1.5  # sharp attention: attending to everything alike would say little about the inputs
    if ".language_model." in name and name.endswith(("out_proj", "fc2")):
        # Loud branches: with tied embeddings, a residual that survives all layers repeats the last token for ever.
        return math.sqrt(5 ** (2 / layers) - 1)
    return 1.0


@torch.inference_mode()
def _raise_end_token(model: Florence2ForConditionalGeneration, share: float, side: int, seed: int) -> None:
    """Points the end token's embedding along the decoder's mean state, so that `share` of greedy searches end soon."""
    embeddings = model.get_input_embeddings().weight
    # The others lose their part along it, which would make a few tokens follow on everything.
    mean = nn.functional.normalize(_probe(model, side, seed).mean(dim=(0, 1)), dim=0)
    embeddings -= torch.outer(embeddings @ mean, mean)
    embeddings[EOS] = 0
    states = _probe(model, side, seed)
    # Across what is special to the first positions, or most sequences would end right there.
    first = torch.linalg.qr(states[:, :_FIRST_STEPS].mean(dim=0).T).Q  # [d, _FIRST_STEPS]
    states = states[:, _FIRST_STEPS:]
    direction = states.mean(dim=(0, 1))
    direction -= first @ (first.T @ direction)
    logits = states @ embeddings.T
    # How long the end token's embedding has to be for it to win somewhere, in each of the searches.
    towards = states @ direction
    needed = (logits.amax(dim=-1) / towards).where(towards > 0, math.inf).amin(dim=1)
    embeddings[EOS] = needed.quantile(share) * direction


def _probe(model: Florence2ForConditionalGeneration, side: int, seed: int) -> torch.Tensor:
    """Returns the decoder's last states in some greedy searches that never end, after the begin token: [B, T, d]."""
    language_model = model.model.language_model
    rows, length, steps = 16, 8, 16
    rng = np.random.default_rng(seed)
    vocab_size = model.config.text_config.vocab_size
    prompts = torch.from_numpy(np.stack([_prompt(rng, vocab_size, length) for _ in range(rows)]))
    pixels = torch.from_numpy(np.stack([_patches(rng, side, side) for _ in range(rows)]) / 64.0 - 2).to(model.dtype)
    features = model.get_image_features(pixels.permute(0, 3, 1, 2)).pooler_output
    embedded = torch.cat([features, model.get_input_embeddings()(prompts)], dim=1)
    states = language_model.encoder(inputs_embeds=embedded).last_hidden_state
    search = GenerationConfig(
        decoder_start_token_id=EOS,
        forced_bos_token_id=BOS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        no_repeat_ngram_size=3,
        min_new_tokens=steps,
        max_new_tokens=steps,
    )
    tokens = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        generation_config=search,
    )
    return language_model.decoder(input_ids=tokens[:, :-1], encoder_hidden_states=states).last_hidden_state[:, 1:]


def _image_settings(loaded: LoadedModel, side: int) -> ImageSettings:
    return ImageSettings(
        height=side,
        width=side,
        resample=3,
        rescale_factor=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_seq_length=loaded.image_seq_length(side, side),
    )
