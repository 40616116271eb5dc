"""What the chart makes, and what KServe makes of that, against the schemas of KServe, Knative, KEDA and Kubernetes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from tests.chart import manifests, toolbox
from tests.chart.conftest import EVERYTHING, Render, one
from tests.chart.schemas import LOCATION

CASES = {
    **{case.name: ("", *case.values) for case in manifests.CASES},
    "values-cpu": ("", "values-cpu.yaml"),
    "everything, Standard": (EVERYTHING["Standard"],),
    "everything, Knative": (EVERYTHING["Knative"],),
    "Ingress": ("ingress: {enabled: true, type: ingress, host: florence2.example.com, tlsSecret: tls}",),
}
# Fields of a component that are KServe's own; the rest is a PodSpec.
EXTENSIONS = {
    "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "autoScaling", "timeout", "containerConcurrency",
    "deploymentStrategy", "labels", "annotations",
}  # fmt: skip


def _judge(*objects: dict[str, Any]) -> list[str]:
    """Returns what is wrong with each of the objects by kubeconform; "" where nothing is."""
    done = toolbox.run(
        "kubeconform", "-strict", "-verbose", "-output=json", "-n=1",  # one worker keeps the order
        f"-schema-location={toolbox.SCHEMAS}/{LOCATION}",
        stdin="\n---\n".join(json.dumps(item) for item in objects),
    )  # fmt: skip
    results = json.loads(done.stdout)["resources"]
    assert [result["kind"] for result in results] == [item["kind"] for item in objects], done.stderr
    return ["" if result["status"] == "statusValid" else result["msg"] or result["status"] for result in results]


def test_everything_rendered_is_valid(render: Render) -> None:
    objects = [item for case in CASES.values() for item in render(*case)]
    assert [wrong for wrong in _judge(*objects) if wrong] == []


def test_everything_is_rendered_somewhere(render: Render) -> None:
    kinds = {item["kind"] for case in CASES.values() for item in render(*case)}
    assert kinds == {
        "InferenceService", "ServiceAccount", "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor",
        "HTTPRoute", "Ingress", "DomainMapping", "Pod", "Job", "ConfigMap", "Role", "RoleBinding",
    }  # fmt: skip


def _rename(old: str, new: str, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def rename(item: dict[str, Any]) -> None:
        for step in path:
            item = item[step]
        item[new] = item.pop(old)

    return rename


MISSPELT = [
    ("InferenceService", _rename("minReplicas", "minReplica", "spec", "transformer")),
    ("InferenceService", _rename("readinessProbe", "readynessProbe", "spec", "predictor", "containers", 0)),
    ("InferenceService", _rename("port", "prot", "spec", "predictor", "containers", 0, "startupProbe", "httpGet")),
    ("InferenceService", _rename("external", "extern", "spec", "predictor", "autoScaling", "metrics", 0)),
    ("ServiceAccount", _rename("automountServiceAccountToken", "automountToken")),
    ("NetworkPolicy", _rename("podSelector", "podSelect", "spec")),
    ("PodMonitor", _rename("podMetricsEndpoints", "endpoints", "spec")),
    ("HTTPRoute", _rename("hostnames", "hosts", "spec")),
    ("Service", _rename("clusterIP", "clusterIp", "spec")),
]


def test_a_misspelt_field_is_found(render: Render) -> None:
    objects = []
    for kind, misspell in MISSPELT:
        item = copy.deepcopy(next(item for item in render(EVERYTHING["Standard"]) if item["kind"] == kind))
        misspell(item)
        objects.append(item)
    for wrong in _judge(*objects):
        assert "additional properties" in wrong or "missing propert" in wrong, wrong


def test_knative_takes_what_kserve_makes_of_components(render: Render) -> None:
    services = [
        _knative_service(render(*CASES[case]), part)
        for case in ("knative-cpu", "knative-gpu", "everything, Knative")
        for part in ("transformer", "predictor")
    ]
    # Knative's schema is what says so: it knows no lifecycle, which Standard mode has.
    refused = copy.deepcopy(services[0])
    refused["spec"]["template"]["spec"]["containers"][0]["lifecycle"] = {"preStop": {"sleep": {"seconds": 1}}}
    *taken, wrong = _judge(*services, refused)
    assert taken == [""] * len(services)
    assert "'lifecycle' not allowed" in wrong


def test_keda_takes_what_kserve_makes_of_a_component(render: Render) -> None:
    assert _judge(_scaled_object(render(EVERYTHING["Standard"]))) == [""]


def _knative_service(objects: list[dict[str, Any]], part: str) -> dict[str, Any]:
    """Returns the Knative Service of a component, as KServe's ksvc_reconciler.go makes it."""
    item = one(objects, "InferenceService")
    component = item["spec"][part]
    annotations = {**item["metadata"]["annotations"], **component["annotations"]}
    annotations |= {
        "autoscaling.knative.dev/min-scale": str(component["minReplicas"]),
        "autoscaling.knative.dev/target": str(component["scaleTarget"]),
        "autoscaling.knative.dev/metric": component["scaleMetric"],
    }
    on_service = {key: annotations.pop(key) for key in ["serving.knative.dev/rollout-duration"] if key in annotations}
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": f"{item['metadata']['name']}-{part}", "annotations": on_service},
        "spec": {
            "template": {
                "metadata": {"annotations": annotations, "labels": item["metadata"]["labels"]},
                "spec": {
                    "timeoutSeconds": component["timeout"],
                    "responseStartTimeoutSeconds": component["timeout"],
                    "containerConcurrency": component["containerConcurrency"],
                    **{key: value for key, value in component.items() if key not in EXTENSIONS},
                },
            },
            "traffic": [{"latestRevision": True, "percent": 100}],
        },
    }


def _scaled_object(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the ScaledObject of the predictor, as KServe's keda_reconciler.go makes it."""
    item = one(objects, "InferenceService")
    component = item["spec"]["predictor"]
    external = component["autoScaling"]["metrics"][0]["external"]
    authentication = external["authenticationRef"]
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": f"{item['metadata']['name']}-predictor"},
        "spec": {
            "scaleTargetRef": {"name": f"{item['metadata']['name']}-predictor"},
            "minReplicaCount": component["minReplicas"],
            "maxReplicaCount": component["maxReplicas"],
            "triggers": [
                {
                    "type": external["metric"]["backend"],
                    "metadata": {
                        "serverAddress": external["metric"]["serverAddress"],
                        "query": external["metric"]["query"],
                        "threshold": external["target"]["value"],
                        "authModes": authentication["authModes"],
                    },
                    "authenticationRef": authentication["authenticationRef"],
                }
            ],
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": component["autoScaling"]["behavior"]}},
        },
    }
