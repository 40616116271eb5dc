"""What autoscalers want, read out of their objects as the API gives them.

Knative: PodAutoscaler and ServerlessService of each revision. Standard: the HorizontalPodAutoscaler,
or the Deployment where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Object = Mapping[str, Any]
SERVICE_LABEL = "serving.knative.dev/service"


def knative_state(name: str, autoscalers: Iterable[Object], serverless: Iterable[Object]) -> dict[str, float | None]:
    """Returns what Knative wants of one component: all its revisions together, since a rollout has two.

    Args:
        name: The component's Knative Service.
        autoscalers: PodAutoscalers.
        serverless: ServerlessServices.

    Returns:
        ``desired`` and ``actual`` replicas; ``activator_in_path``: 1 or 0. None where nothing is known.
    """
    own = [item for item in autoscalers if _service(item) == name]
    # A revision that no route leads to doesn't say how requests go.
    reached = {
        item["metadata"]["name"] for item in own if item.get("spec", {}).get("reachability", "") != "Unreachable"
    }
    modes = {
        item.get("spec", {}).get("mode")
        for item in serverless
        if _service(item) == name and item["metadata"]["name"] in reached
    }
    return {
        "desired": _sum(item.get("status", {}).get("desiredScale") for item in own),
        "actual": _sum(item.get("status", {}).get("actualScale") for item in own),
        "activator_in_path": float("Proxy" in modes) if modes & {"Proxy", "Serve"} else None,
    }


def standard_state(name: str, autoscalers: Iterable[Object], deployments: Iterable[Object]) -> dict[str, float | None]:
    """Returns what is wanted of one component: ``desired`` replicas by its HPA (KEDA's too), or by its Deployment.

    Args:
        name: The component's Deployment.
        autoscalers: HorizontalPodAutoscalers.
        deployments: Deployments.
    """
    for item in autoscalers:
        if item["spec"]["scaleTargetRef"]["name"] == name:
            wanted = item.get("status", {}).get("desiredReplicas")
            # 0 until it has looked for the first time.
            return {"desired": float(wanted) if wanted else None}
    for item in deployments:
        if item["metadata"]["name"] == name:
            return {"desired": float(item["spec"].get("replicas", 1))}
    return {"desired": None}


def _service(item: Object) -> str | None:
    return item["metadata"].get("labels", {}).get(SERVICE_LABEL)


def _sum(scales: Iterable[int | None]) -> float | None:
    """Returns the sum of what is known; Knative says -1 where it doesn't know."""
    known = [scale for scale in scales if scale is not None and scale >= 0]
    return float(sum(known)) if known else None
