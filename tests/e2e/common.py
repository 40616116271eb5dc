"""Checks that both deployment modes must pass."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from .kube import KubeError
from .load import Load, Question
from .release import COMPONENTS, ROOT, Release

CONFORMANCE_S = 420

# Run inside the pods: what the kernel says, not what the specification asked for.
WHOAMI = """
import json, os, pathlib
def writable(path):
    try:
        (pathlib.Path(path) / "probe").write_text("x")
        return True
    except OSError:
        return False
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/1/status").read_text().splitlines())
print(json.dumps({
    "uid": os.getuid(),
    "capabilities": int(status["CapEff"], 16),
    "no_new_privileges": int(status["NoNewPrivs"]),
    "seccomp": int(status["Seccomp"]),
    "root": writable("/"), "package": writable("/opt/florence2"), "tmp": writable("/tmp"), "cache": writable("/cache"),
    "token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token"),
}))
"""


def assert_answers(release: Release, questions: list[Question], *, grpc: bool = False) -> None:
    """Every question gets, through the ingress, just the answer that it gets in process."""
    with release.connect(grpc=grpc) as client:
        for question in questions:
            assert client.infer(question.image, question.task, question.text) == question.answer, question.task


def run_conformance(release: Release) -> str:
    """Runs tests/conformance against the ingress, and returns its last line.

    Where only REST is offered it leaves out the many refusals, which no ingress changes, and what compares protocols.
    """
    cluster = release.kube.cluster
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "conformance"),
        "--rest-url", cluster.ingress, "--header", f"Host: {release.host}",
        *(["--grpc-url", cluster.ingress_address] if release.offers_grpc else ["-k", "not alike and not refusals"]),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=CONFORMANCE_S, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def share_of_rows(release: Release, questions: list[Question], requests: int = 30) -> dict[str, float]:
    """Asks, and returns which share of the rows each predictor pod got."""
    before = release.rows_by_predictor()
    with Load(release.connect, questions, senders=4) as load:
        load.wait_for(requests, seconds=180)
    assert not load.outcome.failed, load.outcome.failed
    taken = {pod: rows - before.get(pod, 0.0) for pod, rows in release.rows_by_predictor().items()}
    return {pod: rows / sum(taken.values()) for pod, rows in taken.items()}


def kill(uid: str) -> None:
    """Kills our process in a pod of the cluster on this machine, as the kernel does where memory runs out."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            groups, command = (process / "cgroup").read_text(), (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if f"pod{uid}" in groups and b"florence2" in command:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"pod {uid} has no process of ours")


def assert_locked_down(release: Release) -> None:
    """In the running pods: no root, nothing to write to but /tmp and /cache, no token, no capabilities."""
    for component in COMPONENTS:
        pod = release.kube.ready_pods(release.namespace, component)[0]
        seen = json.loads(release.exec(pod, WHOAMI))
        assert seen == {
            "uid": 65532, "capabilities": 0, "no_new_privileges": 1, "seccomp": 2,
            "root": False, "package": False, "tmp": True, "cache": True, "token": False,
        }, component  # fmt: skip


def assert_gone(release: Release) -> None:
    """Nothing that the release made is left in its namespace."""
    kinds = (
        "inferenceservices,services.serving.knative.dev,deployments,services,pods,hpa,pdb,networkpolicies,"
        "serviceaccounts,configmaps,secrets,jobs,httproutes"
    ).split(",")

    def left() -> list[str]:
        # These two are in every namespace.
        every = {"serviceaccount/default", "configmap/kube-root-ca.crt"}
        return [name for name in release.kube.leftovers(release.namespace, kinds) if name not in every]

    try:
        release.kube.wait("an empty namespace", 90, lambda: not left())
    except KubeError:
        raise AssertionError(f"helm uninstall left {left()}") from None
