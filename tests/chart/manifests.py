"""The folders in manifests/: the chart, rendered for named cases, as kustomizations.

``python -m tests.chart.manifests`` writes them; with ``--check`` it says whether they are up to date.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.chart import toolbox
from tests.chart.schemas import CHART

MANIFESTS = CHART.parents[1] / "manifests"
NAMESPACE = RELEASE = "florence2"
_HEADER = "# Rendered from charts/florence2-kserve by `make manifests`: change the chart, not this.\n"


@dataclass(frozen=True, slots=True)
class Case:
    """A case: the values files that it is rendered with, in their order."""

    name: str
    values: tuple[str, ...]


CASES = (
    Case("standard-cpu", ("ci/standard-cpu-values.yaml",)),
    Case("knative-cpu", ("ci/knative-cpu-values.yaml",)),
    Case("knative-cpu-loadtest", ("ci/knative-cpu-values.yaml", "ci/knative-cpu-loadtest-values.yaml")),
    Case("standard-hpa-gpu", ("values-gpu.yaml", "ci/standard-hpa-gpu-values.yaml")),
    Case("standard-keda-gpu", ("values-gpu.yaml", "ci/standard-keda-gpu-values.yaml")),
    Case("knative-gpu", ("values-gpu.yaml", "ci/knative-gpu-values.yaml")),
)


def render() -> dict[Path, str]:
    """Returns the contents of all files, by their path in manifests/.

    Raises:
        RuntimeError: If helm fails.
    """
    files = {}
    for case in CASES:
        folder = Path(case.name)
        resources = _template(case)
        images = sorted(image for document in yaml.safe_load_all(resources) for image in _images(document))
        files[folder / "namespace.yaml"] = _HEADER + _NAMESPACE
        files[folder / "florence2.yaml"] = _HEADER + resources
        files[folder / "kustomization.yaml"] = _HEADER + _about(case) + _kustomization(images)
    return files


def _images(document: dict[str, Any]) -> list[str]:
    """Returns the images of an InferenceService's components, or of a Job."""
    specs = {
        "InferenceService": lambda spec: [spec["transformer"], spec["predictor"]],
        "Job": lambda spec: [spec["template"]["spec"]],
    }
    pods = specs[document["kind"]](document["spec"]) if document["kind"] in specs else []
    return [pod["containers"][0]["image"] for pod in pods]


def _template(case: Case) -> str:
    arguments = [argument for file in case.values for argument in ("-f", file)]
    done = toolbox.run("helm", "template", RELEASE, ".", "--namespace", NAMESPACE, "--no-hooks", *arguments)
    if done.returncode:
        raise RuntimeError(f"helm template of {case.name} failed: {done.stderr}")
    # Nothing here is Helm's to manage.
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if "helm.sh/chart:" not in line and "managed-by: Helm" not in line)


def _about(case: Case) -> str:
    """Returns the comment that the case's own values file begins with."""
    lines = (CHART / case.values[-1]).read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("# "))


def _kustomization(images: list[str]) -> str:
    entries = "".join(
        f"  - name: {name}\n    newTag: {tag}\n" for name, _, tag in (image.rpartition(":") for image in images)
    )
    return f"""apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: {NAMESPACE}
resources:
  - namespace.yaml
  - florence2.yaml
# newName: where your registry has it
images:
{entries}"""


_NAMESPACE = f"""apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""


def write() -> None:
    """Writes all files and removes what no case makes any more."""
    wanted = {MANIFESTS / path: text for path, text in render().items()}
    for path in _present() - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def differences() -> list[str]:
    """Returns the files that are missing, too many or not what the chart renders."""
    wanted = {MANIFESTS / path: text for path, text in render().items()}
    stale = {path for path, text in wanted.items() if not path.is_file() or path.read_text() != text}
    return sorted(str(path.relative_to(MANIFESTS.parent)) for path in stale | (_present() - wanted.keys()))


def _present() -> set[Path]:
    return {path for path in MANIFESTS.glob("*/*") if path.is_file()}


if __name__ == "__main__":
    if "--check" in sys.argv:
        if stale := differences():
            sys.exit(f"not what the chart renders, run `make manifests`: {', '.join(stale)}")
    else:
        write()
