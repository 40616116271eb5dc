"""values-gpu.yaml on a node without a GPU: waits for the right reason, and goes where a GPU appears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .kube import Cluster, Kube
from .release import CHART, Release

NAMESPACE = "f2-gpu"
RESOURCE = "nvidia.com/gpu"
# Keys and values in values-gpu.yaml are an example; these are what this test's node gets.
SELECTOR = {"e2e.florence2/accelerator": "fake"}
VALUES = {
    "model": {"source": "embedded"},
    "predictor": {
        "gpu": {"nodeSelector": SELECTOR},
        "autoscaling": {"minReplicas": 1, "maxReplicas": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
    },
    "transformer": {
        "autoscaling": {"minReplicas": 1, "maxReplicas": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
    },
}


@pytest.fixture(scope="module")
def release(kube: Kube, images: dict[str, dict[str, str]]) -> Iterator[Release]:
    """The chart with its GPU profile; nobody waits for it to be ready."""
    kube.remove_namespace(NAMESPACE)
    installed = Release(kube, NAMESPACE, "Standard", images)
    installed.apply(VALUES, CHART / "values-gpu.yaml", wait=False)
    yield installed
    kube.remove_namespace(NAMESPACE)


@pytest.fixture
def fake_gpu(own_cluster: Cluster, kube: Kube) -> Iterator[str]:
    """A node that says that it has one GPU, and carries the label; as it was again afterwards."""
    node = kube.core.list_node().items[0].metadata.name
    key, value = next(iter(SELECTOR.items()))
    kube.core.patch_node(node, {"metadata": {"labels": {key: value}}})
    path = f"/status/capacity/{RESOURCE.replace('/', '~1')}"
    _patch_status(kube, node, [{"op": "add", "path": path, "value": "1"}])
    yield node
    _patch_status(kube, node, [{"op": "remove", "path": path}])
    kube.core.patch_node(node, {"metadata": {"labels": {key: None}}})


def test_waits_for_a_gpu_and_a_node_of_its_kind(release: Release, kube: Kube) -> None:
    pod = kube.wait("a predictor", 60, lambda: next(iter(kube.pods(NAMESPACE, "predictor")), None), NAMESPACE)
    reason = kube.wait("why it waits", 60, lambda: _unscheduled(kube, pod.metadata.name), NAMESPACE)
    print(reason)
    assert "didn't match Pod's node affinity/selector" in reason
    spec = kube.pods(NAMESPACE, "predictor")[0].spec
    assert spec.node_selector == SELECTOR
    assert spec.containers[0].resources.limits[RESOURCE] == "1"
    assert any(toleration.key == RESOURCE for toleration in spec.tolerations)


def test_goes_where_a_gpu_appears_and_never_falls_back(release: Release, kube: Kube, fake_gpu: str) -> None:
    pod = kube.wait("its node", 60, lambda: _scheduled(kube), NAMESPACE)
    assert pod.spec.node_name == fake_gpu
    # The node only says that it has a GPU: asked for CUDA, the predictor ends rather than serving on the CPU.
    # That takes as long as its image, which no test before this one pulled.
    log = kube.wait("its last words", 300, lambda: _cuda_refusal(kube, pod.metadata.name), NAMESPACE)
    print(log)
    assert not kube.ready_pods(NAMESPACE, "predictor")


def _unscheduled(kube: Kube, pod: str) -> str | None:
    for event in kube.events(NAMESPACE, pod):
        if event.startswith("FailedScheduling"):
            return event
    return None


def _scheduled(kube: Kube) -> Any:
    return next((pod for pod in kube.pods(NAMESPACE, "predictor") if pod.spec.node_name), None)


def _cuda_refusal(kube: Kube, pod: str) -> str | None:
    for previous in ([], ["--previous"]):
        log = kube.kubectl("logs", pod, "-c", "kserve-container", "-n", NAMESPACE, *previous, check=False)
        for line in log.splitlines():
            if "no GPU is visible" in line:
                return line
    return None


def _patch_status(kube: Kube, node: str, patch: list[dict[str, str]]) -> None:
    kube.kubectl("patch", "node", node, "--subresource=status", "--type=json", "-p", json.dumps(patch))
