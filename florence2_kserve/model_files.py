"""Finds a checkpoint's files: the embedded model, a local folder or a hub repository.

Weights are read from safetensors only. A pickled ``pytorch_model.bin`` can run any code as it is
opened, so it is neither downloaded nor opened; nor is Python code that lies beside a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
OLD_TOKENIZER_FILES = ("vocab.json", "merges.txt")  # what older folders have in its place
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
# transformers 5 keeps image settings in the first, older versions and Microsoft's folders in the second.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

_SMALL_FILES = [
    CONFIG_FILE,
    GENERATION_FILE,
    *PROCESSOR_FILES,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    *OLD_TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
]
_WEIGHT_PATTERNS = ["model*.safetensors", WEIGHTS_INDEX_FILE]
_PICKLED_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_SAFE_REPOSITORIES = (
    "florence-community/Florence-2-base, florence-community/Florence-2-base-ft, florence-community/Florence-2-large, "
    "florence-community/Florence-2-large-ft or mrhendrey/Florence-2-large-ft-safetensors"
)
_EMBEDDED_FOLDER = Path(__file__).parent / "tiny" / "checkpoint"
# KServe sets it to "async" where a model comes as an image (oci://): another container of the pod then links the
# folder to its own files, which may take until after this one has started.
_INIT_MODE_VARIABLE = "MODEL_INIT_MODE"
_AWAIT_S = 60.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelFilesError(ValueError):
    """A checkpoint can't be found, isn't complete, or isn't one that may or can be loaded."""


class Layout(StrEnum):
    """How a checkpoint's folder is laid out."""

    NATIVE = "native"  # transformers' own Florence-2
    ORIGINAL = "original"  # Microsoft's, made for the Python code that lies beside it


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A checkpoint's folder, looked over.

    Attributes:
        reference: What was asked for.
        folder: Where the files are.
        layout: How the folder is laid out.
        revision: Commit of the hub repository; None where the folder doesn't tell.
        config: Contents of ``config.json``.
        weight_files: Safetensors files, in the order of their names; empty where none were asked for.
    """

    reference: str
    folder: Path
    layout: Layout
    revision: str | None
    config: dict[str, Any]
    weight_files: tuple[Path, ...] = ()


def locate_model(reference: str = EMBEDDED, *, revision: str | None = None, with_weights: bool = True) -> ModelFiles:
    """Finds a checkpoint, downloading it if need be, and checks that its files are there.

    Args:
        reference: ``embedded``, a folder such as ``/mnt/models``, or a hub id such as
            ``florence-community/Florence-2-base``.
        revision: Branch, tag or commit of a hub id.
        with_weights: Whether weights are needed; without them only the few small files are downloaded.

    Raises:
        ModelFilesError: If there is no such checkpoint, it can't be had, files are missing, or its
            weights are pickled.
    """
    if not reference.strip():
        raise ModelFilesError(f'no model is named; give "{EMBEDDED}", a folder or a hub id')
    if reference == EMBEDDED:
        is_hub_id, folder = False, _EMBEDDED_FOLDER
        if not folder.is_dir():
            raise ModelFilesError("the embedded model is not part of this installation; name another model")
    else:
        folder = Path(reference).expanduser()
        if os.environ.get(_INIT_MODE_VARIABLE) == "async" and folder.is_absolute():
            _await(folder / CONFIG_FILE)
        is_hub_id = not folder.exists() and _HUB_ID.fullmatch(reference) is not None
    if revision is not None and not is_hub_id:
        raise ModelFilesError(f"revision {revision!r} was given, but only hub ids have revisions, not {reference!r}")
    if is_hub_id:
        folder = _download(reference, revision, with_weights)
    elif not folder.is_dir():
        what = "is a file; give the folder it is in" if folder.exists() else "is neither a folder here nor a hub id"
        raise ModelFilesError(f"model {reference!r} {what}")

    config = _read_config(reference, folder)
    layout = _layout(reference, config)
    weight_files = _weight_files(reference, folder) if with_weights else ()
    required = [CONFIG_FILE]
    # Only Microsoft's layout can do with these: its added tokens are not in them, but known.
    if layout is Layout.NATIVE or not all((folder / name).is_file() for name in OLD_TOKENIZER_FILES):
        required.append(TOKENIZER_FILE)
    # Without it num_beams and the like would silently be transformers' defaults.
    if with_weights and layout is Layout.NATIVE:
        required.append(GENERATION_FILE)
    missing = [name for name in required if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        missing.append(" or ".join(PROCESSOR_FILES))
    if missing:
        raise ModelFilesError(f"model {reference!r} lacks {', '.join(missing)}; {_found(folder)}")
    return ModelFiles(
        reference=reference,
        folder=folder,
        layout=layout,
        revision=_snapshot_commit(folder),
        config=config,
        weight_files=weight_files,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file at `path`.

    Raises:
        ModelFilesError: If it can't be read or isn't a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} holds no JSON object")
    return content


def _await(path: Path) -> None:
    end = time.monotonic() + _AWAIT_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)


def embedded_revision(files: ModelFiles) -> str:
    """Returns what tells the embedded checkpoint from those of other versions: a hash of its weights."""
    with open(files.folder / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _download(reference: str, revision: str | None, with_weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    wanted = f"model {reference!r}" + (f" at revision {revision!r}" if revision else "")
    otherwise = "or mount a folder with its files and name that folder instead"
    patterns = [*_SMALL_FILES, *(_WEIGHT_PATTERNS if with_weights else [])]
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ModelFilesError(
            f"{wanted} is gated: accept its terms on the hub and set HF_TOKEN to a token of that account, {otherwise}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelFilesError(
            f"{wanted} is neither a folder here nor on the hub, or it is private: check its spelling, "
            f"set HF_TOKEN if it is private, {otherwise}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelFilesError(f"{wanted} is not on the hub, though the repository is: check the revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelFilesError(
            f"{wanted} is not, or not completely, in the local cache, and the hub can't be reached: unset "
            f"HF_HUB_OFFLINE if it is set, check the network (HF_ENDPOINT, proxies), {otherwise} ({error})"
        ) from error
    except Exception as error:  # whatever HTTP library the installed hub client uses, with errors of its own
        raise ModelFilesError(
            f"{wanted} can't be downloaded: check the network (HF_ENDPOINT, proxies) and HF_TOKEN, {otherwise} "
            f"({type(error).__name__}: {error})"
        ) from error


def _read_config(reference: str, folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"; did you mean its sub-folder {' or '.join(inner)}?" if inner else ""
        raise ModelFilesError(f"model {reference!r} lacks {CONFIG_FILE}; {_found(folder)}{hint}")
    return read_json(path)


def _layout(reference: str, config: dict[str, Any]) -> Layout:
    vision = config.get("vision_config")
    if config.get("model_type") == "florence2" and isinstance(vision, dict):
        # Conversions to the native layout carry the original's fields along, so the native ones decide.
        if vision.get("model_type") == "florence_vision" or "embed_dim" in vision:
            return Layout.NATIVE
        # Fine-tunes of the original may lose their vision_config's model_type.
        if vision.get("model_type") == "davit" or "dim_embed" in vision:
            return Layout.ORIGINAL
    raise ModelFilesError(
        f"model {reference!r} is no Florence-2: its {CONFIG_FILE} has model_type {config.get('model_type')!r} and "
        f"vision_config.model_type {vision.get('model_type') if isinstance(vision, dict) else None!r}; expected are "
        "florence2 with florence_vision (transformers' layout) or davit (Microsoft's)"
    )


def _weight_files(reference: str, folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS_FILE).is_file():
        return (folder / WEIGHTS_FILE,)
    if (folder / WEIGHTS_INDEX_FILE).is_file():
        weight_map = read_json(folder / WEIGHTS_INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFilesError(f"{folder / WEIGHTS_INDEX_FILE} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelFilesError(f"{WEIGHTS_INDEX_FILE} of {reference!r} names files elsewhere: {', '.join(outside)}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelFilesError(
                f"model {reference!r} lacks {', '.join(missing)}, which its {WEIGHTS_INDEX_FILE} names; "
                f"{_found(folder)}"
            )
        return tuple(folder / name for name in names)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise ModelFilesError(
            f"model {reference!r} has its weights only in pickled form ({', '.join(pickled)}), which can run any code "
            f"as it is opened and is refused; use a checkpoint with {WEIGHTS_FILE} such as {_SAFE_REPOSITORIES}"
        )
    raise ModelFilesError(
        f"model {reference!r} lacks {WEIGHTS_FILE} (or {WEIGHTS_INDEX_FILE} with its parts); {_found(folder)}. "
        f"Pickled weights (pytorch_model.bin) are never loaded; checkpoints with {WEIGHTS_FILE} are "
        f"{_SAFE_REPOSITORIES}"
    )


def _found(folder: Path, limit: int = 20) -> str:
    """Says what `folder` holds, for errors about what it doesn't."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    shown = ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return f"{folder} holds {shown or 'nothing'}"


def _snapshot_commit(folder: Path) -> str | None:
    """Returns the commit that a folder of the hub's cache is named after."""
    folder = folder.absolute()
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None
