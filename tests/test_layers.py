"""Who may import whom: the base does without torch, the engine without kserve."""

from __future__ import annotations

import subprocess
import sys

import pytest

BASE = [
    "answers",
    "check",
    "cli",
    "client",
    "demo",
    "engine.interface",
    "engine.metrics",
    "errors",
    "images",
    "local",
    "metrics",
    "model_files",
    "predictor_client",
    "processor",
    "protocol.internal",
    "protocol.public",
    "protocol.rest",
    "protocol.tensors",
    "protocol.wire",
    "settings",
    "tasks",
    "tiny.scenes",
    "transformer",
    "server",
]
ENGINE = [
    "benchmark",
    "benchmark.run",
    "engine.engine",
    "engine.interface",
    "tasks",
    "tiny.evaluate",
    "tiny.scenes",
    "tiny.train",
    "weights",
]
CLIENT = ["check", "client", "settings", "cli", "local"]


def loaded_after_importing(module: str) -> set[str]:
    code = f"import sys, florence2_kserve.{module}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", BASE)
def test_the_base_imports_neither_torch_nor_transformers(module):
    assert not loaded_after_importing(module) & {"torch", "transformers", "timm"}


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_imports_no_server(module):
    assert not loaded_after_importing(module) & {"kserve", "fastapi", "grpc", "uvicorn"}


@pytest.mark.parametrize("module", CLIENT)
def test_the_client_starts_without_the_sdk(module):
    assert not loaded_after_importing(module) & {"kserve", "pandas", "kubernetes"}
