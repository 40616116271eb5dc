"""What an InferenceService says about itself, before any load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from florence2_loadtest.cluster.pods import read_time

COMPONENTS = ("transformer", "predictor")
KNATIVE, STANDARD = "Knative", "Standard"

_MODES = {"Knative": KNATIVE, "Serverless": KNATIVE, "Standard": STANDARD, "RawDeployment": STANDARD}
_MODE_ANNOTATION = "serving.kserve.io/deploymentMode"
_UTILIZATION = "autoscaling.knative.dev/target-utilization-percentage"
# Knative's own defaults; a cluster's config-autoscaler, which we don't read, may have others.
_UTILIZATION_PERCENT, _CONCURRENCY = 70.0, 100.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between which numbers of replicas a component scales, and by what.

    Attributes:
        fewest: Replicas at least.
        most: Replicas at most; None: no limit.
        target: Requests in flight at which the autoscaler keeps a replica; None where something else decides.
    """

    fewest: int = 1
    most: int | None = None
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """An InferenceService.

    Attributes:
        name: Its name.
        namespace: Its namespace.
        mode: ``Knative`` or ``Standard``.
        is_ready: Whether it says so.
        host: The name by which the ingress knows it; empty where it has none yet.
        created: When it was made, in seconds since 1970 by the cluster's clock.
        bounds: By component.
    """

    name: str
    namespace: str
    mode: str
    is_ready: bool = False
    host: str = ""
    created: float | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)

    def local_url(self, protocol: str) -> str:
        """Returns its address inside the cluster, where its first port speaks `protocol`: ``rest`` or ``grpc``."""
        scheme, port = ("grpc", ":80") if protocol == "grpc" else ("http", "")
        return f"{scheme}://{self.name}-transformer.{self.namespace}{port}"


def read_service(item: Mapping[str, Any]) -> Service:
    """Reads an InferenceService as the API gives it."""
    metadata, spec, status = item["metadata"], item["spec"], item.get("status", {})
    asked = metadata.get("annotations", {}).get(_MODE_ANNOTATION)
    mode = _MODES.get(status.get("deploymentMode") or asked or "", STANDARD)
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions", [])}
    return Service(
        name=metadata["name"],
        namespace=metadata["namespace"],
        mode=mode,
        is_ready=conditions.get("Ready") == "True",
        host=status.get("url", "").partition("://")[2].rstrip("/"),
        created=read_time(metadata.get("creationTimestamp")),
        bounds={
            name: _bounds(spec[name], mode, {**metadata.get("annotations", {}), **spec[name].get("annotations", {})})
            for name in COMPONENTS
            if name in spec
        },
    )


def _bounds(component: Mapping[str, Any], mode: str, annotations: Mapping[str, str]) -> Bounds:
    by_concurrency = mode == KNATIVE and component.get("scaleMetric", "concurrency") == "concurrency"
    return Bounds(
        fewest=int(component.get("minReplicas", 1)),
        most=int(component.get("maxReplicas", 0)) or None,
        target=_target(component, annotations) if by_concurrency else None,
    )


def _target(component: Mapping[str, Any], annotations: Mapping[str, str]) -> float:
    """Returns at how many requests in flight Knative keeps a replica: a share of what it may have."""
    limit = float(component.get("containerConcurrency") or 0)  # 0: none
    wanted = float(component.get("scaleTarget") or 0) or limit or _CONCURRENCY
    share = float(annotations.get(_UTILIZATION, _UTILIZATION_PERCENT)) / 100
    return max(1.0, (min(wanted, limit) if limit else wanted) * share)
