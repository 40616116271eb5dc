"""``kubectl apply -k manifests/CASE``: the rendered cases that a machine without a GPU can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .common import assert_answers
from .kube import Kube
from .load import Question
from .release import ROOT, Release

NAMESPACE = "f2-manifests"


@pytest.fixture(params=["knative-cpu", "standard-cpu"])
def applied(
    request: pytest.FixtureRequest, kube: Kube, images: dict[str, dict[str, str]], tmp_path: Path
) -> Iterator[Release]:
    """One case, by a kustomization that changes what a user would: namespace, images, and (small node) requests."""
    case = request.param
    kube.remove_namespace(NAMESPACE)
    kube.make_namespace(NAMESPACE)
    base = ROOT / "manifests" / case
    names = {image["name"].rpartition("-")[2]: image["name"] for image in _images(base)}
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": [os.path.relpath(base, tmp_path)],
        "images": [
            {"name": names[part], "newName": image["repository"], "newTag": image["tag"]}
            for part, image in images.items()
        ],
        "patches": [
            {
                "target": {"kind": "InferenceService"},
                "patch": yaml.safe_dump(
                    [
                        {"op": "replace", "path": f"/spec/{part}/containers/0/resources", "value": _SMALL}
                        for part in images
                    ]
                    + [{"op": "replace", "path": f"/spec/{part}/minReplicas", "value": 1} for part in images]
                ),
            }
        ],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    kube.kubectl("apply", "-k", str(tmp_path))
    release = Release(kube, NAMESPACE, "Knative" if case.startswith("knative") else "Standard", images)
    kube.wait(f"{case} ready", 240, release.is_ready, NAMESPACE)
    yield release
    kube.remove_namespace(NAMESPACE)


_SMALL = {"requests": {"cpu": "10m", "memory": "64Mi"}}


def test_is_ready_and_answers(applied: Release, questions: list[Question]) -> None:
    assert_answers(applied, questions[:5])


def _images(base: Path) -> list[dict[str, Any]]:
    """Returns the images that a case's workloads name, as kustomize's entries."""
    found = []
    for file in base.glob("*.yaml"):
        for document in yaml.safe_load_all(file.read_text()):
            if document and document.get("kind") == "InferenceService":
                for part in ("transformer", "predictor"):
                    image = document["spec"][part]["containers"][0]["image"]
                    found.append({"name": image.rpartition(":")[0]})
    return found
