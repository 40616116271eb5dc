"""docs/deploy.md: its helm commands render, and the values it names are the chart's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.chart import toolbox
from tests.chart.schemas import CHART

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text()
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
COMMANDS = re.findall(r"^helm (?:install|upgrade) florence2 (?:.*\\\n)*.*$", TEXT, re.MULTILINE)
GPU_ROWS = re.findall(r"^\| ([^|]+) \| `((?:nodeSelector|resourceName)[^|]*)` *[,;|]", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_helm_commands_render(command: str) -> None:
    words = command.replace("\\\n", " ").replace("$REGISTRY", "registry.example.com/ml").split()
    paths = [str(ROOT / word) if word.startswith("charts/") else word for word in words[2:]]
    done = toolbox.run("helm", "template", *paths)
    assert done.returncode == 0, done.stderr
    assert "registry.example.com/ml/florence2-predictor" in done.stdout


def test_there_are_commands_and_rows() -> None:
    assert len(COMMANDS) >= 2
    assert len(GPU_ROWS) >= 5


@pytest.mark.parametrize(("where", "values"), GPU_ROWS, ids=[where for where, _ in GPU_ROWS])
def test_gpu_examples_render(where: str, values: str) -> None:
    gpu = {"enabled": True}
    for part in re.findall(r"(\w+: (?:\{.*?\}|\[.*?\]|[^`,]+))(?:`|$)", values):
        gpu |= yaml.safe_load(part)
    assert len(gpu) > 1, values
    done = toolbox.run(
        "helm", "template", "florence2", CHART, "-f", "-", stdin=yaml.safe_dump({"predictor": {"gpu": gpu}})
    )
    assert done.returncode == 0, f"{where}: {done.stderr}"


@pytest.mark.parametrize(
    "name",
    sorted({name for name in re.findall(r"`([A-Za-z]+\.[A-Za-z.]+)`", TEXT) if name.partition(".")[0] in VALUES}),
)
def test_values_named_are_the_charts(name: str) -> None:
    values = VALUES
    for part in name.split("."):
        assert part in values, name
        values = values[part]
