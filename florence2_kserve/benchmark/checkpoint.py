"""Writes a checkpoint of seeded random weights at a real size, to time a whole service without a download.

Its tokenizer is the embedded model's, spread over the ids of the public checkpoints: as large a table, and as many
location tokens, with words that are seldom words.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from florence2_kserve.benchmark.settings import DtypeName, ProfileName, SizeName

_BART_WORDS = 50264  # ids below BART's last, which is <mask>


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a checkpoint as the command line says.

    Args:
        argv: Arguments; None takes the process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="florence2 benchmark make-checkpoint",
        description="Write a checkpoint of seeded random weights; its answers mean nothing, its speed is real.",
    )
    parser.add_argument("folder", type=Path, help="where it goes")
    parser.add_argument("--size", choices=get_args(SizeName), default="base")
    parser.add_argument("--profile", choices=get_args(ProfileName), default="vision-bound")
    parser.add_argument("--dtype", choices=get_args(DtypeName), default="float32", help="stored data type")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    write_checkpoint(given.folder, size=given.size, profile=given.profile, dtype=given.dtype, seed=given.seed)
    print(given.folder)
    return 0


def write_checkpoint(folder: Path, *, size: SizeName, profile: ProfileName, dtype: DtypeName, seed: int) -> None:
    """Writes a whole checkpoint folder in transformers' native layout.

    Args:
        folder: Where it goes; made if need be.
        size: See `find_shape`.
        profile: See `find_shape`; ``vision-bound`` is the model as it is.
        dtype: Data type of the stored weights.
        seed: Seed of the weights.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from florence2_kserve.benchmark.models import ModelShape, build_model, find_shape
    from florence2_kserve.model_files import locate_model

    transformers_logging.set_verbosity_error()
    logging.getLogger("florence2_kserve").setLevel(logging.WARNING)
    shape: ModelShape = find_shape(size, profile)
    loaded = build_model(shape, seed=seed, dtype=getattr(torch, dtype), device=torch.device("cpu"))
    embedded = locate_model(with_weights=False).folder
    tokenizer = _read(embedded / "tokenizer.json")
    if shape.vocab_size > _BART_WORDS:
        tokenizer = _spread(tokenizer)
    # transformers' processor puts this token where the image goes.
    loaded.model.config.image_token_id = next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == "<image>")
    loaded.model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # a service under another user reads them
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", _read(embedded / "tokenizer_config.json"))
    processor = _read(embedded / "processor_config.json")
    side = {"height": shape.image_size, "width": shape.image_size}
    processor["image_processor"] |= {"size": side, "crop_size": side, "image_seq_length": shape.image_tokens}
    _write(folder / "processor_config.json", processor)


def _spread(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer with the public checkpoints' ids: words up to BART's, then Florence-2's own tokens."""
    words: dict[str, int] = tokenizer["model"]["vocab"]
    # Real words and all their bytes keep their ids; what fills the rest is never made out of a text.
    filled = words | {f"Ġ{id_}": id_ for id_ in range(len(words), _BART_WORDS)}
    added = [token for token in tokenizer["added_tokens"] if token["id"] >= len(words)]
    kept = [token for token in tokenizer["added_tokens"] if token["id"] < len(words)]
    renumbered = [token | {"id": _BART_WORDS + place} for place, token in enumerate(added)]
    return tokenizer | {
        "model": tokenizer["model"] | {"vocab": filled},
        "added_tokens": kept + renumbered,
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n")
