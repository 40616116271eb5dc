from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

from florence2_kserve.engine.vision import ImageEncoder, timm_key, timm_tower, tower_flops
from florence2_kserve.model_files import Layout, locate_model
from florence2_kserve.processor import ImageSettings, Processor
from florence2_kserve.weights import GenerationSettings, LoadedModel, load_model

BACKENDS = ("transformers", "timm")
SMALL: dict[str, Any] = {
    "depths": [1, 2, 1],
    "embed_dim": [16, 32, 48],
    "patch_size": [7, 3, 3],
    "patch_stride": [4, 2, 2],
    "patch_padding": [3, 1, 1],
    "patch_prenorm": [False, True, True],
    "num_heads": [2, 4, 3],
    "num_groups": [2, 4, 3],
    "window_size": 5,
    "projection_dim": 24,
}
# The embedded model's geometry, which timm's own patch embeddings don't have.
WIDE_STEM = SMALL | {"patch_size": [11, 3, 3], "patch_stride": [8, 2, 1], "patch_padding": [5, 1, 1]}
BASE: dict[str, Any] = {"projection_dim": 768}
LARGE: dict[str, Any] = {
    "embed_dim": [256, 512, 1024, 2048],
    "num_heads": [8, 16, 32, 64],
    "num_groups": [8, 16, 32, 64],
    "projection_dim": 1024,
}


def model_config(vision: dict[str, Any], attention: str) -> Florence2Config:
    text = BartConfig(
        vocab_size=8,
        d_model=vision["projection_dim"],
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    return Florence2Config(vision_config=vision, text_config=text.to_dict(), attn_implementation=attention)


def random_model(vision: dict[str, Any], dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> LoadedModel:
    """A model whose every parameter matters: none is 0 or 1, and attention is far from uniform."""
    config = model_config(vision, attention)
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(config).to(dtype).requires_grad_(False).eval()
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        for name, parameter in part.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)
    generation = GenerationSettings(2, 0, 2, 1, None, None, 0, 1, 1.0, False)
    return LoadedModel(model, generation, Layout.NATIVE, "random", None, "")


def settings(loaded: LoadedModel, height: int, width: int) -> ImageSettings:
    tokens = loaded.image_seq_length(height, width)
    return ImageSettings(height, width, 3, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), tokens)


def random_images(number: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (number, height, width, 3), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def by_transformers(loaded: LoadedModel, image: ImageSettings, images: torch.Tensor) -> torch.Tensor:
    scaled = (np.arange(256) * image.rescale_factor).astype(np.float32)[images.numpy()]
    normal = (scaled - np.float32(image.mean)) / np.float32(image.std)
    pixels = torch.from_numpy(normal).permute(0, 3, 1, 2).to(loaded.dtype)
    return loaded.model.model.get_image_features(pixels).pooler_output


def difference(features: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest feature."""
    assert features.shape == expected.shape
    assert features.dtype == expected.dtype
    return float((features - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("vision", "height", "width"),
    [
        (SMALL, 80, 80),  # whole windows everywhere
        (SMALL, 96, 67),  # none; odd sides before each stride
        (SMALL, 30, 141),
        (WIDE_STEM, 120, 93),
        (SMALL | {"qkv_bias": False, "mlp_ratio": 2.5}, 64, 64),
        (SMALL | {"patch_size": [4, 2, 2], "patch_padding": [0, 0, 0]}, 66, 75),  # even kernels, cut edges
    ],
)
def test_features_are_those_of_transformers(backend, attention, dtype, tolerance, vision, height, width):
    loaded = random_model(vision, dtype, attention)
    image = settings(loaded, height, width)
    images = random_images(3, height, width)
    encoder = ImageEncoder(loaded, image, backend=backend)
    features = encoder.encode(images)
    assert encoder.backend == backend
    assert features.shape == (3, encoder.image_seq_length, vision["projection_dim"])
    assert difference(features, by_transformers(loaded, image, images)) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance", "side"), [(torch.float64, 1e-10, 400), (torch.float32, 1e-5, 768)])
@pytest.mark.parametrize(
    "vision", [pytest.param(BASE, id="base"), pytest.param(LARGE, id="large", marks=pytest.mark.full)]
)
def test_features_are_those_of_transformers_at_the_public_sizes(backend, dtype, tolerance, side, vision):
    loaded = random_model(vision, dtype)
    image, images = settings(loaded, side, side), random_images(1, side, side)
    features = ImageEncoder(loaded, image, backend=backend).encode(images)
    assert difference(features, by_transformers(loaded, image, images)) < tolerance


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_the_embedded_model_sees_as_in_transformers(backend):
    loaded, image = load_model(locate_model()), Processor.load(locate_model()).image
    images = random_images(2, image.height, image.width)
    features = ImageEncoder(loaded, image, backend=backend).encode(images)
    assert difference(features, by_transformers(loaded, image, images)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_gets_the_same_features_in_any_company(backend):
    loaded = random_model(SMALL, torch.float32)
    encoder = ImageEncoder(loaded, settings(loaded, 96, 67), backend=backend)
    images = random_images(3, 96, 67)
    together = encoder.encode(images)
    assert torch.equal(together, torch.cat([encoder.encode(one) for one in images.split(1)]))
    assert torch.equal(together.flip(0), encoder.encode(images.flip(0)))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_equal_single_images(backend):
    # As on a GPU, where images do go through together.
    loaded = random_model(SMALL)
    encoder = ImageEncoder(loaded, settings(loaded, 96, 67), backend=backend)
    images = random_images(3, 96, 67)
    alone = encoder.encode(images)
    encoder._one_at_a_time = False
    assert difference(encoder.encode(images), alone) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)])
def test_half_precision_stays_near_the_exact_features(backend, dtype, tolerance):
    exact = random_model(SMALL)
    image, images = settings(exact, 96, 67), random_images(2, 96, 67)
    expected = by_transformers(exact, image, images)
    loaded = dataclasses.replace(exact, model=exact.model.to(dtype))
    features = ImageEncoder(loaded, image, backend=backend).encode(images)
    assert features.dtype == dtype
    assert difference(features.double(), expected) < tolerance


def test_float16_does_not_overflow_where_many_tokens_agree():
    # 9,216 tokens at the first stage, each with a product of 64 with itself: their sum is beyond float16.
    loaded = random_model(SMALL, torch.float32)
    attention = loaded.model.model.vision_tower.blocks[0][0].channel_block.channel_attn
    attention.qkv.weight.zero_()
    attention.qkv.bias.fill_(8.0)
    image, images = settings(loaded, 384, 384), random_images(1, 384, 384)
    expected = by_transformers(loaded, image, images)
    half = dataclasses.replace(loaded, model=loaded.model.half())
    for backend in BACKENDS:
        features = ImageEncoder(half, image, backend=backend).encode(images)
        assert difference(features.float(), expected) < 0.02


def test_pixels_are_normalised_to_the_bit():
    loaded = random_model(SMALL, torch.float32)
    image = settings(loaded, 32, 32)
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3).reshape(1, 16, 16, 3)
    normalised = ImageEncoder(loaded, image)._normalise(every)
    scaled = (np.arange(256) * image.rescale_factor).astype(np.float32)[every.numpy()]
    expected = (scaled - np.float32(image.mean)) / np.float32(image.std)
    assert np.array_equal(normalised.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_share_the_weights_of_the_model(backend):
    loaded = random_model(SMALL)
    image, images = settings(loaded, 64, 64), random_images(1, 64, 64)
    encoder = ImageEncoder(loaded, image, backend=backend)
    before = encoder.encode(images)
    for name, parameter in loaded.model.model.vision_tower.named_parameters():
        parameter.mul_(1.01)
        after = encoder.encode(images)
        # Softmax doesn't feel what the keys' bias adds, so this tells each parameter but a third of that one.
        assert not torch.equal(after, before), name
        before = after
    assert difference(before, by_transformers(loaded, image, images)) < 1e-10


def test_timms_tower_holds_no_memory_of_its_own():
    tower = random_model(WIDE_STEM).model.model.vision_tower
    davit = timm_tower(tower)
    ours = {timm_key(name): parameter.data_ptr() for name, parameter in tower.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in davit.named_parameters()} == ours
    assert not list(davit.buffers())


@pytest.mark.parametrize(("name", "vision"), [("davit_base_fl", BASE), ("davit_huge_fl", LARGE)])
def test_the_public_towers_are_timms_own(name, vision):
    import timm
    from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

    with torch.device("meta"):
        ours = timm_tower(Florence2VisionBackbone(Florence2Config(vision_config=vision).vision_config))
    theirs = timm.create_model(name, num_classes=0, device="meta")
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items() if not key.startswith("head.")}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == shapes
    for module in ("stem", "stages.1.downsample", "stages.3.blocks.0.channel_block.attn", "stages.0.blocks.0"):
        assert str(ours.get_submodule(module)) == str(theirs.get_submodule(module))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_groups": [2, 4, 6]}, r"num_groups \[2, 4, 6\] \(it takes \[2, 4, 3\]\)"),
        ({"patch_prenorm": [False, False, True]}, r"patch_prenorm \[False, False, True\]"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
    ],
)
def test_what_timm_cannot_express_is_refused_by_name_and_left_to_transformers(changes, says):
    loaded = random_model(SMALL | changes)
    image, images = settings(loaded, 64, 64), random_images(1, 64, 64)
    with pytest.raises(ValueError, match=says):
        ImageEncoder(loaded, image, backend="timm")
    encoder = ImageEncoder(loaded, image)
    assert encoder.backend == "transformers"
    assert difference(encoder.encode(images), by_transformers(loaded, image, images)) < 1e-10


def test_a_parameter_without_counterpart_in_timm_is_refused_by_name():
    tower = random_model(SMALL).model.model.vision_tower
    tower.blocks[0][0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.extra\.weight"):
        timm_tower(tower)


def test_a_processor_for_another_model_is_refused():
    loaded = random_model(SMALL)
    image = dataclasses.replace(settings(loaded, 64, 64), image_seq_length=99)
    with pytest.raises(ValueError, match="the processor counts 99 tokens for an image, the model makes 17"):
        ImageEncoder(loaded, image)


def test_compiling_without_a_compiler_is_refused_by_name():
    from torch._inductor import config

    loaded = random_model(SMALL)
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler.*no-such-compiler"),
    ):
        ImageEncoder(loaded, settings(loaded, 64, 64), compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compiled_tower_gives_the_same_features(backend):
    from torch._dynamo.utils import counters

    two_stages = {name: value[:2] for name, value in SMALL.items() if isinstance(value, list)}
    loaded = random_model(SMALL | two_stages | {"depths": [1, 1]})
    image, images = settings(loaded, 96, 67), random_images(4, 96, 67)
    expected = by_transformers(loaded, image, images)
    torch._dynamo.reset()
    encoder = ImageEncoder(loaded, image, backend=backend, compile=True)
    compiled = counters["stats"]["unique_graphs"]
    assert difference(encoder.encode(images), expected) < 1e-10
    assert counters["stats"]["unique_graphs"] == compiled  # at construction, not at the first image
    # As on a GPU: one more translation serves batches of all sizes.
    encoder._one_at_a_time, encoder._mark_dynamic = False, True
    for number in (2, 3, 4):
        assert difference(encoder.encode(images[:number]), expected[:number]) < 1e-10
    assert counters["stats"]["unique_graphs"] == compiled + 1


@pytest.mark.parametrize(
    ("vision", "height", "width"), [(SMALL, 80, 80), (SMALL, 96, 67), (WIDE_STEM, 120, 93), (BASE, 768, 768)]
)
def test_flops_are_those_that_torch_counts(vision, height, width):
    config = model_config(vision, "eager")
    with torch.device("meta"):
        florence = Florence2ForConditionalGeneration(config).model
    with FlopCounterMode(display=False) as counter:
        florence.get_image_features(torch.empty(1, 3, height, width, device="meta"))
    assert tower_flops(config, height, width) == counter.get_total_flops()
