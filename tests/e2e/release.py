"""One Helm release of the chart, handled as its users do."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence2_kserve.client import Florence2Client

from .kube import Kube, KubeError, is_ready

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "florence2-kserve"
VALUES = Path(__file__).parent / "values.yaml"
MARK = "e2e.florence2/revision"  # a pod annotation that changes with every upgrade
COMPONENTS = ("transformer", "predictor")
READY_S = 240.0


class Release:
    """A release of the chart in a namespace of its own.

    Args:
        kube: The cluster.
        namespace: Made when the release is installed, and removed with it; it enforces restricted pod security.
        mode: ``Knative`` or ``Standard``.
        images: Image value of each of transformer, predictor, tools: repository and tag.
        name: Of release and InferenceService.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        mode: str,
        images: Mapping[str, dict[str, str]],
        name: str = "florence2",
    ) -> None:
        self.kube, self.namespace, self.mode, self.name = kube, namespace, mode, name
        self._images = images
        self._revision = 0

    def apply(self, values: Mapping[str, Any], *files: Path, wait: bool = True) -> None:
        """``helm upgrade --install`` with the values of the tests and these over them, until all of it runs.

        Args:
            values: Over everything else.
            files: Values files between those of the tests and `values`.
            wait: Whether to wait until every pod is one of this revision's and ready.

        Raises:
            KubeError: If helm fails or it isn't ready in time.
        """
        if self._revision == 0:
            self.kube.make_namespace(self.namespace)
        self._revision += 1
        own = {
            "mode": self.mode,
            **{part: {"image": image} for part, image in self._images.items()},
            "podAnnotations": {MARK: str(self._revision)},
        }
        # Each -f goes over the ones before it, maps being merged.
        arguments = [argument for file in (VALUES, *files) for argument in ("-f", str(file))]
        self.kube.helm(
            "upgrade", "--install", self.name, str(CHART), "-n", self.namespace, *arguments,
            "-f", "-", stdin=json.dumps(_merge(own, values)),
        )  # fmt: skip
        if wait:
            self.wait_settled()

    def rollback(self) -> None:
        """``helm rollback`` to the revision before, until it runs."""
        self.kube.helm("rollback", self.name, "-n", self.namespace)
        self._revision -= 1
        self.wait_settled()

    def uninstall(self) -> None:
        """``helm uninstall``."""
        self.kube.helm("uninstall", self.name, "-n", self.namespace, "--wait", "--timeout", "2m", timeout=150)

    def wait_settled(self, seconds: float = READY_S) -> None:
        """Waits until the newest revision is what runs, and nothing else does."""
        self.kube.wait(f"{self.name} revision {self._revision}", seconds, self._is_settled, self.namespace)

    def _is_settled(self) -> bool:
        if not self.is_ready():
            return False
        for component in COMPONENTS:
            pods = self.kube.pods(self.namespace, component)
            mine = [pod for pod in pods if (pod.metadata.annotations or {}).get(MARK) == str(self._revision)]
            if len(mine) != len(pods) or not all(map(is_ready, mine)):
                return False
            if not mine and not self._is_ready_at_zero(component):
                return False
        return True

    def _is_ready_at_zero(self, component: str) -> bool:
        """Whether this revision became ready and has no pods since nobody asks."""
        if self.mode != "Knative":
            return False
        service = self.kube.custom.get_namespaced_custom_object(
            "serving.knative.dev", "v1", self.namespace, "services", f"{self.name}-{component}"
        )
        status = service.get("status", {})
        created, ready = status.get("latestCreatedRevisionName"), status.get("latestReadyRevisionName")
        mark = service["spec"]["template"]["metadata"].get("annotations", {}).get(MARK)
        seen = status.get("observedGeneration") == service["metadata"]["generation"]
        return seen and created is not None and created == ready and mark == str(self._revision)

    def is_ready(self) -> bool:
        """Whether the InferenceService says that it is ready."""
        conditions = self.kube.isvc(self.namespace, self.name).get("status", {}).get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    @property
    def offers_grpc(self) -> bool:
        """Whether gRPC comes through the ingress: a Knative revision has one port, and REST has it."""
        return self.mode == "Standard"

    @property
    def host(self) -> str:
        """The name by which the ingress knows the service.

        Raises:
            KubeError: If it has none yet.
        """
        url = self.kube.isvc(self.namespace, self.name).get("status", {}).get("url")
        if not url:
            raise KubeError(f"{self.name} has no URL yet")
        return str(url).partition("://")[2]

    def connect(self, *, grpc: bool = False, **options: Any) -> Florence2Client:
        """Returns a client that goes through the ingress."""
        cluster = self.kube.cluster
        url = f"grpc://{cluster.ingress_address}" if grpc else cluster.ingress
        return Florence2Client(url, headers={"Host": self.host}, **options)

    def rows_by_predictor(self) -> dict[str, float]:
        """Returns how many rows each ready predictor pod has taken in."""
        return {
            pod: self.kube.metrics(self.namespace, pod)["florence2_engine_requests_submitted_total"]
            for pod in self.kube.ready_pods(self.namespace, "predictor")
        }

    def transformer_retries(self) -> float:
        """Returns how many calls the transformers that are ready have sent to a predictor again."""
        name = "florence2_transformer_predictor_retries_total"
        pods = self.kube.ready_pods(self.namespace, "transformer")
        return sum(self.kube.metrics(self.namespace, pod)[name] for pod in pods)

    def exec(self, pod: str, program: str) -> str:
        """Runs a Python program in a pod's container and returns what it prints."""
        code = base64.b64encode(program.encode()).decode()
        return self.kube.kubectl(
            "exec", "-n", self.namespace, pod, "-c", "kserve-container", "--",
            "/opt/florence2/bin/python", "-c", f"import base64; exec(base64.b64decode('{code}'))",
        )  # fmt: skip


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
