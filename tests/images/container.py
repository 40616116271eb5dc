"""Runs an image as a restricted pod would: its own uid, nothing but /tmp and /cache writable, no capabilities."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_WAIT_S = 0.1


def why_not() -> str | None:
    """Returns why containers can't be run here, if so."""
    if os.geteuid() != 0:
        return "running images takes root"
    missing = [program for program in ("buildah", "runc") if shutil.which(program) is None]
    return f"running images takes {' and '.join(missing)}" if missing else None


def config(image: str) -> dict[str, Any]:
    """Returns the image's whole OCI configuration: config, history, rootfs."""
    return dict(json.loads(_output("buildah", "inspect", "--type", "image", image))["OCIv1"])


@contextmanager
def files(image: str) -> Iterator[Path]:
    """Mounts an image and gives the folder."""
    container = _output("buildah", "from", image)
    try:
        yield Path(_output("buildah", "mount", container))
    finally:
        _output("buildah", "rm", container)


def run(image: str, *command: str, entrypoint: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a command in a container and returns what it wrote and its exit code.

    Args:
        image: The image.
        *command: What follows the entry point, or takes its place.
        entrypoint: Whether the image's entry point is kept.
        timeout: Seconds until it is ended.
    """
    with Container(image, *command, entrypoint=entrypoint) as container:
        code = container.wait(timeout)
        return subprocess.CompletedProcess(command, code, container.output(), "")


@dataclass
class Usage:
    """What a running container has used so far."""

    cpu_s: float
    wall_s: float


class Container:
    """A container on the machine's own network, as a context manager that ends it.

    Args:
        image: The image.
        *command: What follows the entry point, or takes its place.
        entrypoint: Whether the image's entry point is kept.
    """

    def __init__(self, image: str, *command: str, entrypoint: bool = True) -> None:
        self._image, self._command, self._entrypoint = image, command, entrypoint
        self._name = f"florence2-test-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="florence2-container-"))
        self._files = files(self._image)
        root = self._files.__enter__()
        (self._folder / "config.json").write_text(json.dumps(self._specification(root)))
        self._log = (self._folder / "log").open("w+")
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            ["runc", "run", "--bundle", str(self._folder), self._name],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["runc", "kill", self._name, "KILL"], capture_output=True)
        self._process.wait()
        subprocess.run(["runc", "delete", "--force", self._name], capture_output=True)
        self._log.close()
        self._files.__exit__(None, None, None)
        shutil.rmtree(self._folder)

    def wait(self, timeout: float) -> int:
        """Waits for the end and returns the exit code."""
        return self._process.wait(timeout)

    def is_running(self) -> bool:
        """Returns whether it still runs."""
        return self._process.poll() is None

    def output(self) -> str:
        """Returns what it has written so far."""
        return (self._folder / "log").read_text(errors="replace")

    def pid(self) -> int:
        """Returns the process id, as the machine sees it, of the container's first process."""
        end = time.monotonic() + 30
        while True:
            state = subprocess.run(["runc", "state", self._name], capture_output=True, text=True)
            if state.returncode == 0 and (pid := json.loads(state.stdout)["pid"]):
                return int(pid)
            if time.monotonic() > end or not self.is_running():
                raise RuntimeError(f"the container doesn't run:\n{self.output()}")
            time.sleep(_WAIT_S)

    def usage(self) -> Usage:
        """Returns processor and wall-clock seconds since the start."""
        fields = Path(f"/proc/{self.pid()}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return Usage(ticks / os.sysconf("SC_CLK_TCK"), time.monotonic() - self._began)

    def _specification(self, root: Path) -> dict[str, Any]:
        settings = config(self._image)["config"]
        uid, _, gid = settings["User"].partition(":")
        command: Sequence[str] = self._command or settings["Cmd"]
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777"]},
            {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
            {"destination": "/cache", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
        ]
        return {
            "ociVersion": "1.0.2",
            "hostname": "florence2",
            "root": {"path": str(root), "readonly": True},
            "process": {
                "user": {"uid": int(uid), "gid": int(gid)},
                "args": [*(settings["Entrypoint"] if self._entrypoint else []), *command],
                "env": settings["Env"],
                "cwd": "/",
                "noNewPrivileges": True,
                "capabilities": {},
            },
            "mounts": mounts,
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
        }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
