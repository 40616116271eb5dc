"""Samples a service in a cluster once a second, out of mirrors that watches keep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from florence2_loadtest.cluster.api import (
    CONNECT_S,
    READ_S,
    Api,
    ClusterError,
    Mirror,
    Object,
    explain,
    is_forbidden,
    read_json,
)
from florence2_loadtest.cluster.panic import NAMESPACE, PanicWatch
from florence2_loadtest.cluster.pods import COMPONENT_LABEL, SERVICE_LABEL, PodLog, state
from florence2_loadtest.cluster.scalers import SERVICE_LABEL as KNATIVE_SERVICE_LABEL
from florence2_loadtest.cluster.scalers import knative_state, standard_state
from florence2_loadtest.cluster.service import COMPONENTS, KNATIVE, Service, read_service
from florence2_loadtest.results import PodTimes, Sample

PERIOD_S = 1.0
KSERVE = ("serving.kserve.io", "v1beta1")
AUTOSCALERS = ("autoscaling.internal.knative.dev", "v1alpha1")
NETWORKING = ("networking.internal.knative.dev", "v1alpha1")
# Events that explain why a pod takes its time.
_TELLING = ("FailedScheduling", "Failed", "BackOff", "FailedMount", "FailedCreatePodSandBox", "TriggeredScaleUp")
_SHOWN = 200  # characters of an event


def find_service(api: Api, name: str, namespace: str) -> Service:
    """Asks for an InferenceService.

    Raises:
        ClusterError: If it can't be had; says why.
    """
    try:
        return read_service(
            read_json(
                api.custom.get_namespaced_custom_object(
                    *KSERVE, namespace, "inferenceservices", name,
                    _preload_content=False, _request_timeout=(CONNECT_S, READ_S),
                )
            )
        )  # fmt: skip
    except Exception as error:  # of the API, of its connection, of what it says: all the same to who asked
        message = f"inferenceservice {namespace}/{name}: {explain(error)}"
        raise ClusterError(message, is_forbidden=is_forbidden(error)) from None


class Sampler:
    """Samples from a ``with`` statement's begin to its end.

    Args:
        api: The cluster.
        service: The service.
        say: Takes a line about each thing that is noted.
        autoscaler: Namespace of Knative's autoscaler.
        period_s: Time between samples.
    """

    def __init__(
        self,
        api: Api,
        service: Service,
        say: Callable[[str], None] = lambda _: None,
        autoscaler: str = NAMESPACE,
        period_s: float = PERIOD_S,
    ) -> None:
        self.service = service
        self._period_s = period_s
        self._say = say
        self._samples: list[tuple[float, dict[str, dict[str, float | None]]]] = []
        self._notes: list[tuple[float, str]] = []
        self._log, self._lock = PodLog(), threading.Lock()
        self._told: set[tuple[str, str]] = set()
        self._mirrors = {mirror.kind: mirror for mirror in self._make_mirrors(api)}
        self._panic: PanicWatch | None = None
        if service.mode == KNATIVE:
            self._panic = PanicWatch(api, service, self.note, autoscaler)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def _make_mirrors(self, api: Api) -> list[Mirror]:
        service = self.service
        # Positional, as all of the library's list methods take it.
        pods = partial(
            api.core.list_namespaced_pod, service.namespace, label_selector=f"{SERVICE_LABEL}={service.name}"
        )
        events = partial(api.core.list_namespaced_event, service.namespace, field_selector="involvedObject.kind=Pod")
        mirrors = [Mirror("pods", pods, self._on_pod, self.note), Mirror("events", events, self._on_event, self.note)]
        if service.mode == KNATIVE:
            names = ",".join(f"{service.name}-{component}" for component in COMPONENTS)
            custom = partial(
                api.custom.list_namespaced_custom_object, label_selector=f"{KNATIVE_SERVICE_LABEL} in ({names})"
            )
            kinds = {
                "podautoscalers": partial(custom, *AUTOSCALERS, service.namespace, "podautoscalers"),
                "serverlessservices": partial(custom, *NETWORKING, service.namespace, "serverlessservices"),
            }
        else:
            kinds = {
                "horizontalpodautoscalers": partial(
                    api.autoscaling.list_namespaced_horizontal_pod_autoscaler, service.namespace
                ),
                "deployments": partial(api.apps.list_namespaced_deployment, service.namespace),
            }
        return mirrors + [Mirror(kind, ask, on_note=self.note) for kind, ask in kinds.items()]

    def __enter__(self) -> Self:
        for part in (*self._mirrors.values(), self._panic):
            if part is not None:
                part.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        for part in (*self._mirrors.values(), self._panic):
            if part is not None:
                part.stop()

    def note(self, text: str) -> None:
        """Keeps `text` with the time at which it was said."""
        with self._lock:
            self._notes.append((time.monotonic(), text))
        self._say(text)

    @property
    def now(self) -> dict[str, dict[str, float | None]]:
        """The newest sample; empty before the first."""
        return self._samples[-1][1] if self._samples else {}

    def samples(self, origin: float) -> list[Sample]:
        """Returns all samples, in seconds from `origin` of the monotonic clock."""
        return [Sample(second=_since(origin, at), components=components) for at, components in list(self._samples)]

    def pods(self, origin: float) -> list[PodTimes]:
        """Returns what was seen of each pod, in seconds from `origin`."""
        with self._lock:
            return self._log.times(origin)

    def notes(self, origin: float) -> list[tuple[float, str]]:
        """Returns all notes, in seconds from `origin`."""
        with self._lock:
            return [(_since(origin, at), text) for at, text in self._notes]

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            self._sample()
            due += self._period_s
        self._sample()  # how it ended

    def _sample(self) -> None:
        pods = self._mirrors["pods"].objects
        at = time.monotonic()
        self._samples.append((at, {name: self._component(name, pods) for name in self.service.bounds}))

    def _component(self, name: str, pods: list[Object] | None) -> dict[str, float | None]:
        facts: dict[str, float | None] = dict.fromkeys(("ready", "pending", "terminating"))
        if pods is not None:
            states = [state(pod) for pod in pods if pod["metadata"].get("labels", {}).get(COMPONENT_LABEL) == name]
            facts = {key: float(states.count(key)) for key in ("ready", "pending", "terminating")}  # type: ignore[arg-type]
        full = f"{self.service.name}-{name}"
        if self._panic is not None:
            autoscalers, serverless = (self._objects(kind) for kind in ("podautoscalers", "serverlessservices"))
            is_panicking = self._panic.is_panicking(name)
            panicking = None if is_panicking is None else float(is_panicking)
            return {**facts, **knative_state(full, autoscalers, serverless), "panicking": panicking}
        hpas, deployments = (self._objects(kind) for kind in ("horizontalpodautoscalers", "deployments"))
        return {**facts, **standard_state(full, hpas, deployments)}

    def _objects(self, kind: str) -> list[Object]:
        return self._mirrors[kind].objects or []

    def _on_pod(self, pod: Object, at: float, is_news: bool, is_gone: bool) -> None:
        with self._lock:
            self._log.see(pod, at, is_news=is_news)
            if is_gone:
                self._log.lose(pod["metadata"]["name"], at)

    def _on_event(self, event: Object, at: float, is_news: bool, is_gone: bool) -> None:
        if is_gone:
            return
        with self._lock:
            self._log.see_event(event, at, is_news=is_news)
        name, reason = event["involvedObject"].get("name", ""), event.get("reason", "")
        is_own = any(name.startswith(f"{self.service.name}-{component}-") for component in self.service.bounds)
        # Once for each pod: the API counts up what repeats.
        if is_news and is_own and reason in _TELLING and (name, reason) not in self._told:
            self._told.add((name, reason))
            self.note(f"{name}: {reason}: {event.get('message', '')[:_SHOWN]}")


def _since(origin: float, at: float) -> float:
    return round(at - origin, 3) + 0.0  # no -0.0
