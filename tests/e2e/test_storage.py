"""Checkpoints from where KServe fetches or mounts them; and what is seen when there is none."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from florence2_kserve.client import Florence2Client
from florence2_kserve.local import LocalService
from tests import shadow

from .kube import Cluster, Kube
from .load import Question
from .release import ROOT, Release

NAMESPACE = "f2-storage"
CLAIM = "checkpoints"
LAYOUTS = ("native", "original")
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
RESTRICT = "".join(re.findall(r"^kubectl patch clusterstoragecontainer [^`]*", DEPLOY, re.MULTILINE))
STEADY = {
    part: {"autoscaling": {"class": "none", "minReplicas": 1, "maxReplicas": 1}}
    for part in ("transformer", "predictor")
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Shadow checkpoints of both layouts: whole folders for the predictor, processor's files for the transformer."""
    made = Path(tempfile.mkdtemp(prefix="florence2-checkpoints-"))
    for layout in LAYOUTS:
        shadow.main([layout, str(made / layout)])
        shadow.main([layout, str(made / f"{layout}-processor"), "--processor-only"])
    for path in [made, *made.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # the pods' user isn't this one
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def namespace(own_cluster: Cluster, kube: Kube, folder: Path) -> Iterator[str]:
    """A namespace with a claim on a volume that holds the folder."""
    kube.remove_namespace(NAMESPACE)
    kube.make_namespace(NAMESPACE)
    size = {"storage": "1Gi"}
    volume: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": NAMESPACE},
        "spec": {
            "capacity": size,
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "hostPath": {"path": str(folder)},
            "claimRef": {"namespace": NAMESPACE, "name": CLAIM},
        },
    }
    claim: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": NAMESPACE},
        "spec": {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "resources": {"requests": size}},
    }
    kube.apply(volume, claim)
    kube.kubectl(*shlex.split(RESTRICT)[1:])
    yield NAMESPACE
    kube.remove_namespace(NAMESPACE)
    kube.kubectl("delete", "pv", NAMESPACE, "--ignore-not-found")


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """native or original."""
    return str(request.param)


def test_serves_a_checkpoint_from_a_claim(
    namespace: str, kube: Kube, images: dict[str, dict[str, str]], questions: list[Question], folder: Path, layout: str
) -> None:
    release = Release(kube, namespace, "Standard", images, name=f"f2-{layout}")
    values = {
        **STEADY,
        "model": {
            "source": "storage",
            "storageUri": f"pvc://{CLAIM}/{layout}",
            "processorUri": f"pvc://{CLAIM}/{layout}-processor",
        },
    }
    release.apply(values)
    question, parameters = questions[0], {"max_new_tokens": 12}
    with release.connect() as client:
        seen = client.infer(question.image, question.task, **parameters)
    with LocalService(model=str(folder / layout)) as service, Florence2Client(service.rest_url) as client:
        assert seen == client.infer(question.image, question.task, **parameters)
    release.uninstall()


def test_a_wrong_path_ends_the_predictor_with_a_clear_line(
    namespace: str, kube: Kube, images: dict[str, dict[str, str]]
) -> None:
    release = Release(kube, namespace, "Standard", images, name="f2-nothing")
    uri = f"pvc://{CLAIM}/{LAYOUTS[0]}-processor"  # a folder without weights
    release.apply({**STEADY, "model": {"source": "storage", "storageUri": uri, "processorUri": uri}}, wait=False)
    line = kube.wait("why", 120, lambda: _said(kube, release, "lacks model.safetensors"), namespace)
    print(line)
    assert not release.is_ready()
    release.uninstall()


def test_an_address_that_has_nothing_is_an_event_and_never_ready(
    namespace: str, kube: Kube, images: dict[str, dict[str, str]]
) -> None:
    release = Release(kube, namespace, "Standard", images, name="f2-nowhere")
    uri = "https://florence2.invalid/checkpoint.tar.gz"
    release.apply({**STEADY, "model": {"source": "storage", "storageUri": uri, "processorUri": uri}}, wait=False)

    def failed() -> str | None:
        events = kube.events(namespace, "f2-nowhere-predictor")
        return next((event for event in events if "BackOff" in event and "storage-initializer" in event), None)

    print(kube.wait("the event", 180, failed, namespace))
    assert not release.is_ready()
    release.uninstall()


def _said(kube: Kube, release: Release, text: str) -> str | None:
    for pod in kube.pods(release.namespace, "predictor", f"serving.kserve.io/inferenceservice={release.name}"):
        for previous in ([], ["--previous"]):
            log = kube.kubectl(
                "logs", pod.metadata.name, "-c", "kserve-container", "-n", release.namespace, *previous, check=False
            )
            for line in log.splitlines():
                if text in line:
                    return line
    return None
