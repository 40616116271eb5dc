"""What the cluster itself must do, shown by a tiny echo server in place of the model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from . import cluster as own
from .build import image_names
from .config import RUN
from .shell import ClusterError, wait

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif("FLORENCE2_E2E_KUBECONFIG" in os.environ, reason="the cluster isn't the tests' own"),
]
NAMESPACE = "cluster-test"
READY_S = 180
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """The cluster's addresses, and a namespace for this module."""
    if reason := own.why_not():
        pytest.skip(f"no cluster can be made here: {reason}")
    own.up()
    own.kubectl("create", "namespace", NAMESPACE)
    yield own.addresses()
    own.kubectl("delete", "namespace", NAMESPACE, "--wait", limit_s=120)


def apply(*manifests: dict[str, Any]) -> None:
    own.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))


def container(image: str, *arguments: str, ports: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "name": "kserve-container",
        "image": image_names()[image],
        "args": list(arguments),
        "ports": [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}},
        **more,
    }


def service(name: str, mode: str, **components: dict[str, Any]) -> None:
    """Applies an InferenceService of containers."""
    apply(
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "annotations": {"serving.kserve.io/deploymentMode": mode},
            },
            "spec": {
                # Knative gives a pod as long to end as to answer.
                role: {"minReplicas": 0 if mode == "Knative" else 1, "timeout": 20, "containers": [spec]}
                for role, spec in components.items()
            },
        }
    )


def get(*arguments: str) -> dict[str, Any]:
    return json.loads(own.kubectl("get", "-n", NAMESPACE, *arguments, "-o", "json"))


def host(name: str) -> str:
    """Waits until an InferenceService is ready, and returns the name by which the ingress knows it."""
    wait(f"InferenceService {name}", READY_S, lambda: own.meets(get("isvc", name), "Ready"))
    return str(get("isvc", name)["status"]["url"]).partition("://")[2]


def ask(ingress: str, name: str, path: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(f"{ingress}{path}", body, {"Host": name, "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def call(ingress: str, name: str, message: bytes) -> bytes:
    """One gRPC call, of bytes as they are."""
    with grpc.insecure_channel(ingress.removeprefix("http://"), [("grpc.default_authority", name)]) as channel:
        return channel.unary_unary(METHOD)(message, timeout=60)


def pods(role: str, name: str) -> int:
    selector = f"component={role},serving.kserve.io/inferenceservice={name}"
    return len(get("pods", "-l", selector)["items"])


@pytest.mark.full  # the chart's own tests need the same of the cluster
def test_standard_mode_answers_rest_and_grpc_at_one_address(addresses: dict[str, str]) -> None:
    echo = container("echo", "--grpc_port=8081", ports={"http": 8080, "grpc": 8081})
    predictor = container("echo", "--model_name=behind", "--grpc_port=8081", ports={"h2c": 8081, "http": 8080})
    service("standard", "Standard", predictor=predictor, transformer=echo)
    name = host("standard")
    answer = json.loads(ask(addresses["INGRESS"], name, "/v2/models/m/infer", b"question"))
    assert (answer["model"], answer["body"]) == ("standard", "question")
    assert (answer["predictor"]["model"], answer["predictor"]["body"]) == ("behind", "question")
    assert call(addresses["INGRESS"], name, b"bytes") == b"bytes"


@pytest.mark.full  # the chart's own tests need the same of the cluster
def test_knative_mode_scales_to_zero_and_wakes_for_rest_and_grpc(addresses: dict[str, str]) -> None:
    transformer = container("echo", ports={"http1": 8080})
    predictor = container("echo", "--model_name=behind", "--http_port=8081", ports={"h2c": 8081})
    service("knative", "Knative", predictor=predictor, transformer=transformer)
    name = host("knative")
    behind = name.replace("-transformer", "-predictor")

    def answers() -> None:
        answer = json.loads(ask(addresses["INGRESS"], name, "/v2/models/m/infer", b"question"))
        assert (answer["body"], answer["predictor"]["model"]) == ("question", "behind")
        assert call(addresses["INGRESS"], behind, b"bytes") == b"bytes"

    answers()
    wait("zero pods", 90, lambda: pods("transformer", "knative") + pods("predictor", "knative") == 0)
    answers()


@pytest.mark.full  # the chart's own tests need the same of the cluster
def test_cpu_is_measured_for_autoscaling(addresses: dict[str, str]) -> None:
    echo = container("echo", ports={"http": 8080})
    service("measured", "Standard", predictor=echo)
    host("measured")

    def current() -> Any:
        status = get("hpa", "measured-predictor").get("status", {})
        metrics = status.get("currentMetrics") or [{}]
        return metrics[0].get("resource", {}).get("current", {}).get("averageUtilization")

    wait("the CPU's use in the autoscaler's status", 120, lambda: current() is not None)


@pytest.fixture
def volume(addresses: dict[str, str]) -> Iterator[Path]:
    """A folder that a claim named `files` is bound to."""
    folder = Path(tempfile.mkdtemp(dir=RUN))
    folder.chmod(0o755)
    size = {"storage": "1Gi"}
    kept = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "cluster-test"},
            "spec": {**kept, "capacity": size, "hostPath": {"path": str(folder)}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "files", "namespace": NAMESPACE},
            "spec": {**kept, "resources": {"requests": size}, "volumeName": "cluster-test"},
        },
    )
    yield folder
    own.kubectl("delete", "-n", NAMESPACE, "isvc", "--all", limit_s=90)
    own.kubectl("delete", "-n", NAMESPACE, "pvc/files", "pv/cluster-test", limit_s=120)
    shutil.rmtree(folder)


def test_models_come_from_claims_and_by_the_storage_initializer(addresses: dict[str, str], volume: Path) -> None:
    (volume / "model").mkdir()
    (volume / "model" / "weights.bin").write_bytes(b"weights")

    def files(uri: str) -> dict[str, Any]:
        """Serves what KServe put at /mnt/models; the storage initializer's image has a Python for it."""
        command = ["python3", "-m", "http.server", "8080", "--directory", "/mnt/models"]
        env = [{"name": "STORAGE_URI", "value": uri}]
        return container("storage-initializer", ports={"http1": 8080}, command=command, args=[], env=env)

    for mode in ("Standard", "Knative"):
        claimed = f"claimed-{mode.lower()}"
        service(claimed, mode, predictor=files("pvc://files/model"))
        assert ask(addresses["INGRESS"], host(claimed), "/weights.bin") == b"weights"
    # By the init container, from one of the two.
    service("fetched", "Standard", predictor=files(f"http://claimed-standard-predictor.{NAMESPACE}/weights.bin"))
    assert ask(addresses["INGRESS"], host("fetched"), "/weights.bin") == b"weights"


def test_nothing_leads_out_of_the_node() -> None:
    """A pod is told at once that there is no way, so that what would reach for a hub fails soon."""
    start = time.monotonic()
    program = "import socket; socket.create_connection(('192.0.2.1', 80), 20)"
    with pytest.raises(ClusterError, match=r"unreachable|No route"):
        own.kubectl(
            "run", "outward", "-n", NAMESPACE, "--image", image_names()["storage-initializer"], "--restart=Never",
            "--attach", "--rm", "--quiet", "--command", "--", "python3", "-c", program,
        )  # fmt: skip
    assert time.monotonic() - start < 40
