"""The peer: a real tritonserver with an ensemble of what `generate` and a dynamic batcher make of Florence-2.

Its models, and what it stands on, are in ``loadtest/triton_baseline``. ``python -m florence2_loadtest.triton setup``
installs the server and its packages, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from florence2_kserve.local import LOOPBACK, free_port
from florence2_loadtest.results import Target
from florence2_loadtest.servers import environment

BASELINE = Path(__file__).resolve().parents[1] / "triton_baseline"
# pip takes the server's wheel apart without its dependencies: they are of a client and a web server that aren't used.
_PARTS = {"models": "models.txt", "server": "server.txt"}
_PYTHONS = ((3, 11), (3, 12))  # for which the locked packages have wheels, and the server a stub
_MODELS = ("florence2_process", "florence2_model")
_START_S = 300.0
_END_S = 45.0  # tritonserver waits for 30 s for what is in flight
_POLL_S = 0.2


def cache_folder() -> Path:
    """Returns where the server and its packages are installed."""
    cache = os.environ.get("FLORENCE2_CACHE") or Path.home() / ".cache" / "florence2-kserve"
    return Path(cache) / "triton"


def why_not(folder: Path | None = None) -> str | None:
    """Returns why Triton can't be started here; None if it can.

    Args:
        folder: Where it is installed; None for `cache_folder`.
    """
    if not BASELINE.is_dir():
        return "the baseline's models come with the source, not with the package: run this in a checkout"
    marker = (folder or cache_folder()) / ".installed"
    if not marker.exists():
        return "Triton isn't set up (7 GB): florence2 loadtest peers --setup"
    if marker.read_text() != _fingerprint():
        return "Triton was set up by other lock files: florence2 loadtest peers --setup"
    return None


def set_up(say: Callable[[str], None] = print, folder: Path | None = None) -> None:
    """Installs the server and its packages, if they aren't there as locked.

    Args:
        say: Gets lines of progress.
        folder: Where; None for `cache_folder`.

    Raises:
        RuntimeError: If that can't be done; says why.
    """
    folder = folder or cache_folder()
    reason = why_not(folder)
    if reason is None:
        say(f"{folder}: set up")
        return
    if not BASELINE.is_dir():
        raise RuntimeError(reason)
    if sys.version_info[:2] not in _PYTHONS:
        raise RuntimeError("Triton's packages are locked for Python 3.11 and 3.12; run this under one of them")
    for name in _PARTS:
        shutil.rmtree(folder / name, ignore_errors=True)
    say(f"{folder / 'models'}: torch 2.8, transformers 4.57 (minutes, 7 GB) …")
    _run([sys.executable, "-m", "venv", folder / "models"])
    pip = [folder / "models/bin/pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    _run([*pip, "--require-hashes", "--requirement", BASELINE / _PARTS["models"]])
    say(f"{folder / 'server'}: tritonserver …")
    _run(
        [
            *pip,
            "--require-hashes",
            "--no-deps",
            "--target",
            folder / "server",
            "--requirement",
            BASELINE / _PARTS["server"],
        ]
    )
    (folder / ".installed").write_text(_fingerprint())
    say(f"{folder}: set up")


class Triton:
    """tritonserver with the baseline's models, on free ports of the loopback address, as a context manager.

    Args:
        checkpoint: Folder in transformers' own layout.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        options: Further options of ``start.py``: ``max_batch_size``, …; without ``server`` and ``python`` it is what
            `set_up` installs.

    Attributes:
        target: Whom to ask, once it is entered.
        metrics_urls: Where its statistics are.
        startup_s: How long it took until the models were loaded.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        installed = {"server": cache_folder() / "server", "python": cache_folder() / "models/bin/python"}
        given = {**installed, **(options or {})}
        self._python = str(given.pop("python"))
        self._files = {"server": given.pop("server"), "python": self._python, "checkpoint": checkpoint}
        self._settings = {"device": device, "dtype": dtype, **given}
        self._port = free_port()
        self.target = Target(url=f"http://{LOOPBACK}:{self._port}", model=str(checkpoint), settings=self._settings)
        self.metrics_urls = [f"{self.target.url}/v2/models/{self.target.model_name}/stats"]
        self.startup_s = 0.0
        self._log = tempfile.NamedTemporaryFile(prefix="florence2-triton-", suffix=".log", delete=False)  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        given = {
            **self._files,
            **self._settings,
            "http_port": self._port,
            "grpc_port": free_port(),
        }
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        # start.py ends with its standard input, that is, with this process, and takes the server along.
        self._process = subprocess.Popen(
            [sys.executable, BASELINE / "start.py", "--end-with-input", *options],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment({}),
            start_new_session=True,
        )
        began = time.monotonic()
        try:
            while not self._is_ready():
                if self._process.poll() is not None:
                    raise RuntimeError(f"Triton ended while starting:\n{self.log_tail()}")
                if time.monotonic() - began > _START_S:
                    raise RuntimeError(f"Triton isn't ready after {_START_S:g} s:\n{self.log_tail()}")
                time.sleep(_POLL_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.startup_s = time.monotonic() - began
        self.target = self.target.model_copy(update={"note": self._about()})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._log.close()
        Path(self._log.name).unlink(missing_ok=True)

    def log_tail(self, lines: int = 30) -> str:
        """Returns the log's last lines, without the tables that Triton draws."""
        text = Path(self._log.name).read_text(errors="replace")
        return "\n".join([line for line in text.splitlines() if not re.match(r"[|+]", line)][-lines:])

    def batch_sizes(self) -> dict[str, dict[int, int]]:
        """Returns how often each model ran batches of each size since its start."""
        return {model: self._batch_sizes(model) for model in _MODELS}

    def _batch_sizes(self, model: str) -> dict[int, int]:
        (statistics,) = self._get(f"v2/models/{model}/stats").json()["model_stats"]
        return {int(batch["batch_size"]): int(batch["compute_infer"]["count"]) for batch in statistics["batch_stats"]}

    def _is_ready(self) -> bool:
        try:
            return self._get("v2/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def _get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.target.url}/{path}", timeout=10)

    def _about(self) -> str:
        version = self._get("v2").json()["version"]
        asked = "import torch, transformers as t; print(f'torch {torch.__version__}, transformers {t.__version__}')"
        told = subprocess.run([self._python, "-c", asked], capture_output=True, text=True, check=False).stdout.strip()
        return f"tritonserver {version}, {told}"


def _fingerprint() -> str:
    """Returns what tells one set of lock files, and Python, from another."""
    locks = b"".join((BASELINE / lock).read_bytes() for lock in _PARTS.values())
    return json.dumps({"locks": hashlib.sha256(locks).hexdigest(), "python": sys.version_info[:2]})


def _run(command: list[Any]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr[-2000:]}")


def main(arguments: list[str] | None = None) -> int:
    """Sets Triton up."""
    given = sys.argv[1:] if arguments is None else arguments
    if given != ["setup"]:
        print("usage: python -m florence2_loadtest.triton setup", file=sys.stderr)
        return 2
    try:
        set_up(lambda line: print(line, flush=True))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
