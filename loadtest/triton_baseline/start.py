"""Starts tritonserver on the baseline's models, on the loopback address.

Needs nothing but Python's own library, so that it runs wherever the server's files are, and an interpreter with
torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS, CODE = HERE / "models", HERE / "code"
SERVER, LIBRARIES = "pytriton/tritonserver", "nvidia_pytriton.libs"
_LOOPBACK = "127.0.0.1"
_SHARED_MEMORY_BYTES = 64 << 20  # of each model when it starts; it grows
_ASKED = """
import json, sys, sysconfig
folder = sysconfig.get_config_var("LIBDIR")
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "home": sys.base_prefix,
    "folders": [folder, "%s/%s" % (folder, sysconfig.get_config_var("MULTIARCH") or "")],
    "packages": [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))],
}))
"""


@dataclass(frozen=True)
class Told:
    """What an interpreter says of itself.

    Attributes:
        version: ``3.11``.
        home: The installation it belongs to.
        folders: Where its shared library may be.
        packages: Folders of its packages.
    """

    version: str
    home: str
    folders: list[str]
    packages: list[str]


def describe_python(python: str) -> Told:
    """Asks the interpreter `python`."""
    return Told(
        **json.loads(subprocess.run([python, "-c", _ASKED], check=True, capture_output=True, text=True).stdout)
    )


def find_library(server: Path, told: Told) -> tuple[Path, Path]:
    """Returns the folder of the shared libpython that the stub embeds, and the installation it belongs to.

    Many interpreters come without one; then that in ``python/`` beside the server's files is taken.

    Raises:
        FileNotFoundError: If there is none either.
    """
    name = f"libpython{told.version}.so.1.0"
    for folder in map(Path, told.folders):
        if (folder / name).exists():
            return folder, Path(told.home)
    carried = server / "python"
    if (carried / "lib" / name).exists():
        return carried / "lib", carried
    raise FileNotFoundError(f"Triton's stub needs {name}; there is none in {', '.join(told.folders)} or {carried}/lib")


def write_repository(folder: Path, values: dict[str, Any]) -> Path:
    """Writes the model repository into `folder`, with `values` for the ``$names`` in its config.pbtxt files."""
    repository = folder / "models"
    for model in sorted(MODELS.iterdir()):
        version = repository / model.name / "1"
        version.mkdir(parents=True)
        config = Template((model / "config.pbtxt").read_text()).substitute(values)
        (version.parent / "config.pbtxt").write_text(config)
        if (model / "1/model.py").exists():  # an ensemble has none
            shutil.copy(model / "1/model.py", version)
    return repository


def write_backend(folder: Path, server: Path, version: str) -> Path:
    """Writes the folder of backends into `folder`, with the stub for one version of Python.

    Raises:
        FileNotFoundError: If the server has no stub for it.
    """
    python = folder / "backends/python"
    shutil.copytree(server / SERVER / "backends/python", python)
    stub = Path(shutil.copy(server / SERVER / "python_backend_stubs" / version / "triton_python_backend_stub", python))
    stub.chmod(0o755)  # wheels keep no execute bits
    return python.parent


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", type=Path, required=True, help="Folder into which nvidia-pytriton is unpacked")
    parser.add_argument("--python", default=sys.executable, help="Interpreter whose packages the models use")
    parser.add_argument("--packages", type=Path, help="Folder of packages that come before the interpreter's own")
    parser.add_argument("--checkpoint", type=Path, required=True, help="Folder in transformers' own layout")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="torch's, of the model; 0 leaves it to torch")
    parser.add_argument("--max-batch-size", type=int, default=36)
    parser.add_argument("--process-instances", type=int, default=4)
    parser.add_argument("--process-delay-us", type=int, default=0, help="How long a batch waits for more requests")
    parser.add_argument("--model-delay-us", type=int, default=0, help="Likewise")
    parser.add_argument("--end-with-input", action="store_true", help="End when standard input does")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs the server until it ends or a signal comes; returns its exit code."""
    given = parse()
    server = given.server.resolve()
    told = describe_python(given.python)
    library, home = find_library(server, told)
    packages = [*([given.packages.resolve()] if given.packages else []), *told.packages]
    binary = server / SERVER / "bin/tritonserver"
    binary.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="florence2-triton-") as name:
        folder = Path(name)
        values = {**vars(given), "checkpoint": given.checkpoint.resolve()}
        command = [
            binary,
            f"--model-repository={write_repository(folder, values)}",
            f"--backend-directory={write_backend(folder, server, told.version)}",
            f"--backend-config=python,shm-default-byte-size={_SHARED_MEMORY_BYTES}",
            "--disable-auto-complete-config",
            "--allow-metrics=false",
            f"--http-address={_LOOPBACK}",
            f"--http-port={given.http_port}",
            f"--grpc-address={_LOOPBACK}",
            f"--grpc-port={given.grpc_port}",
        ]
        libraries = [server / LIBRARIES, library, os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": _joined(libraries),
            # The embedded interpreter heeds neither PYTHONHOME nor PYTHONPATH: it finds its own library from the
            # first python3 on the PATH, and model.py adds the packages.
            "PATH": _joined([home / "bin", os.environ.get("PATH", "")]),
            "FLORENCE2_TRITON_PATH": _joined([CODE, *packages]),
        }
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: process.terminate())
        if given.end_with_input:
            threading.Thread(target=_end_with_input, args=[process], daemon=True).start()
        return process.wait()


def _end_with_input(process: subprocess.Popen[bytes]) -> None:
    sys.stdin.read()  # at its end whoever started this has ended, killed or not
    process.terminate()


def _joined(paths: list[Any]) -> str:
    return os.pathsep.join(str(path) for path in paths if path)


if __name__ == "__main__":
    sys.exit(main())
