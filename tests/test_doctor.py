from __future__ import annotations

import io
import json
import os
import resource
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from florence2_kserve import doctor, model_files
from florence2_kserve.cli import app
from florence2_kserve.doctor import Finding, Level
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.local import free_port

BASE_PYTHON = Path(__file__).parents[1] / ".venv-base" / "bin" / "python"


def examine(*arguments: str, python: Path | str = sys.executable, limit: int | None = None, **variables: str):
    """Runs the doctor as a program, in an environment with `variables`."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    return subprocess.run(
        [str(python), "-m", "florence2_kserve.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **variables},
        preexec_fn=restrict,
        cwd=Path(__file__).parents[1],
    )


def levels(findings: list[Finding]) -> list[Level]:
    return [finding.level for finding in findings]


def test_a_good_machine_and_its_spoilt_twin(tmp_path):
    """The same machine twice; of the second, all that variables and limits can spoil is spoilt."""
    settings = {"FLORENCE2_HTTP_PORT": str(free_port()), "FLORENCE2_GRPC_PORT": str(free_port())}
    good = examine("--json", HF_HOME=str(tmp_path), no_proxy="*", **settings)
    assert good.returncode == ExitCode.OK, good.stdout
    findings = json.loads(good.stdout)
    assert {finding["name"] for finding in findings} >= {"Python", "packages", "model", "ports", "GPU", "hub cache"}
    assert all(finding["mend"] is None for finding in findings if finding["level"] == "ok")
    assert all(finding["mend"] for finding in findings if finding["level"] != "ok")

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "file"
        file.write_text("no folder")
        bad = examine(
            limit=256,
            HF_HOME=str(file),
            FLORENCE2_HTTP_PORT=str(port),
            FLORENCE2_GRPC_PORT=settings["FLORENCE2_GRPC_PORT"],
            STORAGE_URI="s3://bucket/model",
            http_proxy="http://proxy.example.com:3128",
            no_proxy="",
            NO_PROXY="",
            HF_HUB_OFFLINE="1",
        )
    assert bad.returncode == ExitCode.FAILED
    lines = bad.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines)
    assert "\x1b" not in bad.stdout

    def line(name: str) -> str:
        (found,) = [
            each for each in lines if each.split(maxsplit=1)[1].startswith(f"{name}:") and "ok" not in each[:4]
        ]
        return found

    assert line("open files").startswith("warn  open files: 256 at once")
    assert line("open files").endswith("→ ulimit -n 4096")
    assert "can't be written" in line("hub cache")
    assert "export HF_HOME" in line("hub cache")
    assert "s3://bucket/model" in line("model")
    assert line("model").startswith("fail")
    assert str(port) in line("ports")
    assert "florence2 serve --http-port" in line("ports")
    assert "proxy.example.com" in line("proxies")
    assert "export no_proxy=localhost,127.0.0.1" in line("proxies")


def test_settings_that_dont_hold_together_are_named(monkeypatch):
    monkeypatch.setenv("FLORENCE2_MAX_NUM_BEAMS", "99")
    (finding,) = doctor.check_model()
    assert finding.line().startswith("fail  settings: FLORENCE2_MAX_NUM_BEAMS: ")
    assert "→ unset FLORENCE2_MAX_NUM_BEAMS" in finding.line()


@pytest.mark.parametrize(
    ("model", "uri", "is_blamed"),
    [
        (None, "s3://bucket/model", True),
        ("embedded", "s3://bucket/model", False),
        ("/nowhere", None, False),
        (None, None, False),
    ],
)
def test_the_storage_initializer_is_blamed_only_for_what_it_should_have_brought(monkeypatch, model, uri, is_blamed):
    for name, value in {"FLORENCE2_MODEL": model, "STORAGE_URI": uri}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    def broken(model: str, **options: object) -> None:
        raise model_files.ModelFilesError(f"{model}: the files are damaged")

    monkeypatch.setattr(model_files, "locate_model", broken)
    (finding,) = doctor.check_model()
    assert finding.level is Level.FAIL
    assert "the files are damaged" in finding.told
    assert ("STORAGE_URI=s3://bucket/model should have brought it" in finding.told) == is_blamed


@pytest.mark.skipif(not BASE_PYTHON.exists(), reason="make setup makes it")
def test_the_base_install_is_well_and_lacks_its_extras():
    result = examine("--json", python=BASE_PYTHON)
    assert result.returncode == ExitCode.OK, result.stdout
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert "absent" in findings["extra [predictor]"]["told"]
    assert "pip install 'florence2-kserve[predictor]'" in findings["extra [predictor]"]["told"]
    assert "torch" in findings["extra [predictor]"]["told"]
    assert "GPU" not in findings


def test_every_extra_has_its_purpose():
    extras = set(metadata.metadata(doctor.PACKAGE).get_all("Provides-Extra") or [])
    assert set(doctor.PURPOSES) == extras - {"dev"}


def test_a_package_that_is_missing_or_too_old_is_named_with_what_mends_it(monkeypatch):
    versions = {"typer": "0.1.0"}
    of_others = metadata.version

    def version(name: str) -> str:
        if name == "orjson":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or of_others(name)

    monkeypatch.setattr(metadata, "version", version)
    findings = list(doctor.check_packages())
    assert levels(findings) == [Level.FAIL, Level.FAIL]
    assert {finding.mend for finding in findings} == {"pip install 'orjson>=3.11'", "pip install 'typer>=0.16'"}
    assert any("orjson isn't installed" in finding.told for finding in findings)
    assert any("typer 0.1.0 isn't >=0.16" in finding.told for finding in findings)


def test_an_extra_of_a_wrong_version_is_named(monkeypatch):
    of_others = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "transformers" else of_others(name))
    (finding,) = [finding for finding in doctor.check_extras() if finding.level is not Level.OK]
    assert finding.line() == (
        "warn  extra [predictor]: transformers 1.0 isn't >=5.0 → pip install 'florence2-kserve[predictor]'"
    )


def test_a_broken_check_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken() -> list[Finding]:
        raise PermissionError("/proc is locked")

    monkeypatch.setattr(doctor, "check_open_files", broken)
    for slow in ("check_torch", "check_java"):
        monkeypatch.setattr(doctor, slow, list)
    findings = list(doctor.look(None, "florence2", {}))
    (finding,) = [finding for finding in findings if finding.name == "open files"]
    assert (finding.level, "PermissionError" in finding.told) == (Level.FAIL, True)
    assert findings[-1].name != "open files"


# --- pods ------------------------------------------------------------------------------------------------------------

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def pod(root: Path, **files: str) -> list[Finding]:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(doctor.check_pod(POD, root))


def test_outside_a_pod_nothing_is_said(tmp_path):
    assert not list(doctor.check_pod({}, tmp_path))


def test_a_pod_with_enough(tmp_path):
    files = {
        "proc__self__cgroup": "0::/\n",
        "sys__fs__cgroup__memory_dot_max": f"{4 * doctor.GIB}\n",
        "sys__fs__cgroup__cpu_dot_max": "200000 100000\n",
    }
    findings = pod(tmp_path, **files)
    assert levels(findings) == [Level.OK] * 3
    assert "4.0 GiB" in findings[1].told
    assert findings[2].told == "2 CPUs"


def test_a_pod_with_too_little(tmp_path):
    files = {
        "proc__self__cgroup": "0::/../../as/the/node/sees/it\n",
        "sys__fs__cgroup__memory_dot_max": f"{doctor.GIB // 4}\n",
        "sys__fs__cgroup__cpu_dot_max": "25000 100000\n",
    }
    findings = pod(tmp_path, **files)
    assert levels(findings) == [Level.OK, Level.WARN, Level.WARN]
    assert "0.25 GiB" in findings[1].told
    assert "0.25 CPUs" in findings[2].told
    assert all("resources.limits" in str(finding.mend) for finding in findings[1:])


@pytest.mark.parametrize("old", [False, True])
def test_a_pod_without_limits(tmp_path, old):
    files = (
        {
            "proc__self__cgroup": "1:cpu:/\n2:memory:/\n",
            "sys__fs__cgroup__memory__memory_dot_limit_in_bytes": "9223372036854771712\n",
            "sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us": "-1\n",
            "sys__fs__cgroup__cpu__cpu_dot_cfs_period_us": "100000\n",
        }
        if old
        else {
            "proc__self__cgroup": "0::/\n",
            "sys__fs__cgroup__memory_dot_max": "max\n",
            "sys__fs__cgroup__cpu_dot_max": "max 100000\n",
        }
    )
    findings = pod(tmp_path, **files)
    assert levels(findings) == [Level.OK] * 3
    assert "without a limit" in findings[1].told
    assert "without a limit" in findings[2].told


# --- services --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_service_that_is_well(service, scheme):
    url = service.rest_url if scheme == "http" else f"grpc://{service.grpc_url}"
    findings = list(doctor.check_service(url, "florence2", {}))
    assert levels(findings) == [Level.OK] * 4
    assert "florence2_embedded" in findings[1].told
    assert "a pink square" in findings[3].told


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8080", "url has to start with"),
        ("http://[::1", "Invalid port"),
        (f"http://127.0.0.1:{free_port()}", "doesn't answer"),
    ],
)
def test_a_service_that_cant_be_reached(url, says):
    (finding,) = doctor.check_service(url, "florence2", {})
    assert finding.level is Level.FAIL
    assert says in finding.told
    assert finding.mend


def test_a_service_without_that_model(service):
    findings = list(doctor.check_service(service.rest_url, "other", {}))
    assert levels(findings) == [Level.OK, Level.FAIL]
    assert "florence2" in findings[1].told
    assert "--model-name" in str(findings[1].mend)


def test_a_failed_service_is_the_exit_code():
    result = CliRunner().invoke(app, ["doctor", "--json", "--url", f"http://127.0.0.1:{free_port()}"])
    assert result.exit_code == ExitCode.FAILED
    assert json.load(io.StringIO(result.stdout))[-1]["level"] == "fail"
