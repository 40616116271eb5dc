"""A server that answers as a cluster's API does, as far as `florence2_loadtest.cluster` asks: lists, watches, logs."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from kubernetes import client

from florence2_loadtest.cluster.api import Api

from .cluster_objects import NAME, NAMESPACE, Object

_CORE = f"/api/v1/namespaces/{NAMESPACE}"
AUTOSCALER = "/api/v1/namespaces/knative-serving/pods"
LOG = f"{AUTOSCALER}/autoscaler-0/log"
KINDS = {
    "pods": f"{_CORE}/pods",
    "events": f"{_CORE}/events",
    "podautoscalers": f"/apis/autoscaling.internal.knative.dev/v1alpha1/namespaces/{NAMESPACE}/podautoscalers",
    "serverlessservices": f"/apis/networking.internal.knative.dev/v1alpha1/namespaces/{NAMESPACE}/serverlessservices",
    "horizontalpodautoscalers": f"/apis/autoscaling/v2/namespaces/{NAMESPACE}/horizontalpodautoscalers",
    "deployments": f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments",
}
SERVICE = f"/apis/serving.kserve.io/v1beta1/namespaces/{NAMESPACE}/inferenceservices/{NAME}"
_KINDS = {path: kind for kind, path in KINDS.items()}


class ClusterApi:
    """The server, on loopback, from a ``with`` statement's begin to its end.

    Attributes:
        refusals: HTTP status by path, of what it refuses from now on.
        asked: Path and query of each request.
    """

    def __init__(self) -> None:
        self.refusals: dict[str, int] = {}
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self._changes: list[tuple[str, str, Object]] = []  # kind, what happened, object
        self._service: Object | None = None
        self._log: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.break_watches()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def connect(self) -> Api:
        """Returns the API as the package sees it."""
        settings = client.Configuration(host=self.url)
        settings.retries = False
        return Api.of(client.ApiClient(settings), NAMESPACE)

    def kubeconfig(self) -> dict[str, Any]:
        """Returns what a kubeconfig of it holds."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": NAMESPACE}}],
            "current-context": "fake",
        }

    def serve(self, service: Object) -> None:
        """Sets the InferenceService."""
        self._service = service

    def put(self, kind: str, *objects: Object) -> None:
        """Makes objects, or changes those that there are."""
        self._happen([(kind, "MODIFIED" if self._has(kind, item) else "ADDED", item) for item in objects])

    def delete(self, kind: str, *objects: Object) -> None:
        """Removes objects."""
        self._happen([(kind, "DELETED", item) for item in objects])

    def say(self, line: str) -> None:
        """Writes a line into the log of Knative's autoscaler."""
        with self._changed:
            self._log.append(line)
            self._changed.notify_all()

    def break_watches(self) -> None:
        """Ends all connections that watch."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def mend_watches(self) -> None:
        """Lets connections watch again."""
        self._ended = False

    def _happen(self, changes: list[tuple[str, str, Object]]) -> None:
        with self._changed:
            self._changes += changes
            self._changed.notify_all()

    def _objects(self, kind: str) -> list[Object]:
        there: dict[str, Object] = {}
        for of, what, item in list(self._changes):
            if of == kind:
                there.pop(item["metadata"]["name"], None)
                if what != "DELETED":
                    there[item["metadata"]["name"]] = item
        return list(there.values())

    def _has(self, kind: str, item: Object) -> bool:
        return any(other["metadata"]["name"] == item["metadata"]["name"] for other in self._objects(kind))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = parse_qs(parts.query)
                api.asked.append((parts.path, query))
                if (refused := api.refusals.get(parts.path)) is not None:
                    self._answer({"kind": "Status", "code": refused}, refused)
                elif parts.path == SERVICE and api._service is not None:
                    self._answer(api._service)
                elif parts.path == AUTOSCALER:
                    self._answer({"items": [{"metadata": {"name": "autoscaler-0"}, "status": {"phase": "Running"}}]})
                elif parts.path == LOG:
                    self._log("follow" in query)
                elif parts.path not in _KINDS:
                    self._answer({"kind": "Status", "code": 404}, 404)
                elif query.get("watch") == ["true"]:
                    self._watch(_KINDS[parts.path], int(query["resourceVersion"][0]))
                else:
                    version = str(len(api._changes))
                    self._answer({"metadata": {"resourceVersion": version}, "items": api._objects(_KINDS[parts.path])})

            def _answer(self, content: Object, status: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _stream(self, source: list[Any], since: int) -> Any:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while not api._ended:
                    with api._changed:
                        news = source[since:]
                        if not news:
                            api._changed.wait(0.1)
                    yield from news
                    since += len(news)
                self.wfile.write(b"0\r\n\r\n")

            def _send_line(self, line: str) -> None:
                data = line.encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

            def _watch(self, kind: str, since: int) -> None:
                for index, (of, what, item) in enumerate(self._stream(api._changes, since), since + 1):
                    if of == kind:
                        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(index)}}
                        self._send_line(json.dumps({"type": what, "object": item}))

            def _log(self, follow: bool) -> None:
                for line in self._stream(api._log, len(api._log)) if follow else ():
                    self._send_line(line)
                if not follow:
                    body = "".join(f"{line}\n" for line in api._log).encode()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # who watched has gone
                    self.close_connection = True

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        return Handler
