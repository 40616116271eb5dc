"""Pods as the API gives them: their state, and when each went through which phase of its start."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from florence2_loadtest.results import PodTimes

Object = Mapping[str, Any]
CONTAINER = "kserve-container"
SERVICE_LABEL, COMPONENT_LABEL = "serving.kserve.io/inferenceservice", "component"
PHASES = ("scheduled", "pulled", "started", "loaded", "ready")


def state(pod: Object) -> Literal["ready", "pending", "terminating", "ended"]:
    """Returns what a pod counts as; ``pending`` is whatever will take requests later."""
    status = pod.get("status", {})
    if "deletionTimestamp" in pod["metadata"]:
        return "terminating"
    if status.get("phase") in ("Succeeded", "Failed"):
        return "ended"
    return "ready" if _condition(status, "Ready") else "pending"


def passed(pod: Object) -> dict[str, float | None]:
    """Returns the phases that a pod has behind it.

    The model is loaded when the start-up probe, which asks the model's own readiness, has gone through;
    without such a probe nobody can tell.

    Returns:
        Phase → when, in seconds since 1970 by the cluster's clock; None where the pod doesn't say.
    """
    status = pod.get("status", {})
    phases: dict[str, float | None] = {}
    for phase, condition in (("scheduled", "PodScheduled"), ("ready", "Ready")):
        if (found := _condition(status, condition)) is not None:
            phases[phase] = read_time(found.get("lastTransitionTime"))
    container = _named(status.get("containerStatuses", []))
    if (running := container.get("state", {}).get("running")) is not None:
        phases["started"] = read_time(running.get("startedAt"))
        if container.get("started") and "startupProbe" in _named(pod["spec"].get("containers", [])):
            phases["loaded"] = None
    return phases


def pulled_pod(event: Object) -> str | None:
    """Returns the pod whose image, of the container that serves, an event says to be there; None of other events."""
    about = event.get("involvedObject", {})
    is_it = event.get("reason") == "Pulled" and about.get("kind") == "Pod"
    return about.get("name") if is_it and f"{{{CONTAINER}}}" in about.get("fieldPath", "") else None


def read_time(timestamp: str | None) -> float | None:
    """Returns a time that Kubernetes wrote, in seconds since 1970."""
    return datetime.fromisoformat(timestamp).timestamp() if timestamp else None


def event_time(event: Object) -> float | None:
    """Returns when an event last happened, in seconds since 1970 by the cluster's clock."""
    return read_time(event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp"))


@dataclass(slots=True)
class _Pod:
    name: str
    component: str
    created: float
    phases: dict[str, float] = field(default_factory=dict)
    gone: float | None = None


class PodLog:
    """When pods were seen to go through their phases, by this machine's monotonic clock.

    A phase that begins while one watches has the moment at which it was seen; one that lies behind when a
    pod is first seen has the cluster's own time, in whole seconds, for which both clocks have to agree.
    """

    def __init__(self) -> None:
        self._pods: dict[str, _Pod] = {}
        self._pulled: dict[str, float] = {}  # events may come before their pods
        self._wall = time.time() - time.monotonic()

    def see(self, pod: Object, at: float, *, is_news: bool) -> None:
        """Takes in a pod as it is now.

        Args:
            pod: The pod.
            at: Now.
            is_news: Whether the pod just became so, rather than being found so.
        """
        metadata = pod["metadata"]
        name = metadata["name"]
        known = self._pods.get(name)
        if known is None:
            created = at if is_news else self._local(read_time(metadata.get("creationTimestamp")), at)
            component = metadata.get("labels", {}).get(COMPONENT_LABEL, "")
            known = self._pods[name] = _Pod(name, component, created)
        for phase, when in passed(pod).items():
            if phase not in known.phases:
                known.phases[phase] = max(known.created, at if is_news else self._local(when, at))

    def see_event(self, event: Object, at: float, *, is_news: bool) -> None:
        """Takes in an event; only those about pulled images matter."""
        if (name := pulled_pod(event)) is not None:
            self._pulled.setdefault(name, at if is_news else self._local(event_time(event), at))

    def lose(self, name: str, at: float) -> None:
        """Takes in that a pod is gone."""
        if name in self._pods and self._pods[name].gone is None:
            self._pods[name].gone = at

    def times(self, origin: float) -> list[PodTimes]:
        """Returns what was seen of every pod, in the order of their creation.

        Args:
            origin: The moment from which the run counts.
        """
        return [self._times(pod, origin) for pod in sorted(self._pods.values(), key=lambda pod: pod.created)]

    def _times(self, pod: _Pod, origin: float) -> PodTimes:
        seen = {**pod.phases, **({"pulled": self._pulled[pod.name]} if pod.name in self._pulled else {})}
        since, latest = {}, float("inf")
        # News of image, container and readiness come by different ways; what a phase needs was there before it.
        for phase in reversed(PHASES):
            if phase in seen:
                latest = min(latest, max(seen[phase], pod.created))
                since[f"{phase}_s"] = latest - pod.created
        gone = None if pod.gone is None else pod.gone - pod.created
        return PodTimes(name=pod.name, component=pod.component, created_s=pod.created - origin, gone_s=gone, **since)

    def _local(self, epoch: float | None, otherwise: float) -> float:
        return otherwise if epoch is None else min(epoch - self._wall, otherwise)


def _condition(status: Object, kind: str) -> Object | None:
    """Returns a condition if it is true."""
    for condition in status.get("conditions") or ():
        if condition["type"] == kind and condition["status"] == "True":
            return condition
    return None


def _named(containers: list[Object]) -> Object:
    return next((container for container in containers if container.get("name") == CONTAINER), {})
