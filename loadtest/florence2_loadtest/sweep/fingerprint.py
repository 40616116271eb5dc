"""What a sweep's trials depend on: those of another one mustn't be mixed with its own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import florence2_kserve
from florence2_kserve import __version__
from florence2_loadtest.masking import VARIABLE, hashed
from florence2_loadtest.results import describe_host
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.servers import Half
from florence2_loadtest.sweep.space import Space

# Servers inherit them, and are faster or slower, or answer otherwise, by them.
_MATTERING = re.compile(
    r"(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS|ONEDNN|DNNL|ATEN|CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|HIP|ROCR|HSA|MALLOC|PYTHON)_"
    r"|TORCH|PYTORCH|TRITON|MALLOC|PYTHONMALLOC|LD_PRELOAD|TOKENIZERS_PARALLELISM"
)
_PATIENCE_S = 20


def fingerprint(
    space: Space, scenario: Scenario, target: Half, fixed: Mapping[str, Any], **further: Any
) -> dict[str, Any]:
    """Returns what trials depend on, secrets as hashes.

    What they are judged by isn't part of it, nor is the budget: both may change when a sweep goes on.
    """
    return {
        "target": target,
        "space": space.as_lists(),
        "settings": hashed(fixed),
        "scenario": scenario.model_dump(mode="json"),
        "version": __version__,
        "code": _code(),
        "host": describe_host(),
        "accelerators": _accelerators(),
        "variables": _variables(),
        "model_files": describe_folder(fixed.get("model")),
        "pictures": describe_folder(scenario.pictures.folder),
        **further,
    }


def describe_folder(folder: Any) -> str | None:
    """Returns a digest of a folder's file names, sizes and times of change; None where there is no such folder."""
    if not folder or not Path(str(folder)).is_dir():
        return None
    digest, count = hashlib.sha256(), 0
    for path in sorted(path for path in Path(str(folder)).rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        count += 1
    return f"{count} files, {digest.hexdigest()[:16]}"


def _variables() -> dict[str, str]:
    named = {name: value for name, value in sorted(os.environ.items()) if _MATTERING.match(name)}
    return {name.removeprefix(VARIABLE): value for name, value in hashed(_prefixed(named)).items()}


def _prefixed(variables: Mapping[str, str]) -> dict[str, str]:
    return {f"{VARIABLE}{name}": value for name, value in variables.items()}


def _code() -> str | None:
    """Returns the package's revision, whatever else changed in its checkout; None where it is in none."""
    return _answer("git", "-C", str(Path(florence2_kserve.__file__).parent), "rev-parse", "--verify", "HEAD:./")


def _accelerators() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    lines = (_answer("nvidia-smi", "-L") or "").splitlines()
    return [re.sub(r" \(UUID:.*", "", line).strip() for line in lines]


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
