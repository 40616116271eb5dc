"""Drawn pictures, and ``florence2 batch`` asked about them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner

from florence2_kserve.cli import app
from florence2_kserve.tiny.scenes import draw_scene

CLI = (sys.executable, "-m", "florence2_kserve.cli")
QUICK = ("--num-beams", "1", "--max-new-tokens", "4")  # answers that cost little
PATIENCE_S = 240.0


def draw(folder: Path, count: int, first: int = 0) -> list[Path]:
    """Draws `count` different pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05}.png" for index in range(first, first + count)]
    for index, path in enumerate(paths, first):
        image = Image.fromarray(draw_scene(index, words=(0, 0)).image).resize((64, 64))
        image.putpixel((0, 0), (index // 65536, index // 256 % 256, index % 256))  # no two are alike
        image.save(path)
    return paths


@dataclass(frozen=True, slots=True)
class Ended:
    """What a run left behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Ended:
    """Runs ``florence2 batch`` to its end, in this process: a run costs a second less so."""
    result = CliRunner().invoke(app, ["batch", *map(str, arguments)], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Starts ``florence2 batch`` as a program of its own."""
    command = [*CLI, "batch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Waits until something holds, or a process has ended."""
    end = time.monotonic() + PATIENCE_S
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)


def whole_lines(path: Path) -> int:
    """Returns how many lines end with a newline."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns what the lines hold; each has to be whole."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def failures(output: Path) -> list[dict[str, Any]]:
    """Returns what stands in an output's file of failures."""
    path = output.with_name(f"{output.name}.failures.jsonl")
    return read_lines(path) if path.exists() else []


def names(records: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of the records' files, sorted."""
    return sorted(Path(record["address"]).name for record in records)
