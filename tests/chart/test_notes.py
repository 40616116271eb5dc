"""The commands that ``helm install`` prints, pasted into a shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from florence2_kserve.local import LocalService
from tests.chart import toolbox
from tests.chart.schemas import CHART

HOST = "florence2-vision.example.com"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("mode", ["Standard", "Knative"])
def test_the_curl_gets_an_answer(mode: str, tmp_path: Path, service: LocalService) -> None:
    pasted = re.search(r"^URL=.*?^curl.*?\}'$", _notes(mode, tmp_path), re.MULTILINE | re.DOTALL)
    assert pasted
    # kubectl alone is a stand-in: it tells the host, as the InferenceService's status does.
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\necho http://{HOST}\n")
    kubectl.chmod(0o755)
    done = subprocess.run(
        ["sh", "-eu", "-c", pasted.group()],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "INGRESS": service.rest_url.partition("://")[2]},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (output,) = json.loads(done.stdout)["outputs"]
    assert json.loads(output["data"][0]) == {"<CAPTION>": "a red circle and a blue square"}


def _notes(mode: str, folder: Path) -> str:
    """Returns NOTES.txt as rendered, which ``helm template`` leaves out: as the text of an object of its own."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    notes = chart / "templates" / "NOTES.txt"
    (chart / "templates" / "_notes.tpl").write_text('{{ define "notes" }}' + notes.read_text() + "{{ end }}")
    (chart / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | toJson }}')
    done = toolbox.run(
        "helm", "template", "florence2", chart, "--namespace", "vision", "--set", f"mode={mode}",
        "--show-only", "templates/notes.yaml",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout.partition("notes: ")[2]))
