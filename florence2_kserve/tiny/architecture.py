"""The embedded model's shape: transformers' own Florence-2 classes with small numbers, and their starting weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration
from transformers.models.florence2.modeling_florence2 import Florence2MultiModalProjector, Florence2VisionBackbone

from florence2_kserve.tiny.scenes import BINS, SIDE

WIDTH = 160
TOWER_DIMS = (48, 96, 128, 160)
TOWER_STRIDES = (8, 2, 1, 1)
GRID = SIDE // math.prod(TOWER_STRIDES)  # cells per axis after the tower
IMAGE_TOKENS = GRID * GRID + 1  # one pooled token stands before the cells
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
BOS, PAD, EOS, UNK = 0, 1, 2, 3


def build_config(vocab_size: int) -> Florence2Config:
    """Describes the model for a vocabulary whose last id is ``<image>``."""
    heads = [max(1, width // 32) for width in TOWER_DIMS]
    text = BartConfig(
        vocab_size=vocab_size,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=3,
        encoder_attention_heads=WIDTH // 32,
        decoder_attention_heads=WIDTH // 32,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        max_position_embeddings=1024,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_bos_token_id=BOS,
        forced_eos_token_id=EOS,
    )
    return Florence2Config(
        vision_config={
            "depths": [1, 1, 1, 1],
            "embed_dim": list(TOWER_DIMS),
            "patch_size": [11, 3, 3, 3],
            "patch_stride": list(TOWER_STRIDES),
            "patch_padding": [5, 1, 1, 1],
            "num_heads": heads,
            "num_groups": heads,
            "window_size": 12,
            "drop_path_rate": 0.0,
            "projection_dim": WIDTH,
        },
        text_config=text.to_dict(),
        image_token_id=vocab_size - 1,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def fourier_code(positions: Tensor, features: int) -> Tensor:
    """Codes positions in [0, 1] as sines and cosines of half to 24 turns.

    Args:
        positions: float [N].
        features: How many numbers a position gets; even.

    Returns:
        float [N, features], in [-1, 1].
    """
    turns = torch.exp(torch.linspace(math.log(0.5), math.log(24), features // 2)) * 2 * math.pi
    angles = positions[:, None] * turns
    return torch.cat([torch.sin(angles), torch.cos(angles)], 1)


def bin_code(features: int) -> Tensor:
    """Codes the centre of each location bin: float [BINS, features]."""
    return fourier_code((torch.arange(BINS) + 0.5) / BINS, features)


class Tower(nn.Module):
    """The vision side alone: DaViT and the projection to the text side's width, with starting weights."""

    def __init__(self, config: Florence2Config) -> None:
        super().__init__()
        self.vision_tower = Florence2VisionBackbone(config.vision_config)
        self.multi_modal_projector = Florence2MultiModalProjector(config)
        nn.init.normal_(self.multi_modal_projector.image_projection.weight, std=0.02)
        positions = self.multi_modal_projector.image_position_embed
        with torch.no_grad():
            for embedding in (positions.row_embeddings, positions.column_embeddings):
                code = fourier_code((torch.arange(GRID) + 0.5) / GRID, embedding.embedding_dim // 2 * 2)
                embedding.weight.normal_(std=0.02)
                embedding.weight[:GRID, : code.shape[1]] = 0.5 * code


def image_tokens(tower: nn.Module, pixel_values: Tensor) -> Tensor:
    """Sees.

    Args:
        tower: A ``Tower``, or the whole model's ``model``, which has the same two parts.
        pixel_values: Normalised pixels, float [B, 3, SIDE, SIDE].

    Returns:
        float [B, IMAGE_TOKENS, WIDTH].
    """
    return tower.multi_modal_projector(tower.vision_tower(pixel_values).last_hidden_state)  # type: ignore[operator,union-attr]


def build_model(vocab_size: int, first_location: int) -> Florence2ForConditionalGeneration:
    """Builds the whole model with starting weights; location tokens start as Fourier codes of their bins."""
    model = Florence2ForConditionalGeneration(build_config(vocab_size))
    embeddings = model.get_input_embeddings().weight
    features = WIDTH // 2
    with torch.no_grad():
        # Larger codes than this would dominate the output layer, which shares these weights.
        embeddings.normal_(std=0.05)
        embeddings[PAD].zero_()
        locations = embeddings[first_location : first_location + BINS]
        locations.mul_(0.3)
        locations[:, :features] += 0.06 * bin_code(features)
    return model
