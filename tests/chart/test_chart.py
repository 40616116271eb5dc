"""The chart as its tools see it: lint, unit tests, documentation, manifests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from florence2_kserve import __version__
from florence2_kserve.settings import ENV_PREFIX, Settings
from tests.chart import manifests, readme, toolbox
from tests.chart.conftest import Render, one
from tests.chart.schemas import CHART
from tests.chart.settings_schema import FIELDS, OWNED_BY_THE_CHART, SCHEMA, settings_schema

PROFILES = [(), ("values-gpu.yaml",), ("values-cpu.yaml",), *(case.values for case in manifests.CASES)]


@pytest.mark.parametrize("files", PROFILES, ids=lambda files: "+".join(files) or "defaults")
def test_lint_finds_nothing(files: tuple[str, ...]) -> None:
    done = toolbox.run("helm", "lint", "--strict", ".", *(argument for file in files for argument in ("-f", file)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


def test_unit_suites_pass() -> None:
    done = toolbox.run("helm-unittest", "--strict", ".")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_every_template_has_a_suite_and_makes_one_thing() -> None:
    templates = [path for path in (CHART / "templates").rglob("*") if path.is_file() and not path.name.startswith("_")]
    tested = {
        name
        for suite in (CHART / "tests").glob("*_test.yaml")
        for name in yaml.safe_load(suite.read_text())["templates"]
    }
    assert {str(path.relative_to(CHART / "templates")) for path in templates} == tested
    for path in templates:
        assert len(re.findall(r"^kind: ", path.read_text(), re.MULTILINE)) == (path.suffix == ".yaml"), path


def test_unit_tests_say_what_should_be_when() -> None:
    for suite in (CHART / "tests").glob("*_test.yaml"):
        for test in yaml.safe_load(suite.read_text())["tests"]:
            assert re.match(r"should .+ when .+", test["it"]), (suite.name, test["it"])


def test_the_chart_is_of_the_package_s_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


class TestReadme:
    def test_is_what_helm_docs_makes(self) -> None:
        assert readme.README.read_text() == readme.render(), "run `make chart-docs`"

    def test_describes_every_value(self) -> None:
        rows = re.findall(r"^\| ([\w.]+) \| .* \| (.*) \|$", readme.README.read_text(), re.MULTILINE)
        assert len(rows) > 100
        assert [key for key, description in rows if not description.strip()] == []


class TestSchema:
    @pytest.mark.parametrize("part", FIELDS)
    def test_takes_settings_from_the_package(self, part: str) -> None:
        written = json.loads(SCHEMA.read_text())["definitions"][f"{part}Settings"]
        assert written == settings_schema(part), "run `make chart-docs`"

    def test_what_the_chart_owns_are_settings(self) -> None:
        assert set(OWNED_BY_THE_CHART) <= Settings.model_fields.keys()

    def test_refuses_unknown_keys_everywhere(self) -> None:
        open_ones = [
            path for path, schema in _objects(json.loads(SCHEMA.read_text())) if "additionalProperties" not in schema
        ]
        # Kubernetes' own objects, which kubeconform and the API server check.
        assert open_ones == [
            "/properties/global",
            "/definitions/kubernetesObject",
            "/definitions/kubernetesList/items",
        ]

    @pytest.mark.parametrize("part", FIELDS)
    def test_knows_every_default(self, part: str) -> None:
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        schema = json.loads(SCHEMA.read_text())["properties"]
        assert values.keys() | {"global"} == schema.keys()
        assert values[part].keys() == schema[part]["properties"].keys()


def _objects(node: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Returns the schemas of objects in a schema, by their path."""
    found = []
    if isinstance(node, dict):
        if node.get("type") in ("object", ["object", "null"]):
            found.append((path, node))
        for key, value in node.items():
            found += _objects(value, f"{path}/{key}")
    return found


class TestSettings:
    """What the pods' variables mean to the package."""

    @pytest.mark.parametrize("part", FIELDS)
    def test_arrive(self, render: Render, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
        values = {
            part: {
                "timeoutSeconds": 120,
                "settings": {
                    "grpc_max_receive_message_length": 134217728,
                    "max_body_mib": 0.5,
                    "enable_latency_logging": True,
                    "log_config_file": "/etc/log.yaml",
                },
            },
            "model": {"source": "hub", "hubId": "example/Florence-2", "revision": "v1"},
        }
        settings = _settings(render(json.dumps(values)), part, monkeypatch)
        assert settings.grpc_max_receive_message_length == 134217728
        assert settings.max_body_mib == 0.5
        assert settings.enable_latency_logging is True
        assert settings.log_config_file == "/etc/log.yaml"
        assert settings.request_timeout_seconds == 120
        assert (settings.model, settings.model_revision) == ("example/Florence-2", "v1")

    @pytest.mark.parametrize(("files", "device"), [((), "cpu"), (("values-gpu.yaml",), "cuda")])
    def test_never_leave_the_device_to_chance(
        self, render: Render, files: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert _settings(render("", *files), "predictor", monkeypatch).device == device

    @pytest.mark.parametrize("files", PROFILES, ids=lambda files: "+".join(files) or "defaults")
    @pytest.mark.parametrize("part", FIELDS)
    def test_of_every_profile_are_taken_by_their_command(
        self, render: Render, files: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = [name for name in _variables(render("", *files), part) if name.startswith(ENV_PREFIX)]
        assert {name.removeprefix(ENV_PREFIX).lower() for name in names} <= set(FIELDS[part])
        _settings(render("", *files), part, monkeypatch)


def _variables(objects: list[dict[str, Any]], part: str) -> dict[str, str]:
    container = one(objects, "InferenceService")["spec"][part]["containers"][0]
    return {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}


def _settings(objects: list[dict[str, Any]], part: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in _variables(objects, part).items():
        monkeypatch.setenv(name, value)
    return Settings()


def _texts(value: Any) -> Iterator[str]:
    """Yields all strings in what YAML gives."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


class TestManifests:
    def test_are_what_the_chart_renders(self) -> None:
        assert manifests.differences() == [], "run `make manifests`"

    @pytest.mark.parametrize("case", manifests.CASES, ids=lambda case: case.name)
    def test_take_images_and_namespace_from_a_kustomization(self, case: manifests.Case, tmp_path: Path) -> None:
        # Beside the case, since kustomize wants relative paths.
        base = Path("..") / "base"
        (tmp_path / "base").symlink_to(manifests.MANIFESTS / case.name)
        (tmp_path / "overlay").mkdir()
        overlay = {
            "namespace": "other",
            "resources": [str(base)],
            "images": [
                {"name": f"florence2-{part}", "newName": f"registry.example.com/{part}", "newTag": "v7"}
                for part in FIELDS
            ],
        }
        (tmp_path / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        done = toolbox.run("kustomize", "build", tmp_path / "overlay", "--load-restrictor", "LoadRestrictionsNone")
        assert done.returncode == 0, done.stderr
        objects = list(yaml.safe_load_all(done.stdout))
        service = one(objects, "InferenceService")
        assert service["metadata"]["namespace"] == "other"
        assert not [text for text in _texts(service["spec"]) if "namespace=" in text], "the old one, out of reach"
        for part in FIELDS:
            assert service["spec"][part]["containers"][0]["image"] == f"registry.example.com/{part}:v7"
