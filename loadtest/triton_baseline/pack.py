"""Packs what another machine needs to run the baseline into one archive: the server, the models and a Python.

The machine brings packages for an interpreter of the same version, torch and transformers among them. Triton's stub
embeds Python by its shared library, which many machines lack, so that a whole installation goes along.

    python pack.py --server FOLDER --python python3.12 --output triton.tar.xz
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from start import HERE, LIBRARIES, SERVER, describe_python

# Of the standard library, what no server of models imports.
_LEFT_OUT = shutil.ignore_patterns(
    *("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data", "site-packages"),
    *("__pycache__", "config-*", "_test*", "_tkinter*"),
)


def needed_libraries(server: Path) -> list[Path]:
    """Returns the wheel's libraries that server and backend load."""
    programs = [server / SERVER / "bin/tritonserver", server / SERVER / "backends/python/libtriton_python.so"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(server / LIBRARIES)}
    names: set[str] = set()
    for program in programs:
        told = subprocess.run(["ldd", program], check=True, capture_output=True, text=True, env=environment).stdout
        names.update(Path(path).name for path in re.findall(rf"=> (\S*{LIBRARIES}\S*)", told))
    return [server / LIBRARIES / name for name in sorted(names)]


def copy_python(home: Path, version: str, folder: Path) -> None:
    """Copies an installation of Python to `folder`, without tests and symbols for debuggers."""
    shutil.copytree(home / f"lib/python{version}", folder / f"lib/python{version}", ignore=_LEFT_OUT)
    library = f"lib/libpython{version}.so.1.0"
    shutil.copy(home / library, folder / library)
    for shared in [folder / library, *folder.rglob("*.so")]:
        subprocess.run(["strip", "--strip-unneeded", shared], check=True)
    # An interpreter looks for a program of this name on the PATH, and for its library from there.
    (folder / "bin").mkdir()
    shutil.copy(home / f"bin/python{version}", folder / "bin/python3")


def main() -> None:
    """Writes the archive."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", type=Path, required=True, help="Folder into which nvidia-pytriton is unpacked")
    parser.add_argument("--python", required=True, help="Interpreter with a shared libpython, of the version to serve")
    parser.add_argument("--packages", type=Path, help="Folder of packages to take along, such as numpy 1")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    told = describe_python(given.python)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "triton")
        server = root / "server"
        for part in ("backends/python", f"python_backend_stubs/{told.version}"):
            shutil.copytree(given.server / SERVER / part, server / SERVER / part)
        for file in [given.server / SERVER / "bin/tritonserver", *needed_libraries(given.server)]:
            (server / file.relative_to(given.server)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, server / file.relative_to(given.server))
        copy_python(Path(told.home), told.version, server / "python")
        if given.packages:
            shutil.copytree(given.packages, root / "packages", ignore=_LEFT_OUT)
        for part in ("models", "code"):
            shutil.copytree(HERE / part, root / part, ignore=_LEFT_OUT)
        shutil.copy(HERE / "start.py", root)
        with tarfile.open(given.output, "w:xz") as archive:
            archive.add(root, "triton")
    print(f"{given.output}: {given.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
