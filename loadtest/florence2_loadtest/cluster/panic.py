"""When Knative's autoscaler panics. Only its log and its own metrics say so; the log is there on every cluster."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from kubernetes import watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from florence2_loadtest.cluster.api import CONNECT_S, READ_S, Api, explain, is_forbidden, read_json
from florence2_loadtest.cluster.service import Service

NAMESPACE = "knative-serving"
_SELECTOR = "app=autoscaler"
_EARLIER_LINES = 2000
_LOOK_S = 5.0  # for pods of the autoscaler that weren't there before
_QUIET_S = 600.0


def read_line(line: str) -> tuple[str, bool] | None:
    """Returns the revision, as ``namespace/name``, that a line of the log says to begin or end panicking."""
    if "anicking" not in line and "PANICKING" not in line:
        return None
    with suppress(ValueError, AttributeError):
        entry = json.loads(line)
        begins = {"PANICKING.": True, "Un-panicking.": False}.get(entry.get("message") or entry.get("msg"))
        if begins is not None and "knative.dev/key" in entry:
            return str(entry["knative.dev/key"]), begins
    return None


class PanicWatch:
    """Follows the autoscaler's log.

    Args:
        api: The cluster.
        service: The service.
        on_note: Called where the log can't be read.
        autoscaler: Namespace of the autoscaler.
        look_s: Time between looks for pods of the autoscaler.
    """

    def __init__(
        self,
        api: Api,
        service: Service,
        on_note: Callable[[str], None],
        autoscaler: str = NAMESPACE,
        look_s: float = _LOOK_S,
    ) -> None:
        self._look_s = look_s
        self._api, self._autoscaler, self._on_note = api, autoscaler, on_note
        self._since = service.created
        # A revision is named after its component and a number.
        prefix = re.escape(f"{service.namespace}/{service.name}")
        self._keys = {name: re.compile(rf"{prefix}-{re.escape(name)}-\d+") for name in service.bounds}
        self._panicking: dict[str, set[str]] = {name: set() for name in service.bounds}
        self._is_known = False
        self._said = ""
        self._followed: dict[str, watch.Watch] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="panic", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends; returns at once."""
        self._stopped.set()
        for current in list(self._followed.values()):
            current.stop()

    def is_panicking(self, component: str) -> bool | None:
        """Whether a component's autoscaler panics now; None where the log can't be read."""
        return bool(self._panicking[component]) if self._is_known else None

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                for pod in self._pods():
                    if pod not in self._followed:
                        for line in self._earlier(pod):
                            self._take(line)
                        self._followed[pod] = watch.Watch()
                        threading.Thread(target=self._follow, args=(pod,), daemon=True).start()
                self._is_known, self._said = True, ""
            except Exception as error:  # whatever it is: what was read last would seem to go on
                self._is_known = False
                self._complain(explain(error))
                if is_forbidden(error):
                    return
            self._stopped.wait(self._look_s)

    def _complain(self, why: str) -> None:
        if why != self._said:
            self._said = why
            self._on_note(f"whether the autoscaler panics isn't known: its log can't be read: {why}")

    def _pods(self) -> list[str]:
        pods = read_json(
            self._api.core.list_namespaced_pod(
                self._autoscaler,
                label_selector=_SELECTOR,
                _preload_content=False,
                _request_timeout=(CONNECT_S, READ_S),
            )
        )["items"]
        names = [pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") == "Running"]
        if not names:
            raise ValueError(f"no pod {_SELECTOR} runs in {self._autoscaler}")
        return names

    def _earlier(self, pod: str) -> Iterator[str]:
        # Not what was said of a service of the same name before.
        since = {} if self._since is None else {"since_seconds": max(1, math.ceil(time.time() - self._since))}
        answer = self._api.core.read_namespaced_pod_log(
            pod, self._autoscaler, tail_lines=_EARLIER_LINES, **since,
            _preload_content=False, _request_timeout=(CONNECT_S, READ_S),
        )  # fmt: skip
        if not 200 <= answer.status <= 299:
            raise ApiException(status=answer.status, reason=answer.reason)
        yield from answer.data.decode(errors="replace").splitlines()

    def _follow(self, pod: str) -> None:
        lines: Any = self._followed[pod].stream(
            self._api.core.read_namespaced_pod_log,
            pod,
            self._autoscaler,
            since_seconds=1,  # some lines twice rather than one never: they say a state
            _request_timeout=(CONNECT_S, _QUIET_S),
        )
        try:
            with suppress(ApiException, HTTPError, OSError):
                for line in lines:
                    if self._stopped.is_set():
                        return
                    self._take(line)
        finally:
            self._followed.pop(pod, None)  # it is looked for again, and with it what was missed

    def _take(self, line: str) -> None:
        if (said := read_line(line)) is None:
            return
        key, begins = said
        for component, pattern in self._keys.items():
            if pattern.fullmatch(key):
                (self._panicking[component].add if begins else self._panicking[component].discard)(key)
