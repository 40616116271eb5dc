"""A cluster as tests see it: kubectl and helm as users run them, and the API for what is asked often."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from prometheus_client.parser import text_string_to_metric_families

T = TypeVar("T")
# Where `make chart-tools` puts helm.
TOOLS = Path(os.environ.get("FLORENCE2_CACHE", Path.home() / ".cache" / "florence2-kserve")) / "tools" / "bin"
ISVC_GROUP = ("serving.kserve.io", "v1beta1", "inferenceservices")
POLL_S = 0.5


class KubeError(Exception):
    """A command failed, or a condition wasn't met in time."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the cluster is and what the tests run against it with.

    Attributes:
        kubeconfig: For kubectl, helm and the API.
        ingress: ``http://host:port`` of the gateway; names are told apart by the Host header.
        registry: ``host:port`` that images are pushed to and pulled from; None where they come from elsewhere.
        tools: Folders with kubectl, ahead of PATH.
    """

    kubeconfig: Path
    ingress: str
    registry: str | None
    tools: tuple[Path, ...] = ()

    @property
    def ingress_address(self) -> str:
        """The gateway's ``host:port``."""
        return self.ingress.removeprefix("http://")


class Kube:
    """Commands and questions to one cluster.

    Args:
        cluster: Which one.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        api = config.new_client_from_config(str(cluster.kubeconfig))
        api.configuration.retries = 2
        self.core, self.apps = client.CoreV1Api(api), client.AppsV1Api(api)
        self.autoscaling, self.custom = client.AutoscalingV2Api(api), client.CustomObjectsApi(api)

    # Commands

    def run(self, *command: str, timeout: float = 300, check: bool = True, stdin: str | None = None) -> str:
        """Runs kubectl or helm and returns its output.

        Raises:
            KubeError: If it fails and `check` is set, or takes longer than `timeout` seconds.
        """
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.cluster.kubeconfig),
            "PATH": os.pathsep.join([*map(str, self.cluster.tools), str(TOOLS), os.environ["PATH"]]),
        }
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env=environment, input=stdin
            )
        except subprocess.TimeoutExpired:
            raise KubeError(f"{' '.join(command)}: not done after {timeout:g} s") from None
        if check and done.returncode:
            raise KubeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """Runs kubectl."""
        return self.run("kubectl", *arguments, **options)

    def helm(self, *arguments: str, **options: Any) -> str:
        """Runs helm."""
        return self.run("helm", *arguments, **options)

    def apply(self, *objects: dict[str, Any]) -> None:
        """Applies objects."""
        self.kubectl(
            "apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        )

    def make_namespace(self, name: str) -> None:
        """Makes a namespace that enforces restricted pod security, unless there is one of that name."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def remove_namespace(self, name: str) -> None:
        """Removes a namespace with all that is in it, and waits until it is gone."""
        # Services first: a namespace with pods in it is looked at again only after half of their grace period.
        if self.kubectl("get", "namespace", name, "--ignore-not-found", "-o", "name"):
            self.kubectl("delete", "isvc", "--all", "-n", name, "--timeout=60s", timeout=90)
            self.wait("an end of the pods", 120, lambda: not self.pods(name), name)
        self.kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=120s", timeout=150)

    # Questions

    def isvc(self, namespace: str, name: str) -> dict[str, Any]:
        """Returns an InferenceService."""
        group, version, plural = ISVC_GROUP
        return self.custom.get_namespaced_custom_object(group, version, namespace, plural, name)

    def pods(self, namespace: str, component: str | None = None, selector: str | None = None) -> list[Any]:
        """Returns the pods of a namespace, of one component (transformer or predictor) where it is named."""
        parts = [f"component={component}" if component else "", selector or ""]
        return self.core.list_namespaced_pod(namespace, label_selector=",".join(filter(None, parts))).items

    def ready_pods(self, namespace: str, component: str) -> list[str]:
        """Returns the names of a component's pods that are ready and not on their way out."""
        return sorted(pod.metadata.name for pod in self.pods(namespace, component) if is_ready(pod))

    def metrics(self, namespace: str, pod: str, port: int = 8080) -> dict[str, float]:
        """Returns a pod's metrics by name, summed over their labels."""
        text = self.core.connect_get_namespaced_pod_proxy_with_path(
            f"{pod}:{port}", namespace, "metrics", _preload_content=False
        ).data.decode()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def events(self, namespace: str, about: str = "") -> list[str]:
        """Returns ``reason: message`` of the events about objects whose name starts with `about`."""
        items = self.core.list_namespaced_event(namespace).items
        return [f"{e.reason}: {e.message}" for e in items if (e.involved_object.name or "").startswith(about)]

    def wait(self, what: str, seconds: float, ask: Callable[[], T | None], namespace: str | None = None) -> T:
        """Asks until the answer is true, and returns it.

        Args:
            what: What is waited for, for the error.
            seconds: How long.
            ask: The question; answers of the API such as "not found" count as no.
            namespace: Whose pods and events the error shows.

        Raises:
            KubeError: If the time is over.
        """
        end, last = time.monotonic() + seconds, ""
        while True:
            try:
                if answer := ask():
                    return answer
            except (ApiException, KubeError) as error:
                last = str(error)
            if time.monotonic() >= end:
                state = f"\n{self.describe(namespace)}" if namespace else ""
                raise KubeError(f"{what}: not after {seconds:g} s. {last}{state}")
            time.sleep(POLL_S)

    def describe(self, namespace: str) -> str:
        """Returns what one looks at when something hangs: services, pods, events, the end of the logs."""
        parts = [
            self.kubectl("get", "isvc,ksvc,deploy,hpa,pods", "-o", "wide", "-n", namespace, check=False),
            "\n".join(self.events(namespace)[-20:]),
        ]
        for pod in self.pods(namespace):
            for container in pod.spec.containers:
                of = (pod.metadata.name, "-c", container.name, "-n", namespace)
                log = self.kubectl("logs", *of, "--tail=8", check=False)
                parts.append(f"--- {pod.metadata.name}/{container.name}\n{log}")
        return "\n".join(parts)

    def leftovers(self, namespace: str, kinds: Sequence[str]) -> list[str]:
        """Returns the names of objects of `kinds` in a namespace."""
        return self.kubectl("get", ",".join(kinds), "-n", namespace, "-o", "name", "--ignore-not-found").split()


def is_ready(pod: Any) -> bool:
    """Whether a pod takes requests: ready, and nobody has asked it to end."""
    conditions = {c.type: c.status for c in pod.status.conditions or []}
    return pod.metadata.deletion_timestamp is None and conditions.get("Ready") == "True"
