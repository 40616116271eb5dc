"""``florence2 loadtest autoscale`` on the cluster: from outside and as the chart's Job, in both modes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from florence2_loadtest.results import AutoscaleResult, read_result

from .common import assert_gone
from .conftest import OUTPUT
from .images import push
from .kube import Cluster, Kube
from .release import CHART, COMPONENTS, ROOT, Release

LONGEST_S = 600.0
KNATIVE: dict[str, Any] = {
    "transformer": {"autoscaling": {"minReplicas": 0, "maxReplicas": 3, "kpa": {"target": 2, "window": "10s"}}},
    "predictor": {"autoscaling": {"minReplicas": 0, "maxReplicas": 2, "kpa": {"target": 4, "window": "10s"}}},
}
BY_CPU: dict[str, Any] = {
    "transformer": {
        "autoscaling": {
            "class": "hpa", "minReplicas": 1, "maxReplicas": 3, "hpa": {"targetCPUUtilizationPercentage": 50},
        },
        "resources": {"requests": {"cpu": "100m"}},  # an idle one takes 4m
    },
    "predictor": {"autoscaling": {"class": "none", "minReplicas": 1, "maxReplicas": 1}},
}  # fmt: skip
# Pictures as phones take them: to decode and to shrink them is what costs a transformer its CPU time.
LARGE = {
    "name": "large-pictures",
    "pictures": {"scenes": 2, "width": 3072, "height": 3072},
    "load": {"schedule": "steps:1/s,5s;5/s,45s"},
    "timeout_s": 120,
    "retries": 8,
}


@pytest.fixture(scope="module")
def knative(kube: Kube, images: dict[str, dict[str, str]]) -> Iterator[Release]:
    """The chart in Knative mode; both components scale to zero."""
    yield from _installed(kube, images, "Knative", KNATIVE)


@pytest.fixture(scope="module")
def standard(kube: Kube, images: dict[str, dict[str, str]]) -> Iterator[Release]:
    """The chart in Standard mode; transformers scale by CPU."""
    yield from _installed(kube, images, "Standard", BY_CPU)


def test_knative_zero_to_many_and_back(knative: Release) -> None:
    result = _autoscale(
        knative, "knative", "--schedule", "steps:2/s,15s;8/s,6s;2/s,9s",
        "--expect", "first_answer<120s", "--expect", "held>=1", "--expect", "panics>=1",
        "--expect-replicas", "transformer>=2", "--expect-replicas", "predictor>=2",
        "--expect", "enough<120s", "--expect", "gone<180s",
    )  # fmt: skip
    assert result.deployment_mode == "Knative"
    assert result.level.answered == result.level.planned == 96
    found = result.findings
    assert found["from_zero"] == list(COMPONENTS)
    for name in COMPONENTS:
        parts = found["first_answer_parts"][name]
        assert list(parts) == ["created", "scheduled", "pulled", "started", "loaded", "ready"]
        assert list(parts.values()) == sorted(parts.values())
        assert parts["ready"] <= found["first_answer_s"]
        created = [pod for pod in result.pods if pod.component == name and pod.created_s > -1]
        assert len(created) == found[name]["pods_created"] >= 2
        assert all(pod.gone_s is not None for pod in created)
        assert found[name]["activator_s"] > 0, "targetBurstCapacity -1 keeps it in the path"
    # Samples begin before the load, and go on to the end without a gap.
    assert result.samples[0].second < 0
    assert len(result.samples) > 30
    assert all(sample.components[name]["ready"] is not None for sample in result.samples[2:] for name in COMPONENTS)
    _assert_nothing_went_wrong(result)


def test_the_chart_s_job_watches_the_same(knative: Release, kube: Kube, cluster: Cluster) -> None:
    """Inside the cluster, with no rights but to look; the service is as the test before left it."""
    values = {
        "loadtest": {
            "enabled": True,
            "image": push(cluster, "tools"),
            "autoscalerLog": {"read": True},
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
            "extraArgs": [
                "--schedule=steps:2/s,8s;6/s,4s", "--wait-after=0", "--expect=first_answer<120s", "--expect=panics>=1",
                "--expect-replicas=transformer>=1", "--expect-replicas=predictor>=1",
            ],
        }
    }  # fmt: skip
    kube.helm(
        "upgrade", knative.name, str(CHART), "-n", knative.namespace, "--reuse-values", "-f", "-",
        stdin=json.dumps(values),
    )  # fmt: skip
    (job,) = kube.leftovers(knative.namespace, ["jobs"])

    def ended() -> dict[str, Any] | None:
        status = json.loads(kube.kubectl("get", job, "-n", knative.namespace, "-o", "json")).get("status", {})
        return status if status.get("succeeded") or status.get("failed") else None

    status = kube.wait("the end of the Job", LONGEST_S, ended, knative.namespace)
    log = kube.kubectl("logs", job, "-n", knative.namespace)
    print(log)
    assert status.get("succeeded") == 1
    assert "result.json: all as expected" in log
    assert "from_zero" in log
    assert "transformer, predictor" in log
    assert "the API said" not in log, "its Role allows all that it asks"
    knative.uninstall()
    assert_gone(knative)
    assert not [name for name in kube.leftovers("knative-serving", ["roles", "rolebindings"]) if "loadtest" in name]


def test_standard_scales_by_cpu_and_back(standard: Release, tmp_path: Path) -> None:
    (tmp_path / "scenario.yaml").write_text(yaml.safe_dump(LARGE))
    result = _autoscale(
        standard, "standard", "--scenario", str(tmp_path / "scenario.yaml"),
        "--expect-replicas", "transformer>=2", "--expect", "gone<300s", "--wait-after", "300",
    )  # fmt: skip
    assert result.deployment_mode == "Standard"
    assert result.level.answered == result.level.planned == 230
    found = result.findings
    assert found["from_zero"] == []
    assert found["transformer"]["most_desired"] >= 2
    assert found["predictor"]["most_ready"] == found["predictor"]["most_desired"] == 1
    assert (found["panics"], found["held"]) == (None, None), "Knative's alone"
    assert found["transformer"]["back_s"] <= found["transformer"]["gone_s"]
    _assert_nothing_went_wrong(result)


def _installed(kube: Kube, images: dict[str, dict[str, str]], mode: str, values: dict[str, Any]) -> Iterator[Release]:
    namespace = f"f2-autoscale-{mode.lower()}"
    kube.remove_namespace(namespace)
    release = Release(kube, namespace, mode, images)
    release.apply(values)
    yield release
    kube.remove_namespace(namespace)


def _autoscale(release: Release, name: str, *arguments: str) -> AutoscaleResult:
    """Runs the command as its users do, through the ingress, and returns what it wrote; fails if it isn't content."""
    cluster, folder = release.kube.cluster, OUTPUT / f"autoscale-{name}"
    command = [
        str(Path(sys.executable).with_name("florence2")), "loadtest", "autoscale", release.name,
        "--namespace", release.namespace, "--kubeconfig", str(cluster.kubeconfig),
        "--url", cluster.ingress, "--host-header", "--output", str(folder), *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=LONGEST_S, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:] + release.kube.describe(release.namespace)
    assert {path.name for path in folder.iterdir()} >= {"result.json", "samples.csv", "records.jsonl", "timeline.png"}
    result = read_result(folder / "result.json")
    assert isinstance(result, AutoscaleResult)
    return result


def _assert_nothing_went_wrong(result: AutoscaleResult) -> None:
    assert result.problems == []
    assert result.findings["failures"] == 0
    assert not [text for _, text in result.notes if "the API said" in text or "isn't known" in text], result.notes
    assert {row["status"] for row in result.statuses_per_second} == {"ok"}
