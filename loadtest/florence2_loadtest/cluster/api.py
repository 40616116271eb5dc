"""The cluster's API: how to reach it, and mirrors of what is in it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

Object = Mapping[str, Any]
CONNECT_S, READ_S = 5.0, 15.0
WATCH_S = 60  # the API server ends a watch after it, and another one goes on
PAUSE_S = 1.0
_GONE = 410
_FORBIDDEN = (401, 403)
_IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ClusterError(Exception):
    """The cluster can't be asked, or hasn't got what is asked for.

    Attributes:
        is_forbidden: Whether it won't be allowed later either.
    """

    def __init__(self, message: str, *, is_forbidden: bool = False) -> None:
        super().__init__(message)
        self.is_forbidden = is_forbidden


@dataclass(frozen=True, slots=True)
class Api:
    """The parts of the API that are used, and the namespace that counts where none is named."""

    core: Any
    apps: Any
    autoscaling: Any
    custom: Any
    namespace: str

    @staticmethod
    def connect(kubeconfig: Path | None = None, context: str | None = None) -> Api:
        """Returns the API of a kubeconfig's cluster; in a pod, unless one is named, of the pod's own.

        Raises:
            ClusterError: If no cluster is configured.
        """
        settings = client.Configuration()
        namespace = "default"
        try:
            if kubeconfig is None and context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)
                namespace = _IN_POD.read_text().strip()
            else:
                file = None if kubeconfig is None else str(kubeconfig)
                config.load_kube_config(file, context=context, client_configuration=settings)
                contexts, active = config.list_kube_config_contexts(file)
                chosen = next((entry for entry in contexts if entry["name"] == context), active)
                namespace = chosen["context"].get("namespace", namespace)
        except (config.ConfigException, OSError) as error:
            raise ClusterError(f"no cluster to ask: {error}") from None
        settings.connection_pool_maxsize = 16  # each watch keeps a connection
        return Api.of(client.ApiClient(settings), namespace)

    @staticmethod
    def of(api: Any, namespace: str = "default") -> Api:
        """Returns the API behind a client of the library `kubernetes`."""
        return Api(
            client.CoreV1Api(api), client.AppsV1Api(api), client.AutoscalingV2Api(api), client.CustomObjectsApi(api),
            namespace,
        )  # fmt: skip


def explain(error: Exception) -> str:
    """Returns an error of the API in a line."""
    if isinstance(error, ApiException):
        return f"the API said {error.status} {error.reason}"
    return f"{type(error).__name__}: {error}"


def is_forbidden(error: Exception) -> bool:
    """Returns whether an error says that something isn't allowed: asking again is of no use."""
    return isinstance(error, ApiException) and error.status in _FORBIDDEN


def read_json(response: Any) -> Any:
    """Returns what the API answered, as it is, to a call without ``_preload_content``.

    Raises:
        ApiException: If it refused.
    """
    if not 200 <= response.status <= 299:
        raise ApiException(status=response.status, reason=response.reason)
    return json.loads(response.data)


class Mirror:
    """Keeps a copy of all objects of one kind: a list, then a watch, again and again.

    Args:
        kind: What they are, for notes.
        ask: Lists them; takes the keyword arguments of the library's list methods.
        on_object: Called with each object that is there or changes, when, whether it is news rather than
            found, and whether it is gone.
        on_note: Called with what goes wrong, once for each new thing.
    """

    def __init__(
        self,
        kind: str,
        ask: Callable[..., Any],
        on_object: Callable[[Object, float, bool, bool], None] = lambda *_: None,
        on_note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.kind = kind
        self._ask, self._on_object, self._on_note = ask, on_object, on_note
        self._objects: dict[str, Object] = {}
        self._is_known = False
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._watch: watch.Watch | None = None
        self._said = ""
        self._thread = threading.Thread(target=self._run, name=f"mirror of {kind}", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends; returns at once."""
        self._stopped.set()
        if (current := self._watch) is not None:
            current.stop()

    @property
    def objects(self) -> list[Object] | None:
        """All objects; None while they aren't known."""
        with self._lock:
            return list(self._objects.values()) if self._is_known else None

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                version = self._list()
                while not self._stopped.is_set():
                    version = self._follow(version)
            except Exception as error:  # whatever it is: a mirror that ended would seem to know
                if self._stopped.is_set():
                    return
                if not (isinstance(error, ApiException) and error.status == _GONE):  # that only asks for a new list
                    self._fail(explain(error))
                    self._stopped.wait(PAUSE_S)

    def _fail(self, why: str) -> None:
        with self._lock:
            self._is_known = False
        if why != self._said:
            self._said = why
            self._on_note(f"{self.kind}: {why}")

    def _list(self) -> str:
        answer = read_json(self._ask(_preload_content=False, _request_timeout=(CONNECT_S, READ_S)))
        at = time.monotonic()
        with self._lock:
            before, self._objects = self._objects, {item["metadata"]["name"]: item for item in answer["items"]}
            gone = [item for name, item in before.items() if name not in self._objects]
            self._is_known = True
        for item in answer["items"]:
            self._on_object(item, at, False, False)
        for item in gone:
            self._on_object(item, at, False, True)
        self._said = ""
        return str(answer["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> str:
        self._watch = watch.Watch(return_type="object")
        news = self._watch.stream(
            self._ask,
            resource_version=version,
            timeout_seconds=WATCH_S,
            _request_timeout=(CONNECT_S, WATCH_S + READ_S),
        )
        for event in news:
            if self._stopped.is_set():
                break
            item, is_gone = event["raw_object"], event["type"] == "DELETED"
            at = time.monotonic()
            with self._lock:
                if is_gone:
                    self._objects.pop(item["metadata"]["name"], None)
                else:
                    self._objects[item["metadata"]["name"]] = item
            self._on_object(item, at, True, is_gone)
        return str(self._watch.resource_version)
