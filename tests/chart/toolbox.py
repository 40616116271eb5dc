"""The chart's tools and schemas: built once into the cache, out of Go modules alone.

``python -m tests.chart.toolbox`` builds them: minutes the first time, nothing when they are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.chart import schemas

HERE = Path(__file__).parent
MODULE = HERE / "tools"
GO = HERE.parent / "tools" / "go"

FOLDER = Path(os.environ.get("FLORENCE2_CACHE") or Path.home() / ".cache" / "florence2-kserve") / "tools"
BIN = FOLDER / "bin"
SCHEMAS = FOLDER / "chart-schemas"
_KEY = FOLDER / "chart-tools.key"

HELM_VERSION = "v3.22.0"  # of go.mod; helm tells its own
KUBERNETES_MINOR = "34"  # the one that helm renders for where no cluster is asked


def is_built() -> bool:
    """Whether tools and schemas are there, and made of what is pinned here."""
    return _KEY.is_file() and _KEY.read_text() == _key()


def build() -> None:
    """Builds what is missing.

    Raises:
        subprocess.CalledProcessError: If Go fails.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "chart-tools.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two checkouts may share the cache
        if is_built():
            return
        _KEY.unlink(missing_ok=True)
        began = time.monotonic()
        print(
            "building helm, helm-unittest, helm-docs, kubeconform and kustomize (minutes the first time)", flush=True
        )
        helm = "helm.sh/helm/v3"
        flags = ["-s", "-w", "-X", f"{helm}/internal/version.version={HELM_VERSION}"]
        for package in ("chartutil", "lint/rules"):
            flags += ["-X", f"{helm}/pkg/{package}.k8sVersionMajor=1"]
            flags += ["-X", f"{helm}/pkg/{package}.k8sVersionMinor={KUBERNETES_MINOR}"]
        subprocess.run(
            [GO, "build", "-trimpath", "-buildvcs=false", "-ldflags", " ".join(flags), "-o", f"{BIN}{os.sep}", "tool"],
            cwd=MODULE,
            env={**os.environ, "CGO_ENABLED": "0"},
            check=True,
        )
        print("making schemas of what the chart renders", flush=True)
        shutil.rmtree(SCHEMAS, ignore_errors=True)
        schemas.write_schemas(SCHEMAS)
        _KEY.write_text(_key())
        print(f"done in {time.monotonic() - began:.0f} s")


def run(tool: str, *arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a tool in the chart's folder; a failure is the caller's to judge.

    Args:
        tool: Its name.
        arguments: Its arguments.
        stdin: What it reads.
    """
    # No cluster, nor settings of the user's.
    environment = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(FOLDER), "KUBECONFIG": os.devnull}
    return subprocess.run(
        [BIN / tool, *arguments], cwd=schemas.CHART, env=environment, input=stdin, capture_output=True, text=True
    )


def _key() -> str:
    parts = [MODULE / "go.mod", MODULE / "go.sum", schemas.MODULES / "go.mod", Path(schemas.__file__), Path(__file__)]
    return hashlib.sha256(b"\0".join(part.read_bytes() for part in parts)).hexdigest()


if __name__ == "__main__":
    build()
    sys.exit(0)
