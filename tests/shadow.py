"""Shadow checkpoints: folders laid out just as public Florence-2 checkpoints are, with drawn weights.

Names and shapes of the original layout come from Microsoft's own code (``data/original_layout_*.json``),
those of the native layout from transformers. Weights are drawn from the tensor's name alone, so
the same model comes out in both layouts, on every machine and in whichever order.

``python -m tests.shadow native|original FOLDER [--processor-only]`` writes a small one (10 MB), which a
CPU serves within seconds; its answers are nonsense of the right form. ``--processor-only`` leaves out the
weights: what a transformer needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from florence2_kserve.tasks import TASKS

DATA = Path(__file__).parent / "data"

BART_ENTRIES = 50_265
ADDED_TOKENS = [
    *"<od> </od> <ocr> </ocr>".split(),
    *(f"<loc_{bin_}>" for bin_ in range(1000)),
    *"<cap> </cap> <ncap> </ncap> <dcap> </dcap> <grounding> </grounding> <seg> </seg> <sep> <region_cap>".split(),
    *"</region_cap> <region_to_desciption> </region_to_desciption> <proposal> </proposal>".split(),
    *"<poly> </poly> <and>".split(),
]
ORIGINAL_VOCAB_SIZE = BART_ENTRIES + len(ADDED_TOKENS)
IMAGE_TOKEN_ID = ORIGINAL_VOCAB_SIZE
NATIVE_VOCAB_SIZE = 64 * math.ceil((ORIGINAL_VOCAB_SIZE + 1) / 64)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

SHARED = "language_model.model.shared.weight"
TIED = (
    SHARED,
    "language_model.lm_head.weight",
    "language_model.model.encoder.embed_tokens.weight",
    "language_model.model.decoder.embed_tokens.weight",
)

Array = np.ndarray[Any, Any]
Change = Callable[[dict[str, Array]], None]


@dataclass(frozen=True, slots=True)
class Size:
    """What distinguishes one checkpoint's configuration from another's.

    Attributes:
        name: Also of the file of names and shapes.
        d_model: Width of the language model, to which images are projected.
        layers: Encoder and decoder layers.
        heads: Attention heads of encoder and decoder.
        ffn: Inner widths of encoder and decoder.
        positions: Positions of encoder and decoder.
        dim_embed: Widths of the vision tower's stages.
        vision_heads: Window attention heads of the stages.
        vision_groups: Channel attention groups of the stages.
        depths: Blocks of the stages.
        window_size: Side of the attention windows, in cells.
        image_size: Side of the images, in pixels.
    """

    name: str
    d_model: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    ffn: tuple[int, int]
    positions: int
    dim_embed: tuple[int, ...]
    vision_heads: tuple[int, ...]
    vision_groups: tuple[int, ...]
    depths: tuple[int, ...] = (1, 1, 9, 1)
    window_size: int = 12
    image_size: int = 768

    @property
    def image_seq_length(self) -> int:
        """Tokens of an image: its cells, 32 pixels a side, and their mean."""
        return (self.image_size // 32) ** 2 + 1


# No two of its numbers agree where a mix-up could hide behind that, and windows need padding.
SMALL = Size(
    name="small",
    d_model=64,
    layers=(2, 3),
    heads=(4, 8),
    ffn=(96, 128),
    positions=256,
    dim_embed=(16, 32, 48, 80),
    vision_heads=(1, 2, 3, 5),
    vision_groups=(2, 4, 6, 8),
    depths=(1, 1, 2, 1),
    window_size=5,
    image_size=96,
)
BASE = Size(
    name="base",
    d_model=768,
    layers=(6, 6),
    heads=(12, 12),
    ffn=(3072, 3072),
    positions=1024,
    dim_embed=(128, 256, 512, 1024),
    vision_heads=(4, 8, 16, 32),
    vision_groups=(4, 8, 16, 32),
)
LARGE = Size(
    name="large",
    d_model=1024,
    layers=(12, 12),
    heads=(16, 16),
    ffn=(4096, 4096),
    positions=4096,
    dim_embed=(256, 512, 1024, 2048),
    vision_heads=(8, 16, 32, 64),
    vision_groups=(8, 16, 32, 64),
)


def write_original(
    folder: Path,
    size: Size = SMALL,
    *,
    tied_keys: tuple[str, ...] = (SHARED,),
    shards: int = 1,
    change: Change | None = None,
) -> Path:
    """Writes a checkpoint in Microsoft's layout, in float16, and returns its folder.

    Args:
        folder: Made if it isn't there.
        size: Which checkpoint to shadow.
        tied_keys: Under which of its four names the embedding matrix is stored.
        shards: Files over which the weights are spread.
        change: Changes the tensors before they are written.
    """
    shapes = original_shapes(size)
    tensors = {key: original_tensor(key, shape) for key, shape in shapes.items() if key not in TIED}
    shared = original_tensor(SHARED, shapes[SHARED])
    tensors |= dict.fromkeys(tied_keys, shared)
    _write_weights(folder, tensors, shards, change)
    _write_json(folder / "config.json", original_config(size))
    # Has no effect in this layout, where text_config decides; that it says otherwise is so in public, too.
    _write_json(folder / "generation_config.json", {"num_beams": 3, "early_stopping": False})
    _write_json(folder / "preprocessor_config.json", _original_preprocessor_config(size))
    (folder / "tokenizer.json").write_text(tokenizer_json(added=False), encoding="utf-8")
    (folder / "vocab.json").write_text(_vocab_json(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})
    return folder


def write_native(
    folder: Path,
    size: Size = SMALL,
    *,
    saved_by: Literal[4, 5] = 4,
    shards: int = 1,
    change: Change | None = None,
) -> Path:
    """Writes a checkpoint in transformers' layout, in float16, with the weights of `write_original`.

    Args:
        folder: Made if it isn't there.
        size: Which checkpoint to shadow.
        saved_by: Major version of transformers that the folder looks to be saved by; public ones are by 4.
        shards: Files over which the weights are spread.
        change: Changes the tensors before they are written.
    """
    from florence2_kserve.weights import native_key  # needs torch

    tensors = {}
    for key, shape in original_shapes(size).items():
        name = native_key(key)
        if name is not None and (key not in TIED or key == SHARED):
            tensor = original_tensor(key, shape)
            tensors[name] = np.ascontiguousarray(tensor.T) if key == "image_projection" else tensor
            if key == SHARED:
                tensors[name] = _with_added_rows(tensor)
    _write_weights(folder, tensors, shards, change)
    _write_json(folder / "config.json", native_config(size, saved_by))
    _write_json(folder / "generation_config.json", _NATIVE_GENERATION)
    (folder / "tokenizer.json").write_text(tokenizer_json(added=True), encoding="utf-8")
    processor = {
        "num_additional_image_tokens": 0,
        "post_processor_config": _POST_PROCESSOR_CONFIG,
        "processor_class": "Florence2Processor",
    }
    if saved_by == 5:
        _write_json(folder / "processor_config.json", {"image_processor": _native_image_processor(size), **processor})
        _write_json(folder / "tokenizer_config.json", _NATIVE_TOKENIZER_CONFIG)
        return folder
    _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "preprocessor_config.json", _native_image_processor(size))
    tokenizer = json.loads(tokenizer_json(added=True))
    (folder / "vocab.json").write_text(_vocab_json(), encoding="utf-8")
    merges = "\n".join(" ".join(merge) for merge in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    added = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"] if entry["id"] >= BART_ENTRIES}
    _write_json(folder / "added_tokens.json", added)
    specials = {"additional_special_tokens": ADDED_TOKENS}
    names = {name: value for name, value in _NATIVE_TOKENIZER_CONFIG.items() if name.endswith("_token")}
    _write_json(folder / "special_tokens_map.json", specials | names)
    _write_json(folder / "tokenizer_config.json", _NATIVE_TOKENIZER_CONFIG | specials)
    return folder


def original_config(size: Size) -> dict[str, Any]:
    """Returns the ``config.json`` of Microsoft's layout."""
    return {
        "_name_or_path": "florence2",
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_florence2.Florence2Config",
            "AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration",
        },
        "bos_token_id": 0,
        "eos_token_id": 2,
        "ignore_index": -100,
        "model_type": "florence2",
        "pad_token_id": 1,
        "projection_dim": size.d_model,
        "text_config": _text_config(size, ORIGINAL_VOCAB_SIZE),
        "vision_config": {"model_type": "davit", **_original_vision_config(size)},
        "vocab_size": ORIGINAL_VOCAB_SIZE,
        "torch_dtype": "float16",
        "transformers_version": "4.41.0.dev0",
        "is_encoder_decoder": True,
    }


def native_config(size: Size, saved_by: Literal[4, 5] = 4) -> dict[str, Any]:
    """Returns the ``config.json`` of transformers' layout, as a conversion of Microsoft's, saved again, has it."""
    text = {"model_type": "bart", "use_cache": True, **_text_config(size, NATIVE_VOCAB_SIZE)}
    if saved_by == 4:  # it leaves out what is the class's default
        dropped = (
            "bos_token_id decoder_start_token_id eos_token_id forced_eos_token_id is_encoder_decoder pad_token_id"
        )
    else:  # it leaves out what belongs into generation_config.json
        dropped = "early_stopping forced_bos_token_id no_repeat_ngram_size num_beams num_hidden_layers"
    config = {
        "architectures": ["Florence2ForConditionalGeneration"],
        "dtype": "float16",
        "image_token_id": IMAGE_TOKEN_ID,
        "is_encoder_decoder": True,
        "model_type": "florence2",
        "text_config": {name: value for name, value in text.items() if name not in dropped.split()},
        "vision_config": {
            **_original_vision_config(size),
            "model_type": "florence_vision",
            "activation_function": "gelu",
            "embed_dim": list(size.dim_embed),
            "in_channels": 3,
            "initializer_range": 0.02,
            "max_pos_embeddings": 50,
            "max_position_embeddings": 50,
            "max_temporal_embeddings": 100,
            "mlp_ratio": 4.0,
            "qkv_bias": True,
        },
    }
    return config | ({"tie_word_embeddings": True} if saved_by == 5 else {})


def _text_config(size: Size, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "activation_dropout": 0.1,
        "activation_function": "gelu",
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "attention_dropout": 0.1,
        "bos_token_id": 0,
        "classif_dropout": 0.1,
        "classifier_dropout": 0.0,
        "d_model": size.d_model,
        "decoder_attention_heads": size.heads[1],
        "decoder_ffn_dim": size.ffn[1],
        "decoder_layerdrop": 0.0,
        "decoder_layers": size.layers[1],
        "decoder_start_token_id": 2,
        "dropout": 0.1,
        "early_stopping": True,
        "encoder_attention_heads": size.heads[0],
        "encoder_ffn_dim": size.ffn[0],
        "encoder_layerdrop": 0.0,
        "encoder_layers": size.layers[0],
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
        "forced_bos_token_id": 0,
        "gradient_checkpointing": False,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "max_position_embeddings": size.positions,
        "no_repeat_ngram_size": 3,
        "normalize_before": False,
        "num_hidden_layers": size.layers[0],
        "pad_token_id": 1,
        "scale_embedding": False,
        "num_beams": 3,
    }


def _original_vision_config(size: Size) -> dict[str, Any]:
    return {
        "drop_path_rate": 0.1,
        "patch_size": [7, 3, 3, 3],
        "patch_stride": [4, 2, 2, 2],
        "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True],
        "enable_checkpoint": False,
        "dim_embed": list(size.dim_embed),
        "num_heads": list(size.vision_heads),
        "num_groups": list(size.vision_groups),
        "depths": list(size.depths),
        "window_size": size.window_size,
        "projection_dim": size.d_model,
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 100},
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 50},
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    }


def original_shapes(size: Size) -> dict[str, list[int]]:
    """Returns all names and shapes of the original layout, as Microsoft's code gives them."""
    shapes: dict[str, list[int]] = read_oracle(size)["shapes"]
    return shapes


def read_oracle(size: Size) -> dict[str, Any]:
    """Returns what was recorded of Microsoft's own code at this size."""
    oracle: dict[str, Any] = json.loads((DATA / f"original_layout_{size.name}.json").read_text(encoding="utf-8"))
    return oracle


def original_tensor(key: str, shape: list[int]) -> Array:
    """Returns the float16 tensor that stands under `key` in the original layout, drawn from that name alone."""
    if key.endswith("pos_idx_to_embed"):
        return _sinusoids(*shape).astype(np.float16)
    if key.endswith("final_logits_bias"):
        return np.zeros(shape, dtype=np.float16)
    values = draw(key, shape)
    if len(shape) == 1:
        is_scale = key.endswith("weight")
        return (values * np.float32(0.1) + np.float32(is_scale)).astype(np.float16)
    inputs = math.prod(shape[1:]) if key != "image_projection" else shape[0]
    return (values * np.float32(1 / math.sqrt(inputs))).astype(np.float16)


def draw(name: str, shape: list[int]) -> Array:
    """Returns float32 values of mean 0 and variance 1, uniformly drawn by PCG64 seeded with `name`'s SHA-256."""
    is_small = math.prod(shape) < 2**22
    return _kept(name, tuple(shape)).copy() if is_small else _drawn(name, tuple(shape))


def _drawn(name: str, shape: tuple[int, ...]) -> Array:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest(), "little")
    values = np.random.Generator(np.random.PCG64(seed)).random(shape, dtype=np.float32)
    return (values - np.float32(0.5)) * np.float32(math.sqrt(12))


_kept = lru_cache(maxsize=400)(_drawn)  # a small checkpoint is written many times over


def _sinusoids(positions: int, width: int) -> Array:
    frequencies = np.exp(-math.log(10_000) * np.arange(0, width, 2) / width)
    angles = np.arange(positions)[:, None] * frequencies
    table = np.zeros((positions, width))
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)
    return table


def _with_added_rows(embeddings: Array) -> Array:
    # transformers draws the rows it adds around the mean of the others.
    mean = embeddings.astype(np.float32).mean(axis=0)
    noise = draw("added rows", [NATIVE_VOCAB_SIZE - len(embeddings), embeddings.shape[1]])
    return np.concatenate([embeddings, (mean + noise * np.float32(1e-3)).astype(np.float16)])


def _write_weights(folder: Path, tensors: dict[str, Array], shards: int, change: Change | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if change is not None:
        change(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    place = {key: names[index % shards] for index, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key] for key in tensors if place[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": place})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


@lru_cache
def tokenizer_json(*, added: bool) -> str:
    """Returns a byte-level BPE tokenizer of BART's size and kind, which knows the words of the task prompts.

    Args:
        added: Whether Florence-2's tokens are in it, with ``<image>``, as in the native layout; the
            original layout's is a plain one, to which Microsoft's processor adds them as it starts.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    learned.train_from_iterator([f" {task.template}" for task in TASKS.values()], trainer)
    model = json.loads(learned.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    filler = [f"madeupword{index:05}" for index in range(BART_ENTRIES - 5 - len(words))]
    entries = ["<s>", "<pad>", "</s>", "<unk>", *words, *filler, "<mask>"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={entry: index for index, entry in enumerate(entries)},
            merges=[tuple(merge) for merge in model["merges"]],
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=True, lstrip=token == "<mask>") for token in (*entries[:4], "<mask>")]
    )
    if added:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*ADDED_TOKENS, "<image>"]])
    return tokenizer.to_str()


@lru_cache
def _vocab_json() -> str:
    return json.dumps(json.loads(tokenizer_json(added=False))["model"]["vocab"])


def _original_preprocessor_config(size: Size) -> dict[str, Any]:
    return {
        "auto_map": {"AutoProcessor": "processing_florence2.Florence2Processor"},
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "do_center_crop": False,
        "image_processor_type": "CLIPImageProcessor",
        "image_seq_length": size.image_seq_length,
        "image_mean": MEAN,
        "image_std": STD,
        "processor_class": "Florence2Processor",
        "resample": 3,
        "size": {"height": size.image_size, "width": size.image_size},
        "crop_size": {"height": size.image_size, "width": size.image_size},
    }


def _native_image_processor(size: Size) -> dict[str, Any]:
    return {
        "crop_size": {"height": size.image_size, "width": size.image_size},
        "do_center_crop": False,
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_seq_length": size.image_seq_length,
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size.image_size, "width": size.image_size},
    }


_NATIVE_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "early_stopping": True,
    "eos_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "no_repeat_ngram_size": 3,
    "num_beams": 3,
    "pad_token_id": 1,
}
_NATIVE_TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "errors": "replace",
    "extra_special_tokens": {"image_token": "<image>"},
    "image_token": "<image>",
    "mask_token": "<mask>",
    "model_max_length": 1024,
    "pad_token": "<pad>",
    "processor_class": "Florence2Processor",
    "sep_token": "</s>",
    "tokenizer_class": "BartTokenizer",
    "trim_offsets": True,
    "unk_token": "<unk>",
}
_POST_PROCESSOR_CONFIG: dict[str, Any] = {
    "ocr": {
        "pattern": r"(.+?)" + r"<loc_(\d+)>" * 8,
        "area_threshold": 0.0,
    },
    "phrase_grounding": {
        "banned_grounding_tokens": [
            *"it I me mine you your he him his she her they them their one we us our its this that these".split(),
            *"those who which what all another any each everyone everything few many none several some".split(),
            *"someone something image images the a an lots".split(),
            *("each other", "one another", "the image", "a group", "other objects", "a set"),
        ],
    },
    "pure_text": {},
    "description_with_bboxes": {},
    "description_with_polygons": {},
    "polygons": {},
    "bboxes": {},
    "description_with_bboxes_or_polygons": {},
}


# Its answers, which hardly ever end by themselves, are as long as its positions allow.
_QUICK = replace(SMALL, positions=96)


def _cut_positions(tensors: dict[str, Array]) -> None:
    for key, tensor in tensors.items():
        if key.endswith("embed_positions.weight"):
            tensors[key] = np.ascontiguousarray(tensor[: _QUICK.positions + 2])  # BART's are two rows longer


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes a small checkpoint, as the arguments say (None: those of the command line)."""
    parser = argparse.ArgumentParser(description="Writes a small checkpoint with drawn weights.")
    parser.add_argument("layout", choices=["native", "original"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processor-only", action="store_true", help="without weights, as for a transformer")
    given = parser.parse_args(arguments)
    {"native": write_native, "original": write_original}[given.layout](given.folder, _QUICK, change=_cut_positions)
    if given.processor_only:
        (given.folder / "model.safetensors").unlink()


if __name__ == "__main__":
    main()
