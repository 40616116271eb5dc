"""What happened when: replicas, what the autoscaler wants, and answers, once a second."""

from __future__ import annotations

import csv
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kubernetes.client.exceptions import ApiException

from .kube import Kube, is_ready
from .load import Load

COMPONENTS = ("transformer", "predictor")
COLUMNS = ["second", *(f"{c}_{what}" for c in COMPONENTS for what in ("ready", "pods", "wanted")), "answered", "note"]


class Timeline:
    """Samples one namespace's components from a ``with`` statement's begin to its end.

    Args:
        kube: The cluster.
        namespace: Of the InferenceService.
        mode: ``Knative`` or ``Standard``: whose autoscaler is asked what it wants.
    """

    def __init__(self, kube: Kube, namespace: str, mode: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.load: Load | None = None
        self._kube, self._namespace, self._mode = kube, namespace, mode
        self._notes: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def note(self, text: str) -> None:
        """Writes `text` beside the next sample."""
        self._notes.append(text)

    def most(self, column: str) -> int:
        """Returns the largest value of a column so far."""
        return max((int(row[column] or 0) for row in self.rows), default=0)

    def write(self, path: Path) -> None:
        """Writes all samples as CSV."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def changes(self) -> str:
        """Returns the samples in which something but the count of answers changed, as a table."""
        titles = [column.replace("transformer", "T").replace("predictor", "P") for column in COLUMNS]
        lines, last = ["  ".join(titles)], None
        for row in self.rows:
            state = [row[column] for column in COLUMNS[1:-2]]
            if state != last or row["note"]:
                cells = zip(titles, COLUMNS, strict=True)
                lines.append("  ".join(str(row[column]).ljust(len(title)) for title, column in cells))
            last = state
        return "\n".join(lines)

    def _run(self) -> None:
        while not self._stop.wait(max(0.0, self._began + len(self.rows) - time.monotonic())):
            self._sample()
        self._sample()  # how it ended

    def _sample(self) -> None:
        second = int(time.monotonic() - self._began)
        row: dict[str, Any] = {"second": second, "answered": self.load.answered if self.load else 0}
        try:
            for component in COMPONENTS:
                pods = self._kube.pods(self._namespace, component)
                row[f"{component}_pods"] = len(pods)
                row[f"{component}_ready"] = sum(map(is_ready, pods))
                row[f"{component}_wanted"] = self._wanted(component)
        except ApiException as error:
            self.note(f"the API said {error.status}")
        row["note"], self._notes = "; ".join(self._notes), []
        self.rows.append({column: row.get(column, "") for column in COLUMNS})

    def _wanted(self, component: str) -> int | str:
        """What the autoscaler of a component wants now: the newest revision's PodAutoscaler, or the HPA."""
        if self._mode == "Knative":
            found = self._kube.custom.list_namespaced_custom_object(
                "autoscaling.internal.knative.dev", "v1alpha1", self._namespace, "podautoscalers"
            )["items"]
            wanted = [
                int(item.get("status", {}).get("desiredScale", 0))
                for item in found
                if f"-{component}-" in item["metadata"]["name"]
            ]
            return sum(scale for scale in wanted if scale > 0) if wanted else ""
        for item in self._kube.autoscaling.list_namespaced_horizontal_pod_autoscaler(self._namespace).items:
            if item.metadata.name.endswith(component):
                return int(item.status.desired_replicas or 0)
        return ""
