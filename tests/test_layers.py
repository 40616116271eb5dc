"""Who may import whom: the base does without torch, the engine without kserve."""

from __future__ import annotations

import json
import subprocess
import sys

BASE = [
    "answers",
    "batch.command",
    "batch.ledger",
    "batch.run",
    "batch.sources",
    "check",
    "cli",
    "client",
    "cpus",
    "demo",
    "doctor",
    "engine.interface",
    "engine.metrics",
    "errors",
    "images",
    "infer",
    "local",
    "metrics",
    "model_files",
    "options",
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
    "benchmark.transformer",
    "engine.engine",
    "engine.interface",
    "tasks",
    "tiny.evaluate",
    "tiny.scenes",
    "tiny.train",
    "weights",
]
CLIENT = (
    "check client settings cli local batch.command batch.ledger batch.run batch.sources doctor infer options".split()
)


def intruders(modules: list[str], *forbidden: str) -> dict[str, list[str]]:
    """Imports the modules one after the other in a new process; returns what of `forbidden` each was first to load."""
    code = f"""
import importlib, json, sys
found = {{}}
for module in {modules!r}:
    before = set(sys.modules)
    importlib.import_module("florence2_kserve." + module)
    if new := sorted((set(sys.modules) - before) & {set(forbidden)!r}):
        found[module] = new
print(json.dumps(found))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_the_base_imports_neither_torch_nor_transformers():
    assert not intruders(BASE, "torch", "transformers", "timm")


def test_the_engine_imports_no_server():
    assert not intruders(ENGINE, "kserve", "fastapi", "grpc", "uvicorn")


def test_the_client_starts_without_the_sdk():
    assert not intruders(CLIENT, "kserve", "pandas", "kubernetes")


def test_an_intruder_is_named():
    assert intruders(["tasks", "server"], "kserve") == {"server": ["kserve"]}
