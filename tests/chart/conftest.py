"""What tests of the chart share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.chart import toolbox

Render = Callable[..., list[dict[str, Any]]]

# Every optional object, and values that reach every part of the templates.
EVERYTHING = {
    "Standard": """
model: {source: storage, storageUri: s3://models/whole, processorUri: s3://models/processor}
serviceAccount: {secrets: [s3]}
imagePullSecrets: [{name: registry}]
ingress: {enabled: true, host: florence2.example.com, gateway: {name: public}}
networkPolicy: {enabled: true, egress: {enabled: true}}
podMonitor: {enabled: true}
loadtest: {enabled: true, scenario: "load: {schedule: 'constant:1/s,5s'}", nodeSelector: {load: "yes"}}
transformer:
  priorityClassName: high
  topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway}]
  extraEnvFrom: [{secretRef: {name: more}}]
predictor:
  gpu:
    enabled: true
    nodeSelector: {gpu: "yes"}
    tolerations: [{key: gpu, operator: Exists}]
    runtimeClassName: nvidia
  autoscaling:
    class: keda
    keda:
      serverAddress: http://prometheus:9090
      authenticationRef: prometheus
      authModes: bearer
      scaleDownStabilizationWindowSeconds: 300
""",
    "Knative": """
mode: Knative
model: {source: hub, hubId: example/Florence-2, tokenSecret: {name: hub}}
knative: {rolloutDuration: 2m, podSecurityContext: true}
ingress: {enabled: true, host: florence2.example.com, tlsSecret: tls}
networkPolicy: {enabled: true, egress: {enabled: true}}
podMonitor: {enabled: true}
loadtest: {enabled: true, autoscalerLog: {read: true}, results: {existingClaim: results}}
transformer:
  protocol: grpc
  autoscaling: {minReplicas: 0, kpa: {window: 10s, targetUtilizationPercentage: 80, activationScale: 2}}
predictor:
  gpu:
    enabled: true
    nodeSelector: {gpu: "yes"}
    tolerations: [{key: gpu, operator: Exists}]
    runtimeClassName: nvidia
  cache: {existingClaim: downloads}
""",
}


@pytest.fixture(scope="session", autouse=True)
def _tools() -> None:
    if not toolbox.is_built():
        pytest.skip("the chart's tools aren't built: make chart-tools")


@pytest.fixture(scope="session")
def render() -> Render:
    """Renders the chart: values as YAML, values files as further arguments; gives its objects."""

    def render(values: str = "", *files: str) -> list[dict[str, Any]]:
        return list(yaml.safe_load_all(template(values, *files)))

    return render


@functools.cache
def template(values: str = "", *files: str) -> str:
    """Returns what ``helm template`` prints.

    Args:
        values: YAML, over the files.
        files: Values files in the chart's folder.
    """
    arguments = [argument for file in files for argument in ("-f", file)]
    done = toolbox.run(
        "helm", "template", "florence2", ".", "--namespace", "vision", *arguments, "-f", "-", stdin=values
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Returns the only object of a kind."""
    (found,) = [item for item in objects if item["kind"] == kind]
    return found
