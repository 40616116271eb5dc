"""Floating-point operations and bytes by part, from the model's configuration alone.

A multiplication and an addition count as two. Norms, activations, softmax and embeddings, a few percent
together, don't count. N is the encoder's length (image tokens and prompt), t the tokens decoded so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from florence2_kserve.engine.vision import tower_flops


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by part."""

    tower: float = 0.0
    encoder: float = 0.0
    cross_kv: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.tower + self.encoder + self.cross_kv + self.decode

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.tower + other.tower,
            self.encoder + other.encoder,
            self.cross_kv + other.cross_kv,
            self.decode + other.decode,
        )


class ModelFlops:
    """What each part of one model costs.

    Args:
        config: A ``Florence2Config``.
        image_size: Side of the images, in pixels.
    """

    def __init__(self, config: Any, image_size: int) -> None:
        text = config.text_config
        self._width, self._vocab = int(text.d_model), int(text.vocab_size)
        self._encoder_layers, self._decoder_layers = int(text.encoder_layers), int(text.decoder_layers)
        self._encoder_ffn, self._decoder_ffn = int(text.encoder_ffn_dim), int(text.decoder_ffn_dim)
        self.image = float(tower_flops(config, image_size, image_size))

    def encoder(self, tokens: int) -> float:
        """Returns the operations of the encoder on one row of N tokens."""
        projections = 8 * tokens * self._width**2
        attention = 4 * tokens**2 * self._width
        ffn = 4 * tokens * self._width * self._encoder_ffn
        return float(self._encoder_layers * (projections + attention + ffn))

    def cross_kv(self, tokens: int) -> float:
        """Returns the operations that project one row's N encoder states to all layers' keys and values."""
        return float(self._decoder_layers * 4 * tokens * self._width**2)

    def decode_step(self, tokens: int, position: float) -> float:
        """Returns the operations of one beam's next token, head included, with `position` tokens to look back at."""
        projections = (8 + 4) * self._width**2  # self-attention's four, cross-attention's query and output
        attention = 4 * (position + tokens) * self._width
        ffn = 4 * self._width * self._decoder_ffn
        return self._decoder_layers * (projections + attention + ffn) + 2 * self._width * self._vocab

    def decode(self, tokens: int, steps: int) -> float:
        """Returns the operations of one beam's first `steps` tokens."""
        return steps * self.decode_step(tokens, (steps + 1) / 2)  # linear in the position

    def cross_kv_bytes(self, tokens: int, element_bytes: int) -> int:
        """Returns the bytes of one row's cross-attention keys and values."""
        return 2 * self._decoder_layers * tokens * self._width * element_bytes

    def self_kv_bytes(self, position: float, element_bytes: int) -> float:
        """Returns the bytes of one beam's own keys and values after `position` tokens."""
        return 2 * self._decoder_layers * position * self._width * element_bytes

    def decoder_weight_bytes(self, element_bytes: int) -> int:
        """Returns the bytes of the weights that every decode step reads, head included."""
        layer = 6 * self._width**2 + 2 * self._width * self._decoder_ffn
        return (self._decoder_layers * layer + self._vocab * self._width) * element_bytes
