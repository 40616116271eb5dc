"""Models to benchmark: the real sizes, and reduced ones, with seeded random weights built in memory."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from transformers import (
    BartConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2VisionConfig,
    GenerationConfig,
)

from florence2_kserve.benchmark.settings import ProfileName, SizeName
from florence2_kserve.model_files import Layout
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import GenerationSettings, LoadedModel

# As the public checkpoints of either size say in their generation_config.json.
GENERATION = GenerationSettings(
    decoder_start_token_id=2,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
    forced_bos_token_id=0,
    forced_eos_token_id=2,
    no_repeat_ngram_size=3,
    num_beams=3,
    length_penalty=1.0,
    early_stopping=True,
)
# transformers' own layout: its tokenizer has an image token and is padded to a multiple of 64.
_IMAGE_TOKEN_ID = 51289
_VOCAB_SIZE = 51328
# Queries and keys drawn as small as the rest attend to everything alike: every image would get the same answer.
_SHARPENED = 3.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers by which one model differs from another.

    Attributes:
        d_model: Width of the language model, to which images are projected.
        layers: Encoder and decoder layers.
        heads: Attention heads of both.
        ffn: Inner widths of encoder and decoder.
        positions: Positions of encoder and decoder.
        vocab_size: Rows of the embedding table.
        dim_embed: Widths of the vision tower's stages.
        vision_heads: Heads of the stages' window attention, and groups of their channel attention.
        depths: Blocks of the stages.
        window_size: Side of the attention windows, in cells.
        image_size: Side of the images, in pixels.
    """

    d_model: int
    layers: tuple[int, int]
    heads: int
    ffn: tuple[int, int]
    positions: int
    vocab_size: int
    dim_embed: tuple[int, ...]
    vision_heads: tuple[int, ...]
    depths: tuple[int, ...] = (1, 1, 9, 1)
    window_size: int = 12
    image_size: int = 768

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: its cells, 32 pixels a side, and their mean."""
        return (self.image_size // 32) ** 2 + 1


_BASE = ModelShape(
    d_model=768,
    layers=(6, 6),
    heads=12,
    ffn=(3072, 3072),
    positions=1024,
    vocab_size=_VOCAB_SIZE,
    dim_embed=(128, 256, 512, 1024),
    vision_heads=(4, 8, 16, 32),
)
_LARGE = ModelShape(
    d_model=1024,
    layers=(12, 12),
    heads=16,
    ffn=(4096, 4096),
    positions=4096,
    vocab_size=_VOCAB_SIZE,
    dim_embed=(256, 512, 1024, 2048),
    vision_heads=(8, 16, 32, 64),
)
_QUICK = ModelShape(
    d_model=128,
    layers=(2, 2),
    heads=4,
    ffn=(512, 512),
    positions=512,
    vocab_size=4096,
    dim_embed=(32, 64, 128, 256),
    vision_heads=(1, 2, 4, 8),
    depths=(1, 1, 3, 1),
    image_size=256,
)


def find_shape(size: SizeName, profile: ProfileName) -> ModelShape:
    """Returns the model that stands for a profile at a size.

    Args:
        size: ``base`` and ``large`` have the real decoder; ``quick`` is a small model.
        profile: ``decode-bound`` narrows the tower and leaves one thin encoder layer; ``vision-bound`` is the
            model as it is.
    """
    shape = {"quick": _QUICK, "base": _BASE, "large": _LARGE}[size]
    if profile == "vision-bound":
        return shape
    if size == "quick":  # whose decoder is so small that a picture must be, too
        shape = replace(shape, image_size=128, window_size=4)
    # A GPU spends a small share of its time on the tower and the encoder; a CPU sees it so only if they are small.
    return replace(
        shape,
        layers=(1, shape.layers[1]),
        ffn=(256, shape.ffn[1]),
        dim_embed=(16, 32, 64, 64),
        vision_heads=(1, 2, 4, 4),
        depths=(1, 1, 1, 1),
    )


def build_model(shape: ModelShape, *, seed: int, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Builds a model whose weights follow from `seed` alone, whatever its device and data type.

    Args:
        shape: Its numbers.
        seed: Seed of the weights.
        dtype: Data type they are rounded to.
        device: Where the model goes.
    """
    config = build_config(shape)
    model = Florence2ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied ones come once
            draws = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # scales of norms start as ones and stay around them; biases are around 0
                parameter.copy_((parameter == 1) + 0.1 * draws)
            else:
                scale = _SHARPENED if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                parameter.copy_(draws * scale / math.sqrt(math.prod(parameter.shape[1:])))
    model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()
    model.generation_config = GenerationConfig(**GENERATION.to_transformers())
    return LoadedModel(
        model=model,
        generation=GENERATION,
        layout=Layout.NATIVE,
        reference="seeded random weights",
        revision=None,
        fingerprint=hashlib.sha256(f"{shape} {seed} {dtype}".encode()).hexdigest(),
    )


def build_config(shape: ModelShape) -> Florence2Config:
    """Returns the configuration of a model of this shape."""
    vision = Florence2VisionConfig(
        embed_dim=list(shape.dim_embed),
        num_heads=list(shape.vision_heads),
        num_groups=list(shape.vision_heads),
        depths=list(shape.depths),
        window_size=shape.window_size,
        projection_dim=shape.d_model,
        drop_path_rate=0.0,
    )
    text = BartConfig(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        encoder_layers=shape.layers[0],
        decoder_layers=shape.layers[1],
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn[0],
        decoder_ffn_dim=shape.ffn[1],
        max_position_embeddings=shape.positions,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_bos_token_id=0,
        forced_eos_token_id=2,
    )
    image_token_id = min(_IMAGE_TOKEN_ID, shape.vocab_size - 1)
    return Florence2Config(vision_config=vision, text_config=text, image_token_id=image_token_id)


def image_settings(shape: ModelShape) -> ImageSettings:
    """Returns the image settings of the public checkpoints, at this model's image size."""
    return ImageSettings(
        height=shape.image_size,
        width=shape.image_size,
        resample=3,
        rescale_factor=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_seq_length=shape.image_tokens,
    )
