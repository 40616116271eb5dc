"""JSON schemas of what the chart makes, for kubeconform: out of the CRDs and the API description of the upstreams.

The upstreams come as Go modules, pinned in tools/schemas/go.mod. All schemas are strict: a field that isn't in them is
an error, as it is for ``kubectl apply``.

``python -m tests.chart.schemas FOLDER`` writes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "charts" / "florence2-kserve"
MODULES = HERE / "tools" / "schemas"
GO = HERE.parent / "tools" / "go"

# CustomResourceDefinitions, by module: those of the chart, and those that KServe makes out of it.
CRDS = {
    "github.com/kserve/kserve": ["config/crd/full/serving.kserve.io_inferenceservices.yaml"],
    "knative.dev/serving": [
        "config/core/300-resources/service.yaml",
        "config/core/300-resources/domain-mapping.yaml",
    ],
    "github.com/kedacore/keda/v2": ["config/crd/bases/keda.sh_scaledobjects.yaml"],
    "github.com/prometheus-operator/prometheus-operator": [
        "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"
    ],
    "sigs.k8s.io/gateway-api": ["config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"],
}
KUBERNETES = "k8s.io/kubernetes"
KUBERNETES_API = "api/openapi-spec/swagger.json"

# Where kubeconform looks for them.
LOCATION = "{{ .ResourceKind }}-{{ .Group }}-{{ .ResourceAPIVersion }}.json"

_INT_OR_STRING = {"type": ["integer", "string"]}
_NUMBER_OR_STRING = {"type": ["number", "string"]}


def write_schemas(folder: Path) -> None:
    """Writes one file for each kind into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = _download()
    for module, files in CRDS.items():
        for file in files:
            for name, schema in _of_crds(modules[module] / file):
                (folder / name).write_text(json.dumps(schema))
    for name, schema in _of_kubernetes(modules[KUBERNETES] / KUBERNETES_API):
        (folder / name).write_text(json.dumps(schema))


def _download() -> dict[str, Path]:
    """Fetches the modules and returns where each one is."""
    environment = {**os.environ, "GOFLAGS": "-mod=mod"}
    pinned = subprocess.run(
        [GO, "mod", "edit", "-json"], cwd=MODULES, env=environment, check=True, capture_output=True, text=True
    ).stdout
    wanted = [f"{module['Path']}@{module['Version']}" for module in json.loads(pinned)["Require"]]
    fetched = subprocess.run(
        [GO, "mod", "download", "-json", *wanted],
        cwd=MODULES,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    modules = {}
    decoder = json.JSONDecoder()
    while fetched := fetched.lstrip():
        module, end = decoder.raw_decode(fetched)
        modules[module["Path"]] = Path(module["Dir"])
        fetched = fetched[end:]
    return modules


def _of_crds(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for crd in yaml.load_all(file, Loader=yaml.CSafeLoader):
            spec = crd["spec"]
            for version in spec["versions"]:
                name = _file_name(spec["names"]["kind"], spec["group"], version["name"])
                yield name, _strict(version["schema"]["openAPIV3Schema"])


def _of_kubernetes(path: Path) -> Iterator[tuple[str, Any]]:
    definitions = json.loads(path.read_text(encoding="utf-8"))["definitions"]
    strict = {name: _strict(definition) for name, definition in definitions.items()}
    # Where the API description says string, but YAML may write a number.
    strict["io.k8s.apimachinery.pkg.api.resource.Quantity"] = _NUMBER_OR_STRING
    for name, definition in definitions.items():
        for kind in definition.get("x-kubernetes-group-version-kind", []):
            if name.startswith("io.k8s.api.") and not kind["kind"].endswith("List"):
                reached = _reached(name, strict)
                schema = {"$ref": f"#/definitions/{name}", "definitions": {key: strict[key] for key in reached}}
                yield _file_name(kind["kind"], kind["group"], kind["version"]), schema


def _reached(start: str, definitions: dict[str, Any]) -> set[str]:
    """Returns the definitions that `start` needs, itself included."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(_references(definitions[name]))
    return reached


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _strict(schema: Any, at_schema: bool = True) -> Any:
    """Returns a schema that refuses unknown fields and understands Kubernetes' own extensions.

    Args:
        schema: A schema, or a part of one.
        at_schema: Whether `schema` is one itself, rather than the map of properties of one.
    """
    if isinstance(schema, list):
        return [_strict(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if not at_schema:
        return {name: _strict(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        # A quantity, where it has a pattern: numbers with fractions too.
        return _NUMBER_OR_STRING if "pattern" in schema else _INT_OR_STRING
    # Descriptions make up most of a CRD.
    strict = {
        key: _strict(value, at_schema=key != "properties") for key, value in schema.items() if key != "description"
    }
    if "properties" in strict and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        strict["type"] = [schema["type"], "null"]
    return strict


def _file_name(kind: str, group: str, version: str) -> str:
    # kubeconform takes the version of the core group for its group.
    return f"{kind.lower()}-{group or version}-{version}.json"


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
