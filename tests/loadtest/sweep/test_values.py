"""Recommended settings as values of the real chart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from florence2_kserve.settings import Settings
from florence2_loadtest.results import SweepResult, Trial
from florence2_loadtest.servers import FIELDS, OWN_FIELDS
from florence2_loadtest.sweep.space import NOT_SEARCHED
from florence2_loadtest.sweep.values import chart_values, values_file
from tests.chart import toolbox
from tests.chart.conftest import one
from tests.chart.schemas import CHART
from tests.chart.settings_schema import OWNED_BY_THE_CHART
from tests.loadtest.sweep.trials import level

Containers = dict[str, dict[str, str]]
RenderFile = Callable[..., Containers]


@pytest.fixture
def render_file(tmp_path: Path) -> RenderFile:
    """Renders the chart with a values file as users do; gives the environment of both components' containers."""
    if not toolbox.is_built():
        pytest.skip("the chart's tools aren't built: make chart-tools")

    def render(text: str, *profiles: str) -> Containers:
        file = tmp_path / "values.yaml"
        file.write_text(text)
        files = [argument for profile in (*profiles, file) for argument in ("-f", profile)]
        done = toolbox.run("helm", "template", "florence2", ".", *files, "--set", "mode=Knative")
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
        Trial.model_validate(
            {"number": 1, "settings": settings, "levels": [level(12.5, 0.75)], "score": 12.5, "admissible": True}
        ),
        Trial.model_validate({"number": 2, "settings": {"max_batch_size": 3}, "state": "failed", "error": "no"}),
    ]
    given = {"name": "night", "target": "both", "objective": "throughput", "trials": trials, "best": 1, **fields}
    return SweepResult.model_validate(
        {"scenario": {"name": "night"}, "space": {name: [] for name in settings}, **given}
    )


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


@pytest.mark.parametrize("profile", ["values-cpu.yaml", "values-gpu.yaml"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_size": 36},  # the chart's default, and not values-cpu.yaml's
        {"max_batch_size": 6, "dtype": "float32"},  # the package's default, and not values-gpu.yaml's
        {"max_queue_size": 256},
        {"max_rows": 64},
        {"vision_batch_size": 1, "max_asyncio_workers": 2, "exact_images": False, "device": "cpu"},
    ],
)
def test_beside_a_profile_a_pod_gets_what_was_measured(
    settings: dict[str, Any], profile: str, render_file: RenderFile
) -> None:
    components = render_file(values_file(result(settings)), profile)
    for part, names in FIELDS.items():
        for name in settings.keys() & names if part != "both" else ():
            given = components[part].get(f"FLORENCE2_{name.upper()}")
            assert str(given).lower() == str(settings[name]).lower(), (part, name)
    if settings.keys() & {"max_batch_size", "max_queue_size", "max_rows"}:
        # What a profile has of them would be neither what was measured nor what belongs to the others.
        assert components["predictor"]["FLORENCE2_MAX_BATCH_SIZE"] == str(settings.get("max_batch_size", 36))
        assert components["predictor"]["FLORENCE2_MAX_QUEUE_SIZE"] == "256"
        assert components["predictor"]["containerConcurrency"] == "64"


def test_what_is_to_be_unset_is_taken_out_of_what_other_files_set(render_file: RenderFile, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("predictor: {settings: {max_decode_rows: 8}}\n")
    assert render_file("", str(profile))["predictor"]["FLORENCE2_MAX_DECODE_ROWS"] == "8"
    text = values_file(result({"max_decode_rows": None}))
    assert "FLORENCE2_MAX_DECODE_ROWS" not in render_file(text, str(profile))["predictor"]


def test_whatever_can_be_unset_the_chart_lets_be_unset(render_file: RenderFile) -> None:
    own = {*OWNED_BY_THE_CHART, *NOT_SEARCHED, *OWN_FIELDS}
    names = [name for name, field in Settings.model_fields.items() if field.default is None and name not in own]
    assert "max_decode_rows" in names
    components = render_file(values_file(result(dict.fromkeys(names))))
    assert not any(value in ("null", "None", "<nil>") for given in components.values() for value in given.values())


def test_recommended_defaults_make_a_file_that_changes_nothing_and_says_so(render_file: RenderFile) -> None:
    space = {"max_batch_size": [3, 12], "max_decode_rows": [None, 8]}
    text = values_file(result({"max_batch_size": 12}, best=0, space=space))
    assert yaml.safe_load(text) == {}
    assert render_file(text) == render_file("")
    head = _head_of(text)
    assert "The defaults are recommended" in head
    assert "none of what was searched is set here: max_batch_size 36, max_decode_rows unset" in head


def test_secrets_are_left_out_and_lists_of_variables_warned_of() -> None:
    text = values_file(result({"env.HF_TOKEN": "***", "env.OMP_NUM_THREADS": "2"}))
    variables = [{"name": "OMP_NUM_THREADS", "value": "2"}]
    assert yaml.safe_load(text) == {"transformer": {"extraEnv": variables}, "predictor": {"extraEnv": variables}}
    assert "HF_TOKEN is a secret, by its name, and isn't here" in _head_of(text)
    assert "extraEnv takes the place of a list that other values files have" in _head_of(text)
    alone = values_file(result({"env.HF_TOKEN": "***"}))
    assert yaml.safe_load(alone) == {}
    assert "takes the place" not in _head_of(alone)


def test_figures_that_never_settled_are_said() -> None:
    made = result({"max_batch_size": 12})
    assert "never settled" not in _head_of(values_file(made))
    made.trials[1].levels[0].stable = False
    assert "levels that never settled" in _head_of(values_file(made))


def _head_of(text: str) -> str:
    head = "".join(line.removeprefix("# ") + " " for line in text.splitlines() if line.startswith("#"))
    return " ".join(head.split())


def test_the_head_says_what_was_measured_where_and_how_much_better_it_is() -> None:
    text = values_file(result({"max_batch_size": 12}, constraint="p95<2s"), "The defaults differ by 3 %.")
    for part in (
        "Scenario night, both halves, model embedded",
        "Objective throughput with p95<2s: of 3 configurations 1 failed",
        "These values: 12.5/s, p95 750 ms at 4",
        "The defaults: 10.0/s, p95 1.25 s at 4",
        "The defaults differ by 3 %.",
        "processors: another machine may want others",
    ):
        assert part in _head_of(text)
    assert yaml.safe_load(text) == {
        "predictor": {
            "containerConcurrency": 64,
            "settings": {"max_batch_size": 12, "max_queue_size": 256, "max_rows": 32},
        }
    }


def test_nothing_recommended_makes_no_file() -> None:
    with pytest.raises(ValueError, match="no configuration"):
        values_file(result({}, best=None))


def test_halves_get_their_own_settings_only() -> None:
    assert chart_values({"max_asyncio_workers": 3, "env.A": 1, "max_rows": 16}, "transformer") == {
        "transformer": {
            "settings": {"max_asyncio_workers": 3, "max_rows": 16},
            "extraEnv": [{"name": "A", "value": "1"}],
        },
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


def test_the_charts_own_settings_are_the_packages_defaults_so_that_an_empty_file_means_them() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for part in ("transformer", "predictor"):
        for name, value in values[part]["settings"].items():
            assert value == Settings.model_fields[name].default, (part, name)
    assert values["predictor"]["containerConcurrency"] == 64
