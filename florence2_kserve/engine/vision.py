"""Images to features: the DaViT tower and the projection in front of the text encoder.

Both backends run one set of weights. ``transformers`` goes through the modules of transformers'
tower in a pass of our own: tokens stay in one memory layout throughout, residuals are added in
place, and channel attention is two batched matrix products. ``timm`` is timm's DaViT on the same
parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import Florence2Config
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone, Florence2VisionChannelAttention

from florence2_kserve.engine.capture import require_compiler
from florence2_kserve.processor import ImageSettings
from florence2_kserve.weights import LoadedModel

VisionBackend = Literal["auto", "transformers", "timm"]
Tower = Callable[[torch.Tensor], torch.Tensor]  # [I,3,H,W] -> [I,C,h,w]

# Tokens that a feed-forward layer takes at a time on a CPU: its hidden states then stay in the cache, and
# in memory that the allocator reuses; larger ones are mapped anew, page by page, at every layer.
_CPU_MLP_TOKENS = 512

# Parts of keys, in transformers' tower and in timm's.
_TIMM_PARTS = {
    r"^convs\.0\.": "stem.",
    r"^convs\.(\d+)\.": r"stages.\1.downsample.",
    r"^blocks\.(\d+)\.": r"stages.\1.blocks.",
    r"\.conv([12])\.": r".cpe\1.proj.",
    r"\.(window|channel)_attn\.": ".attn.",
    r"\.ffn\.": ".mlp.",
}


class ImageEncoder:
    """Turns pixels into what the text encoder gets for an image.

    On a CPU images go through one at a time: batches gain nothing there, and an image's features are
    the same to the bit in any company.

    Args:
        loaded: The model, on its device.
        image: Image settings: size, scale, mean and standard deviation.
        backend: ``auto`` takes ``transformers``, whose pass measured fastest.
        compile: Whether torch.compile translates the tower, here and now: about a minute for the public sizes.
            On a GPU single images and batches are compiled once each, batches for any number of images.

    Attributes:
        backend: The backend in use, ``transformers`` or ``timm``.
        image_seq_length: Features of an image, S.

    Raises:
        ValueError: If the image settings don't fit the model, or timm can't express its tower.
        RuntimeError: If the tower is to be compiled and a compiler is missing.
    """

    def __init__(
        self, loaded: LoadedModel, image: ImageSettings, *, backend: VisionBackend = "auto", compile: bool = False
    ) -> None:
        tokens = loaded.image_seq_length(image.height, image.width)
        if tokens != image.image_seq_length:
            raise ValueError(
                f"the processor counts {image.image_seq_length} tokens for an image, the model makes {tokens}"
            )
        if compile:
            require_compiler(loaded.device, "the vision tower")
        florence = loaded.model.model
        self.backend = "transformers" if backend == "auto" else backend
        self.image_seq_length = tokens
        self._device = loaded.device
        self._one_at_a_time = loaded.device.type == "cpu"
        self._projector = florence.multi_modal_projector
        self._mark_dynamic = compile and not self._one_at_a_time
        if self.backend == "timm":
            self._tower: Tower = timm_tower(florence.vision_tower).forward_features
        else:
            # Compiled, each part would be a copy of the layer's code.
            parts = self._one_at_a_time and not compile
            self._tower = _TransformersTower(florence.vision_tower, _CPU_MLP_TOKENS if parts else None)
        if compile:
            self._tower = torch.compile(self._tower, dynamic=False)
        # What each 8-bit value becomes in each channel, flat [3 * 256]. The scaled value is rounded once from
        # float64, as the image processor in numpy does it; the rest is float32 whatever the model's dtype.
        scaled = (torch.arange(256, dtype=torch.float64) * image.rescale_factor).float()
        mean, std = torch.tensor(image.mean)[:, None], torch.tensor(image.std)[:, None]
        self._normalised = ((scaled - mean) / std).flatten().to(loaded.device, loaded.dtype)
        self._channel_starts = 256 * torch.arange(3, dtype=torch.int32, device=loaded.device)
        if compile:
            for images in (1,) if self._one_at_a_time else (1, 2):
                self.encode(torch.zeros(images, image.height, image.width, 3, dtype=torch.uint8))

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes images.

        Args:
            pixel_values: uint8 [I,H,W,3], on any device.

        Returns:
            [I,S,d], in the model's dtype and on its device.
        """
        pixels = self._normalise(pixel_values)
        if self._one_at_a_time:
            return torch.cat([self._encode_batch(one) for one in pixels.split(1)])
        return self._encode_batch(pixels)

    def _normalise(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns [I,3,H,W] with channels last in memory, in the model's dtype."""
        index = pixel_values.to(self._device).int() + self._channel_starts
        return self._normalised.take(index.long()).permute(0, 3, 1, 2)

    def _encode_batch(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._mark_dynamic and len(pixels) > 1:
            torch._dynamo.mark_dynamic(pixels, 0)
        return self._projector(self._tower(pixels))


class _TransformersTower:
    """Runs transformers' tower on tokens [I,h,w,C] that are contiguous from end to end.

    Args:
        tower: The tower, in evaluation mode.
        mlp_tokens: Tokens that a feed-forward layer takes at a time; None for all.
    """

    def __init__(self, tower: Florence2VisionBackbone, mlp_tokens: int | None) -> None:
        self._tower = tower
        self._mlp_tokens = mlp_tokens

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels
        for embed, blocks in zip(self._tower.convs, self._tower.blocks, strict=True):
            x = embed(x).permute(0, 2, 3, 1).contiguous()
            for block in blocks:
                x = self._layer(block.spatial_block, block.spatial_block.window_attn, x)
                x = self._layer(block.channel_block, partial(_attend_channels, block.channel_block.channel_attn), x)
            x = x.permute(0, 3, 1, 2)
        return x

    def _layer(self, block: Any, attention: Tower, x: torch.Tensor) -> torch.Tensor:
        x = _add_convolved(block.conv1, x)
        x += attention(block.norm1(x)).view_as(x)
        x = _add_convolved(block.conv2, x)
        tokens = x.flatten(0, 2)  # [I*h*w, C], a view
        for part in tokens.split(self._mlp_tokens or len(tokens)):
            part += block.ffn(block.norm2(part))
        return x


def _add_convolved(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous().add_(x)


def _attend_channels(attention: Florence2VisionChannelAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention among the channels of each group, [I,h,w,C] -> [I,h*w,C]."""
    groups, tokens = attention.groups, x.shape[1] * x.shape[2]
    qkv = attention.qkv(x.flatten(1, 2)).unflatten(-1, (3, groups, -1))  # [I, tokens, 3, groups, c]
    query, key, value = qkv.permute(2, 0, 3, 4, 1)  # [I, groups, c, tokens] each
    # Scaled first: sums over all tokens would overflow float16.
    weights = torch.softmax((query * tokens**-0.5) @ key.mT, dim=-1)  # [I, groups, c, c]
    mixed = value.mT @ weights.mT  # [I, groups, tokens, c]
    return attention.proj(mixed.transpose(1, 2).flatten(2))


def timm_tower(tower: Florence2VisionBackbone) -> Any:
    """Builds timm's DaViT around the parameters of transformers' tower; none is copied.

    Args:
        tower: transformers' tower.

    Returns:
        A ``timm.models.davit.DaVit`` without head, in evaluation mode.

    Raises:
        ValueError: If timm can't express the tower, or a parameter has no counterpart.
    """
    from timm.models.davit import DaVit

    config = tower.config
    stages = len(config.embed_dim)
    wrong = [
        f"{name} {given!r} (it takes {taken!r})"
        for name, given, taken in (
            ("num_groups", list(config.num_groups), list(config.num_heads)),
            ("patch_prenorm", list(config.patch_prenorm), [False] + [True] * (stages - 1)),
            ("activation_function", config.activation_function, "gelu"),
        )
        if given != taken
    ]
    if wrong:
        raise ValueError(f"timm's DaViT can't express {', '.join(wrong)}; use the transformers backend")
    davit = DaVit(
        in_chans=config.in_channels,
        depths=tuple(config.depths),
        embed_dims=tuple(config.embed_dim),
        num_heads=tuple(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        down_kernel_size=3,
        channel_attn_v2=True,
        named_blocks=True,
        num_classes=0,
        device="meta",
    )
    davit.head = nn.Identity()
    # timm's patch embeddings have one geometry, and pad what it doesn't divide; these have the checkpoint's.
    davit.stem.conv, davit.stem.stride = _same_geometry(tower.convs[0].conv), (1, 1)
    for stage, embed in zip(davit.stages[1:], tower.convs[1:], strict=True):
        stage.downsample.conv = _same_geometry(embed.conv)
    try:
        davit.load_state_dict({timm_key(key): value for key, value in tower.state_dict().items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the tower's parameters don't fit timm's DaViT: {error}") from error
    return davit.requires_grad_(False).eval()


def _same_geometry(conv: nn.Conv2d) -> nn.Conv2d:
    kernel, stride, padding = (getattr(conv, name) for name in ("kernel_size", "stride", "padding"))
    return nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, padding, device="meta")


def timm_key(key: str) -> str:
    """Translates a parameter's name in transformers' tower into timm's."""
    for part, replacement in _TIMM_PARTS.items():
        key = re.sub(part, replacement, key)
    return key


def tower_flops(config: Florence2Config, height: int, width: int) -> int:
    """Counts the work of tower and projector for one image: two operations for each multiplication in
    convolutions and matrix products; normalisation, activations and biases are left out.

    Args:
        config: The model's configuration.
        height: Pixels.
        width: Pixels.
    """
    vision = config.vision_config
    total, channels = 0, vision.in_channels
    for stage, dim in enumerate(vision.embed_dim):
        kernel, stride, padding = (
            geometry[stage] for geometry in (vision.patch_size, vision.patch_stride, vision.patch_padding)
        )
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        tokens, window = height * width, vision.window_size
        padded = -(-height // window) * -(-width // window) * window**2  # tokens in whole windows
        embed = tokens * kernel**2 * channels * dim
        convs_and_mlp = tokens * (2 * 9 * dim + 2 * dim * int(dim * vision.mlp_ratio))
        window_attention = padded * (4 * dim**2 + 2 * window**2 * dim)
        channel_attention = tokens * (4 * dim**2 + 2 * dim**2 // vision.num_groups[stage])
        total += embed + vision.depths[stage] * (2 * convs_and_mlp + window_attention + channel_attention)
        channels = dim
    return 2 * (total + (tokens + 1) * channels * vision.projection_dim)
