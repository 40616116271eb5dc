"""For the Dockerfile: installs a lock file into the image's environment and leaves there what runs.

Installs with hashes checked, by the pip that the base image's Python brings along. Then removes tests and the tools
that installing took, and compiles the new modules, since nothing can be written beside them at run time.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ENVIRONMENT = Path("/opt/florence2")
PYTHON = ENVIRONMENT / "bin" / "python"
SITE_PACKAGES = ENVIRONMENT / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
# Imported seldom or never; the Kubernetes client's 1,900 generated modules alone are 49 MB of bytecode.
LEFT_AS_SOURCE = re.compile(r"/kubernetes/(aio/)?client/(models|api)/(?!__init__)|/(idlelib|lib2to3|turtledemo|test)/")


def install(lock: Path, *, keep_setuptools: bool) -> None:
    """Installs `lock` by a pip that lives for that long. setuptools goes; packages list it for their own set-up."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", ENVIRONMENT], check=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/pip", "--python", PYTHON, "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
        locked = ["--require-hashes", "--no-deps", "--no-compile", "--root-user-action=ignore", "--requirement", lock]
        subprocess.run([*pip, "install", *locked], check=True)
        if not keep_setuptools:
            subprocess.run([*pip, "uninstall", "--yes", "--root-user-action=ignore", "setuptools"], check=True)


def remove_tests() -> None:
    """Removes the packages' own tests: folders called test or tests, never a module of another name."""
    for folder, names, _ in os.walk(SITE_PACKAGES):
        for name in {"test", "tests"}.intersection(names):
            shutil.rmtree(Path(folder, name))
            names.remove(name)


def remove_installers() -> None:
    """Removes the pip and setuptools of the base image, and the copies that ``venv`` would install."""
    standard_library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    for name in ("pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack", "distutils-precedence"):
        for path in [*packages.glob(f"{name}*"), *Path(sysconfig.get_path("scripts")).glob(f"{name}*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (standard_library / "ensurepip", Path("/usr/share/python-wheels")):
        shutil.rmtree(path, ignore_errors=True)


def compile_module(path: Path) -> None:
    """Writes one module's bytecode; unchecked, so that Python takes it without a look at the source's date."""
    compileall.compile_file(path, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def compile_modules(folder: Path) -> None:
    """Compiles what has no bytecode yet: what the base or a lower layer has compiled would take its place twice."""
    modules = [
        path
        for path in folder.rglob("*.py")
        if not LEFT_AS_SOURCE.search(str(path)) and not Path(importlib.util.cache_from_source(path)).exists()
    ]
    with ProcessPoolExecutor() as pool:
        list(pool.map(compile_module, modules, chunksize=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--keep", choices=["setuptools", "pip"], action="append", default=[])
    options = parser.parse_args()

    install(options.lock, keep_setuptools="setuptools" in options.keep)
    remove_tests()
    if "pip" not in options.keep:
        remove_installers()
    for folder in (Path(sysconfig.get_path("stdlib")), SITE_PACKAGES):
        compile_modules(folder)


if __name__ == "__main__":
    main()
