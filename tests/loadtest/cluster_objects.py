"""Objects of a cluster as its API gives them, for tests of `florence2_loadtest.cluster`."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

NAME, NAMESPACE = "florence2", "vision"
Object = dict[str, Any]
_versions = itertools.count(1000)


def timestamp(seconds: float) -> str:
    """Returns a time as Kubernetes writes it: in whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def metadata(name: str, **more: Any) -> Object:
    """Returns an object's metadata, with a resource version later than all before."""
    return {"name": name, "namespace": NAMESPACE, "resourceVersion": str(next(_versions)), **more}


def inference_service(mode: str = "Knative", fewest: int = 0, is_ready: bool = True) -> Object:
    """Returns the InferenceService that the chart makes, with its status."""
    by_requests = mode == "Knative"
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata(NAME, annotations={"serving.kserve.io/deploymentMode": mode}),
        "spec": {
            "transformer": {
                "minReplicas": fewest, "maxReplicas": 3, "scaleMetric": "concurrency" if by_requests else "cpu",
                "scaleTarget": 2, "containers": [{"name": "kserve-container"}],
            },
            "predictor": {
                "minReplicas": fewest, "maxReplicas": 2, "containers": [{"name": "kserve-container"}],
                **({"scaleMetric": "concurrency", "scaleTarget": 4} if by_requests else {}),
            },
        },
        "status": {
            "url": f"http://{NAME}-{NAMESPACE}.example.com",
            "deploymentMode": mode,
            "conditions": [
                {"type": "PredictorReady", "status": "True"},
                {"type": "Ready", "status": "True" if is_ready else "False"},
            ],
        },
    }  # fmt: skip


def pod(
    component: str,
    number: int = 0,
    *,
    created: float = 1_800_000_000,
    scheduled: float | None = None,
    started: float | None = None,
    is_loaded: bool = False,
    ready: float | None = None,
    is_ending: bool = False,
    phase: str = "Running",
    has_probe: bool = True,
) -> Object:
    """Returns a pod of a Knative revision, beside whose container the queue-proxy runs."""
    conditions = [
        {"type": "PodReadyToStartContainers", "status": "True", "lastTransitionTime": timestamp(created)},
        {"type": "Ready", "status": "False" if ready is None else "True", "lastTransitionTime": timestamp(ready or 0)},
    ]
    if scheduled is not None:
        conditions.append({"type": "PodScheduled", "status": "True", "lastTransitionTime": timestamp(scheduled)})
    state = {"waiting": {"reason": "ContainerCreating"}}
    if started is not None:
        state = {"running": {"startedAt": timestamp(started)}}
    probe = {"startupProbe": {"httpGet": {"path": f"/v2/models/{NAME}/ready", "port": 8080}}} if has_probe else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata(
            f"{NAME}-{component}-00001-deployment-6f9c-{number:05}",
            labels={
                "serving.kserve.io/inferenceservice": NAME,
                "component": component,
                "serving.knative.dev/revision": f"{NAME}-{component}-00001",
            },
            creationTimestamp=timestamp(created),
            **({"deletionTimestamp": timestamp(created + 60)} if is_ending else {}),
        ),
        "spec": {"containers": [{"name": "kserve-container", **probe}, {"name": "queue-proxy"}]},
        "status": {
            "phase": phase,
            "conditions": conditions,
            "containerStatuses": [
                {"name": "kserve-container", "ready": ready is not None, "started": is_loaded, "state": state},
                {"name": "queue-proxy", "ready": ready is not None, "started": True, "state": state},
            ],
        },
    }


def pulled(of: Object, at: float, container: str = "kserve-container") -> Object:
    """Returns the kubelet's event about a container's image."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": metadata(f"{of['metadata']['name']}.{next(_versions):x}"),
        "involvedObject": {
            "kind": "Pod",
            "name": of["metadata"]["name"],
            "namespace": NAMESPACE,
            "fieldPath": f"spec.containers{{{container}}}",
        },
        "reason": "Pulled",
        "message": 'Container image "florence2-predictor:v1" already present on machine',
        "firstTimestamp": timestamp(at),
        "lastTimestamp": timestamp(at),
        "type": "Normal",
    }


def unschedulable(of: Object) -> Object:
    """Returns the scheduler's event about a pod for which no node has room."""
    event = pulled(of, 0)
    return {
        **event,
        "involvedObject": {"kind": "Pod", "name": of["metadata"]["name"]},
        "reason": "FailedScheduling",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }


def pod_autoscaler(component: str, desired: int | None, actual: int | None = None, **more: Any) -> Object:
    """Returns Knative's PodAutoscaler of a component's revision; `more` are revision and reachability."""
    revision = f"{NAME}-{component}-{more.get('revision', '00001')}"
    return {
        "apiVersion": "autoscaling.internal.knative.dev/v1alpha1",
        "kind": "PodAutoscaler",
        "metadata": metadata(revision, labels=_knative_labels(component, revision)),
        "spec": {"reachability": more.get("reachability", "Reachable"), "protocolType": "http1"},
        "status": {
            **({} if desired is None else {"desiredScale": desired}),
            **({} if actual is None else {"actualScale": actual}),
            "conditions": [{"type": "Active", "status": "True" if desired else "False"}],
        },
    }


def serverless_service(component: str, mode: str, revision: str = "00001") -> Object:
    """Returns Knative's ServerlessService of a component's revision."""
    name = f"{NAME}-{component}-{revision}"
    return {
        "apiVersion": "networking.internal.knative.dev/v1alpha1",
        "kind": "ServerlessService",
        "metadata": metadata(name, labels=_knative_labels(component, name)),
        "spec": {"mode": mode, "numActivators": 3},
    }


def horizontal_pod_autoscaler(component: str, desired: int) -> Object:
    """Returns the HPA that KServe makes."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(f"{NAME}-{component}"),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{NAME}-{component}"},
            "minReplicas": 1,
            "maxReplicas": 3,
        },
        "status": {"currentReplicas": 1, "desiredReplicas": desired, "conditions": []},
    }


def deployment(component: str, replicas: int) -> Object:
    """Returns the Deployment that KServe makes."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(f"{NAME}-{component}"),
        "spec": {"replicas": replicas},
        "status": {"readyReplicas": replicas},
    }


def _knative_labels(component: str, revision: str) -> dict[str, str]:
    return {
        "serving.knative.dev/service": f"{NAME}-{component}",
        "serving.knative.dev/revision": revision,
        "component": component,
    }
