"""A configuration as values of the Helm chart."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from florence2_kserve.settings import Settings
from florence2_loadtest import formats
from florence2_loadtest.results import SweepResult, Trial
from florence2_loadtest.servers import FIELDS, VARIABLE, Half

# The chart has values of its own for them, or sets them to what the package's default isn't.
_NOT_AMONG_SETTINGS = frozenset({"model", "model_revision", "model_name", "device"})
_DERIVED = frozenset({"grace_period", "request_timeout_seconds", "predictor_request_timeout_seconds"})
# Bounds that the chart hands on from the predictor's settings to the transformer.
_SHARED = frozenset({"max_rows", "max_num_beams", "max_new_tokens"})
_HALVES: tuple[Half, ...] = ("transformer", "predictor")
_CONTAINER_CONCURRENCY = 64  # the chart's default
_WIDTH = 110


def chart_values(settings: Mapping[str, Any], target: Half) -> dict[str, Any]:
    """Returns settings as the chart's values; what equals its defaults is left out.

    Args:
        settings: By name, variables as ``env.NAME``.
        target: Whose settings they are.
    """
    values = {half: _half(settings, half, target) for half in _HALVES}
    return {half: of_half for half, of_half in values.items() if of_half}


def values_file(result: SweepResult, noise: str | None = None) -> str:
    """Returns the recommended configuration as a values file that says in its head what was measured.

    Args:
        result: Of the sweep.
        noise: What is known of how much figures vary by themselves.

    Raises:
        ValueError: If the sweep recommends nothing.
    """
    best = next((trial for trial in result.trials if trial.number == result.best), None)
    if best is None:
        raise ValueError("no configuration is to be recommended")
    lines = _head(result, best, noise)
    values = chart_values(best.settings, result.target)
    body = yaml.safe_dump(values, sort_keys=False) if values else "{}  # the chart's defaults\n"
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + body


def figures(trial: Trial) -> str:
    """Returns what was measured of a configuration, level by level, in words."""
    return "; ".join(
        f"{formats.rate(level.throughput)}, p95 {formats.seconds(level.latency.p95_s)}"
        + ("" if level.concurrency is None else f" at {level.concurrency}")
        + (f", {level.failed + level.unsent} failed" if level.failed + level.unsent else "")
        for level in trial.levels
    )


def _half(settings: Mapping[str, Any], half: Half, target: Half) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if half == "predictor":
        if str(settings.get("device", "")).startswith("cuda"):
            values["gpu"] = {"enabled": True}
        if (concurrency := _container_concurrency(settings)) != _CONTAINER_CONCURRENCY:
            values["containerConcurrency"] = concurrency
    if named := {name: value for name, value in settings.items() if _is_written(name, value, half, target)}:
        values["settings"] = named
    variables = {name.removeprefix(VARIABLE): value for name, value in settings.items() if name.startswith(VARIABLE)}
    if variables and target in ("both", half):
        values["extraEnv"] = [{"name": name, "value": str(value)} for name, value in variables.items()]
    return values


def _is_written(name: str, value: Any, half: Half, target: Half) -> bool:
    """Whether a setting belongs among those of `half`, and says what the chart doesn't say by itself."""
    is_its = half == "predictor" if name in _SHARED else target in ("both", half) and name in FIELDS[half]
    if not is_its or name in _NOT_AMONG_SETTINGS:
        return False
    return value is not None and (name in _DERIVED or value != Settings.model_fields[name].default)


def _container_concurrency(settings: Mapping[str, Any]) -> int:
    """Returns Knative's limit, moved as little as the chart asks for: batches fill, no call is refused."""
    batch, queue = (
        int(settings.get(name) or Settings.model_fields[name].default) for name in ("max_batch_size", "max_queue_size")
    )
    return min(max(_CONTAINER_CONCURRENCY, batch), batch + queue)


def _head(result: SweepResult, best: Trial, noise: str | None) -> list[str]:
    reference = next((trial for trial in result.trials if trial.number == 0), None)
    # The defaults are there twice.
    states = {repr(trial.settings): trial.state for trial in result.trials}
    constraint = f" with {result.constraint}" if result.constraint else ""
    lines = [
        f"Recommended by florence2 loadtest sweep {result.version}, {result.created}",
        f"Measured on {result.host['cpu']}, {result.host['cpus']} processors: another machine may want others.",
        f"Scenario {result.scenario.get('name', '')}, {_target_words(result.target)}, "
        f"model {best.settings.get('model', Settings.model_fields['model'].default)}; the model isn't set here.",
        f"Objective {result.objective}{constraint}: the best of {len(states)} configurations, of which "
        f"{sum(state == 'failed' for state in states.values())} failed.",
        f"These values: {figures(best)}",
    ]
    if reference is not None and reference is not best:
        lines.append(f"The defaults: {figures(reference) or reference.state}")
    if noise:
        lines.append(noise)
    return [part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  ")]


def _target_words(target: Half) -> str:
    return "both halves" if target == "both" else f"the {target} alone"
