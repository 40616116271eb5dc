"""Recommended settings as values of the real chart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from florence2_kserve.settings import Settings
from florence2_loadtest.results import SweepResult, Trial
from florence2_loadtest.sweep.values import chart_values, values_file
from tests.chart import toolbox
from tests.chart.conftest import one
from tests.chart.schemas import CHART
from tests.chart.settings_schema import OWNED_BY_THE_CHART
from tests.loadtest.sweep.trials import level

Containers = dict[str, dict[str, str]]
RenderFile = Callable[[str], Containers]


@pytest.fixture
def render_file(tmp_path: Path) -> RenderFile:
    """Renders the chart with a values file as users do; gives the environment of both components' containers."""
    if not toolbox.is_built():
        pytest.skip("the chart's tools aren't built: make chart-tools")

    def render(text: str) -> Containers:
        file = tmp_path / "values.yaml"
        file.write_text(text)
        done = toolbox.run("helm", "template", "florence2", ".", "-f", file, "--set", "mode=Knative")
        assert done.returncode == 0, done.stderr
        spec = one(list(yaml.safe_load_all(done.stdout)), "InferenceService")["spec"]
        return {
            part: {
                **{variable["name"]: variable.get("value", "") for variable in container["env"]},
                "containerConcurrency": str(spec[part].get("containerConcurrency")),
            }
            for part in ("transformer", "predictor")
            for container in [(spec[part].get("containers") or [spec[part].get("model")])[0]]
        }

    return render


def result(settings: dict[str, Any], **fields: Any) -> SweepResult:
    trials = [
        Trial.model_validate(
            {"number": 0, "settings": {}, "levels": [level(10, 1.25)], "score": 10, "admissible": True}
        ),
        Trial.model_validate({"number": 1, "settings": settings, "levels": [level(12.5, 0.75)], "score": 12.5}),
        Trial.model_validate({"number": 2, "settings": {"max_batch_size": 3}, "state": "failed", "error": "no"}),
    ]
    given = {"name": "night", "target": "both", "objective": "throughput", "trials": trials, "best": 1, **fields}
    return SweepResult.model_validate({"scenario": {"name": "night"}, "space": {}, **given})


def test_helm_takes_the_file_and_both_components_get_what_was_measured(render_file: RenderFile) -> None:
    settings = {
        "max_batch_size": 96,
        "vision_batch_size": 2,
        "max_asyncio_workers": 3,
        "exact_images": True,
        "feature_cache_mib": 0.5,
        "decode_capture": "compile",
        "max_new_tokens": 256,
        "grace_period": 30,
        "env.OMP_NUM_THREADS": "2",
    }
    components = render_file(values_file(result(settings)))
    predictor, transformer = components["predictor"], components["transformer"]
    assert predictor["FLORENCE2_MAX_BATCH_SIZE"] == "96"
    assert predictor["FLORENCE2_VISION_BATCH_SIZE"] == "2"
    assert predictor["FLORENCE2_FEATURE_CACHE_MIB"] == "0.5"
    assert predictor["FLORENCE2_DECODE_CAPTURE"] == "compile"
    assert predictor["containerConcurrency"] == "96"
    assert transformer["FLORENCE2_EXACT_IMAGES"] == "true"
    for component in (predictor, transformer):
        assert component["FLORENCE2_MAX_ASYNCIO_WORKERS"] == "3"
        assert component["FLORENCE2_MAX_NEW_TOKENS"] == "256"
        assert component["FLORENCE2_GRACE_PERIOD"] == "30"
        assert component["OMP_NUM_THREADS"] == "2"


def test_a_small_queue_takes_knatives_limit_along(render_file: RenderFile) -> None:
    components = render_file(values_file(result({"max_batch_size": 6, "max_queue_size": 40})))
    assert components["predictor"]["containerConcurrency"] == "46"


def test_defaults_that_are_best_make_a_file_that_changes_nothing(render_file: RenderFile) -> None:
    text = values_file(result({"max_batch_size": 36, "max_decode_rows": None, "dtype": "float32"}))
    assert yaml.safe_load(text) == {}
    assert render_file(text) == render_file("")


def test_the_head_says_what_was_measured_where_and_how_much_better_it_is() -> None:
    text = values_file(result({"max_batch_size": 12}, constraint="p95<2s"), "The defaults differ by 3 %.")
    head = "".join(line.removeprefix("# ") + " " for line in text.splitlines() if line.startswith("#"))
    for part in (
        "Scenario night, both halves, model embedded",
        "Objective throughput with p95<2s: the best of 3 configurations, of which 1 failed",
        "These values: 12.5/s, p95 750 ms at 4",
        "The defaults: 10.0/s, p95 1.25 s at 4",
        "The defaults differ by 3 %.",
        "processors: another machine may want others",
    ):
        assert part in " ".join(head.split())
    assert yaml.safe_load(text) == {"predictor": {"settings": {"max_batch_size": 12}}}


def test_nothing_recommended_makes_no_file() -> None:
    with pytest.raises(ValueError, match="no configuration"):
        values_file(result({}, best=None))


def test_halves_get_their_own_settings_only() -> None:
    assert chart_values({"max_asyncio_workers": 3, "env.A": 1, "max_rows": 16}, "transformer") == {
        "transformer": {"settings": {"max_asyncio_workers": 3}, "extraEnv": [{"name": "A", "value": "1"}]},
        "predictor": {"settings": {"max_rows": 16}},
    }
    assert chart_values({"max_threads": 2, "env.A": 1}, "predictor") == {
        "predictor": {"settings": {"max_threads": 2}, "extraEnv": [{"name": "A", "value": "1"}]},
    }


def test_a_gpu_is_the_charts_to_ask_for_and_the_model_stays_the_users() -> None:
    settings = {"device": "cuda:0", "model": "/models/large", "model_revision": None, "dtype": "float16"}
    assert chart_values(settings, "both") == {
        "predictor": {"gpu": {"enabled": True}, "settings": {"dtype": "float16"}}
    }
    for name in {"workers": 2, "enable_grpc": False}:
        assert name in OWNED_BY_THE_CHART


def test_the_charts_own_settings_are_the_packages_defaults_so_that_leaving_them_out_is_right() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for part in ("transformer", "predictor"):
        for name, value in values[part]["settings"].items():
            assert value == Settings.model_fields[name].default, (part, name)
    assert values["predictor"]["containerConcurrency"] == 64
