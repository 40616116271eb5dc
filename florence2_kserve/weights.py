"""Loads a checkpoint's weights into transformers' Florence-2, from either key layout.

transformers' own layout goes through its ``from_pretrained``. Microsoft's original layout is made
for Python code that lies beside the weights; here its configuration and keys are translated
instead, and that code is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    BartConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2VisionConfig,
    GenerationConfig,
)
from transformers.utils import logging as transformers_logging

from florence2_kserve.model_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    Layout,
    ModelFiles,
    ModelFilesError,
    read_json,
)

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # names in safetensors headers

# Keys, by their beginnings, in Microsoft's layout and in transformers'.
_KEY_BEGINNINGS = {
    "vision_tower.": "model.vision_tower.",
    "image_projection": "model.multi_modal_projector.image_projection.weight",
    "image_proj_norm.": "model.multi_modal_projector.image_proj_norm.",
    "image_pos_embed.": "model.multi_modal_projector.image_position_embed.",
    "visual_temporal_embed.": "model.multi_modal_projector.visual_temporal_embed.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
# Within the vision tower. Microsoft's blocks wrap each layer and its norm: the norm is at
# ``window_attn.norm``, the layer itself at ``window_attn.fn``.
_VISION_PARTS = {
    "conv1.fn.dw": "conv1",
    "conv2.fn.dw": "conv2",
    "window_attn.norm": "norm1",
    "window_attn.fn": "window_attn",
    "channel_attn.norm": "norm1",
    "channel_attn.fn": "channel_attn",
    "ffn.norm": "norm2",
    "ffn.fn.net": "ffn",
}
_CONV_PARTS = {"proj": "conv"}

# One matrix under four names; a checkpoint stores it once or several times.
_TIED_KEYS = (
    "model.language_model.shared.weight",
    "lm_head.weight",
    "model.language_model.encoder.embed_tokens.weight",
    "model.language_model.decoder.embed_tokens.weight",
)
_IMAGE_PROJECTION = "model.multi_modal_projector.image_projection.weight"
_TEMPORAL_EMBEDDING = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
_LOGITS_BIAS = "language_model.final_logits_bias"  # zeros; transformers' Florence-2 has no such bias

# Fields of Microsoft's configuration that transformers' classes take under the same names.
_VISION_FIELDS = (
    "depths drop_path_rate num_groups num_heads patch_padding patch_prenorm patch_size patch_stride projection_dim "
    "window_size"
).split()
_TEXT_FIELDS = (
    "activation_dropout activation_function attention_dropout bos_token_id d_model decoder_attention_heads "
    "decoder_ffn_dim decoder_layerdrop decoder_layers decoder_start_token_id dropout encoder_attention_heads "
    "encoder_ffn_dim encoder_layerdrop encoder_layers eos_token_id forced_eos_token_id init_std "
    "max_position_embeddings pad_token_id scale_embedding vocab_size"
).split()
_TEXT_DEFAULTS = {"vocab_size": 51289}  # the one that differs from BART's

# Settings of generation that the engine does not have, with the values at which they do nothing.
_NOT_FOLLOWED: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "sequence_bias": None,
    "suppress_tokens": None,
}

_WHOLE_HASH_BYTES = 64 * 1024 * 1024
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How a checkpoint wants to be decoded, under transformers' names.

    Attributes:
        decoder_start_token_id: First token fed to the decoder.
        bos_token_id: Begin of a sentence.
        eos_token_id: End of a sentence.
        pad_token_id: Padding.
        forced_bos_token_id: Token forced at the first step; None for none.
        forced_eos_token_id: Token forced at the last step; None for none.
        no_repeat_ngram_size: Length of token sequences that may not occur twice; 0 for none.
        num_beams: Beams; 1 is greedy search.
        length_penalty: Exponent of the length by which a sequence's score is divided.
        early_stopping: When beam search stops.
    """

    decoder_start_token_id: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]

    def to_transformers(self) -> dict[str, Any]:
        """Returns the keyword arguments of an equal ``transformers.GenerationConfig``."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: In evaluation mode, without gradients, on its device and in its data type.
        generation: How it wants to be decoded.
        layout: Layout of the checkpoint.
        reference: What was asked for.
        revision: Commit of the hub repository; None where unknown.
        fingerprint: Hash of weights and configuration, for keys of caches.
    """

    model: Florence2ForConditionalGeneration
    generation: GenerationSettings
    layout: Layout
    reference: str
    revision: str | None
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table; every token id must be below."""
        return int(self.model.config.text_config.vocab_size)

    @property
    def max_source_positions(self) -> int:
        """Positions of the text encoder, shared by image and prompt."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def max_target_positions(self) -> int:
        """Positions of the decoder: the most tokens it can generate."""
        return int(self.model.config.text_config.max_position_embeddings)

    def image_seq_length(self, height: int, width: int) -> int:
        """Returns how many tokens the encoder gets for an image of this size.

        Args:
            height: Pixels.
            width: Pixels.

        Raises:
            ValueError: If the image is too large for the position embeddings, or too small.
        """
        vision = self.model.config.vision_config
        grid = [height, width]
        for kernel, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
            grid = [(cells + 2 * padding - kernel) // stride + 1 for cells in grid]
        if not 1 <= min(grid) <= max(grid) <= vision.max_position_embeddings:
            raise ValueError(
                f"images of {width}x{height} pixels give {grid[1]}x{grid[0]} cells; this model takes 1 to "
                f"{vision.max_position_embeddings} a side"
            )
        return grid[0] * grid[1] + 1  # the cells and their mean


def load_model(files: ModelFiles, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Loads a checkpoint.

    Args:
        files: Checkpoint found by ``locate_model``, with weights.
        dtype: ``float32``, ``float16``, ``bfloat16``, or ``auto`` for that of the stored weights.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for CUDA where there is any.

    Raises:
        ModelFilesError: If weights or configuration are damaged, incomplete or don't belong together.
        ValueError: If the device or data type can't be had.
    """
    if not files.weight_files:
        raise ModelFilesError(f"model {files.reference!r} was located without its weights")
    target = find_device(device)
    headers = {path: _read_header(path) for path in files.weight_files}
    wanted = _find_dtype(dtype, headers)
    generation = read_generation_settings(files)
    load = _load_native if files.layout is Layout.NATIVE else _load_original
    model = load(files, wanted, target)
    _check(files, model.config, generation)
    model.generation_config = GenerationConfig(**generation.to_transformers())
    loaded = LoadedModel(
        model=model.requires_grad_(False).eval(),
        generation=generation,
        layout=files.layout,
        reference=files.reference,
        revision=files.revision,
        fingerprint=fingerprint(files),
    )
    logger.info(
        "loaded %s (%s layout, revision %s, fingerprint %s) as %s on %s",
        files.reference,
        files.layout,
        files.revision or "unknown",
        loaded.fingerprint[:12],
        wanted,
        target,
    )
    return loaded


def find_device(name: str) -> torch.device:
    """Returns the device called `name`: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.

    Raises:
        ValueError: If there is no such device; only ``auto`` takes another instead.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device {name!r} is unknown; known are cpu, cuda, cuda:N and auto")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "no GPU is visible" if torch.version.cuda else "this PyTorch is built without CUDA"
            raise ValueError(f"device {name!r} was asked for, but {why}; use cpu, or auto to take what is there")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} was asked for, but only {torch.cuda.device_count()} GPUs are visible")
    return device


def read_generation_settings(files: ModelFiles) -> GenerationSettings:
    """Reads how a checkpoint wants to be decoded.

    transformers' layout says it in ``generation_config.json``. In the original layout Microsoft's
    ``generate`` hands over to the inner language model, which knows only ``text_config``; the root's
    ``generation_config.json`` says otherwise (no early stopping) but has no effect there.

    Raises:
        ModelFilesError: If a setting is missing or isn't one that can be followed.
    """
    text: dict[str, Any] = files.config.get("text_config") or {}
    if files.layout is Layout.NATIVE:
        chosen, source = read_json(files.folder / GENERATION_FILE), GENERATION_FILE
    else:
        microsoft_defaults = {"forced_eos_token_id": 2, "decoder_start_token_id": 2}
        chosen, source = microsoft_defaults | text, f"text_config in {CONFIG_FILE}"

    def setting(name: str, default: Any) -> Any:
        value = chosen.get(name)
        return default if value is None else value

    def optional_id(name: str, *places: Mapping[str, Any]) -> int | None:
        value = next((place[name] for place in places if place.get(name) is not None), None)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and not isinstance(value, int):
            raise ModelFilesError(f"{name} of {files.reference!r} is {value!r}; one token id is expected")
        return value

    def token_id(name: str) -> int:
        value = optional_id(name, chosen, text, files.config)
        if value is None:
            raise ModelFilesError(f"model {files.reference!r} says nowhere what {name} is")
        return value

    settings = GenerationSettings(
        decoder_start_token_id=token_id("decoder_start_token_id"),
        bos_token_id=token_id("bos_token_id"),
        eos_token_id=token_id("eos_token_id"),
        pad_token_id=token_id("pad_token_id"),
        forced_bos_token_id=optional_id("forced_bos_token_id", chosen),
        forced_eos_token_id=optional_id("forced_eos_token_id", chosen),
        no_repeat_ngram_size=int(setting("no_repeat_ngram_size", 0)),
        num_beams=int(setting("num_beams", 1)),
        length_penalty=float(setting("length_penalty", 1.0)),
        early_stopping=setting("early_stopping", False),
    )
    if settings.early_stopping not in (True, False, "never"):
        raise ModelFilesError(
            f"early_stopping of {files.reference!r} is {settings.early_stopping!r}; expected are true, false or never"
        )
    _log_settings(files, source, chosen, settings)
    return settings


def _log_settings(files: ModelFiles, source: str, chosen: Mapping[str, Any], settings: GenerationSettings) -> None:
    logger.info("generation settings of %s follow %s: %s", files.reference, source, settings)
    path = files.folder / GENERATION_FILE
    if files.layout is Layout.ORIGINAL and path.is_file():
        followed = settings.to_transformers()
        said = {name: value for name, value in read_json(path).items() if name in followed and value is not None}
        ignored = {name: value for name, value in said.items() if value != followed[name]}
        if ignored:
            logger.info("not followed from %s, as it has no effect in this layout: %s", GENERATION_FILE, ignored)
    unfollowed = {
        name: chosen[name] for name, neutral in _NOT_FOLLOWED.items() if chosen.get(name) not in (None, neutral)
    }
    if unfollowed:
        logger.warning("generation settings of %s that are not followed: %s", files.reference, unfollowed)


def fingerprint(files: ModelFiles) -> str:
    """Returns a hash of weights and configuration, the same wherever the files lie.

    Small files are hashed whole; of larger ones the headers, and the beginning, middle and end of
    every tensor, which costs a few megabytes of reading.

    Raises:
        ModelFilesError: If a weights file is damaged.
    """
    digest = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    for path in files.weight_files:
        size = path.stat().st_size
        digest.update(struct.pack("<Q", size))
        header = _read_header(path)
        with path.open("rb") as file:
            if size <= _WHOLE_HASH_BYTES:
                digest.update(file.read())
                continue
            data_start = 8 + struct.unpack("<Q", file.read(8))[0]
            file.seek(0)
            digest.update(file.read(data_start))
            for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
                begin, end = entry["data_offsets"]
                last = max(begin, end - _SAMPLE_BYTES)
                for offset in sorted({begin, (begin + last) // 2, last}):
                    file.seek(data_start + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
    return digest.hexdigest()


def native_config(config: Mapping[str, Any]) -> Florence2Config:
    """Translates Microsoft's configuration into transformers'.

    Microsoft's tokens have no image placeholder, and every row of the vocabulary may occur in a
    prompt. The image token's id is therefore set to the first one beyond the vocabulary: no prompt
    can hold it, and image features can only be handed over as embeddings.

    Args:
        config: Contents of ``config.json``.

    Raises:
        ModelFilesError: If a field is missing or describes another architecture.
    """
    vision, text = config["vision_config"], config.get("text_config") or {}
    try:
        vision_config = Florence2VisionConfig(
            embed_dim=vision["dim_embed"],
            max_position_embeddings=vision["image_pos_embed"]["max_pos_embeddings"],
            max_temporal_embeddings=vision["visual_temporal_embedding"]["max_temporal_embeddings"],
            **{name: vision[name] for name in _VISION_FIELDS},
        )
        architecture = {
            "image_pos_embed.type": (vision["image_pos_embed"]["type"], "learned_abs_2d"),
            "visual_temporal_embedding.type": (vision["visual_temporal_embedding"]["type"], "COSINE"),
            "image_feature_source": (vision["image_feature_source"], ["spatial_avg_pool", "temporal_avg_pool"]),
            # Microsoft's code skips the first stage's norm where this is true, transformers' doesn't.
            "patch_prenorm[0]": (vision["patch_prenorm"][0], False),
        }
        text_config = BartConfig(
            **(_TEXT_DEFAULTS | {name: text[name] for name in _TEXT_FIELDS if text.get(name) is not None})
        )
    except (KeyError, TypeError, IndexError, StrictDataclassError) as error:
        raise ModelFilesError(
            f"{CONFIG_FILE} does not describe a Florence-2 in Microsoft's layout: {type(error).__name__}: {error}"
        ) from error
    for name, (value, supported) in architecture.items():
        if value != supported:
            raise ModelFilesError(f"vision_config.{name} is {value!r}; only {supported!r} is supported")
    return Florence2Config(
        vision_config=vision_config, text_config=text_config, image_token_id=int(text_config.vocab_size)
    )


def native_key(key: str) -> str | None:
    """Returns the name in transformers' layout of a tensor in Microsoft's, or None if it isn't known."""
    for beginning, replacement in _KEY_BEGINNINGS.items():
        if key == beginning:
            return replacement
        if beginning.endswith(".") and key.startswith(beginning):
            name = replacement + key.removeprefix(beginning)
            return _native_vision_key(name) if beginning == "vision_tower." else name
    return None


def _native_vision_key(name: str) -> str:
    parts = _CONV_PARTS if ".convs." in name else _VISION_PARTS
    for part, replacement in parts.items():
        if f".{part}." in name:
            return name.replace(f".{part}.", f".{replacement}.")
    return name


def _load_native(files: ModelFiles, dtype: torch.dtype, device: torch.device) -> Florence2ForConditionalGeneration:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = Florence2ForConditionalGeneration.from_pretrained(
            files.folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, in our own words
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelFilesError(f"model {files.reference!r} can't be loaded: {error}") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    _refuse(
        files,
        missing=set(report["missing_keys"]) - {_TEMPORAL_EMBEDDING},
        unknown=set(report["unexpected_keys"]),
        misshapen={f"{name} {list(stored)}, expected {list(own)}" for name, stored, own in report["mismatched_keys"]},
    )
    head = model.lm_head.weight
    if any(model.get_parameter(name) is not head for name in _TIED_KEYS):
        raise ModelFilesError(f"model {files.reference!r} stores differing embeddings: {', '.join(_TIED_KEYS)}")
    return model.to(device)


def _load_original(files: ModelFiles, dtype: torch.dtype, device: torch.device) -> Florence2ForConditionalGeneration:
    config = native_config(files.config)
    config.dtype = dtype
    with torch.device("meta"):  # no memory yet: each parameter gets it as its tensor is read
        model = Florence2ForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, torch.Tensor] = {}
    unknown, misshapen = set(), set()
    for key, stored in _stored_tensors(files):
        if key == _LOGITS_BIAS:
            if stored.any():
                raise ModelFilesError(f"{key} of {files.reference!r} isn't zero; transformers' model has no such bias")
            continue
        name = native_key(key)
        if name is None or name not in expected:
            unknown.add(key)
            continue
        if not stored.is_floating_point():
            raise ModelFilesError(f"{key} of {files.reference!r} is stored as {stored.dtype}; floats are expected")
        tensor = stored.T if name == _IMAGE_PROJECTION and stored.ndim == 2 else stored
        if tensor.shape != expected[name]:
            misshapen.add(f"{key} {list(stored.shape)}, expected {list(_stored_shape(name, expected[name]))}")
            continue
        # A copy, as the stored tensor is a view of the mapped file.
        converted = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if name in _TIED_KEYS:
            first = next((state[tied] for tied in _TIED_KEYS if tied in state), converted)
            if not torch.equal(first, converted):
                raise ModelFilesError(f"model {files.reference!r} stores embeddings that differ in {key}")
            converted = first
        state[name] = converted
    tied = next((state[name] for name in _TIED_KEYS if name in state), None)
    if tied is not None:
        state.update(dict.fromkeys(_TIED_KEYS, tied))
    if _TEMPORAL_EMBEDDING not in state:
        state[_TEMPORAL_EMBEDDING] = _temporal_embedding(model).to(device, dtype)
    _refuse(files, missing=expected.keys() - state.keys(), unknown=unknown, misshapen=misshapen)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _stored_tensors(files: ModelFiles) -> Iterable[tuple[str, torch.Tensor]]:
    for path in files.weight_files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelFilesError(f"{path} can't be read: {error}") from error


def _stored_shape(name: str, shape: torch.Size) -> Iterable[int]:
    return reversed(shape) if name == _IMAGE_PROJECTION else shape


def _temporal_embedding(model: Florence2ForConditionalGeneration) -> torch.Tensor:
    module = model.model.multi_modal_projector.visual_temporal_embed
    return type(module)(model.config).pos_idx_to_embed


def _refuse(files: ModelFiles, *, missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str]) -> None:
    """Raises ModelFilesError if any of the sets holds anything."""
    faults = [
        f"{what}: {_listed(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise ModelFilesError(f"weights of {files.reference!r} don't fit its {CONFIG_FILE}; {'; '.join(faults)}")


def _listed(names: Iterable[str], limit: int = 10) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


def _check(files: ModelFiles, config: Florence2Config, generation: GenerationSettings) -> None:
    text, vision = config.text_config, config.vision_config
    if vision.projection_dim != text.d_model:
        raise ModelFilesError(
            f"{CONFIG_FILE} of {files.reference!r} projects images to {vision.projection_dim} dimensions, "
            f"but its text model has {text.d_model}"
        )
    for name, value in generation.to_transformers().items():
        if name.endswith("token_id") and value is not None and not 0 <= value < text.vocab_size:
            raise ModelFilesError(
                f"{name} of {files.reference!r} is {value!r}; its vocabulary has {text.vocab_size} entries"
            )
    if generation.num_beams < 1 or generation.no_repeat_ngram_size < 0:
        raise ModelFilesError(f"generation settings of {files.reference!r} make no sense: {generation}")


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what a safetensors file says of its tensors: dtype, shape and data_offsets of each."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError("it is cut short, or no safetensors file")
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ModelFilesError(f"{path} can't be read: {error}") from error
    header.pop("__metadata__", None)
    return header


def _find_dtype(name: str, headers: Mapping[Path, Mapping[str, Mapping[str, Any]]]) -> torch.dtype:
    if name == "auto":
        bytes_of: Counter[str] = Counter()
        for header in headers.values():
            for entry in header.values():
                begin, end = entry["data_offsets"]
                bytes_of[entry["dtype"]] += end - begin
        stored = bytes_of.most_common(1)[0][0] if bytes_of else "nothing"
        if stored not in _STORED_DTYPES:
            raise ValueError(f"dtype 'auto' needs weights in {', '.join(_DTYPES)}, not {stored}; name one of these")
        name = _STORED_DTYPES[stored]
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; known are {', '.join(_DTYPES)} and auto")
    return _DTYPES[name]
