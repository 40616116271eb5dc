"""A configuration as values of the Helm chart."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from florence2_kserve.settings import Settings
from florence2_loadtest import formats
from florence2_loadtest.masking import VARIABLE, is_secret
from florence2_loadtest.results import SweepResult, Trial
from florence2_loadtest.servers import FIELDS, Half
from florence2_loadtest.sweep.confirmation import references, searched

# The chart has values of its own for them.
_NOT_AMONG_SETTINGS = frozenset({"model", "model_revision", "model_name", "device"})
# Bounds that the predictor has to have if the transformer has them.
_SHARED = frozenset({"max_rows", "max_num_beams", "max_new_tokens"})
# Where one of them is set the others are too, as they were measured: the chart checks them against each other, and a
# profile may have others.
_TOGETHER = ("max_batch_size", "max_queue_size", "max_rows")
_HALVES: tuple[Half, ...] = ("transformer", "predictor")
_CONTAINER_CONCURRENCY = 64  # the chart's default
_WIDTH = 110


def chart_values(settings: Mapping[str, Any], target: Half) -> dict[str, Any]:
    """Returns settings as the chart's values, without secrets.

    What equals the chart's defaults is there too, and null for what is to be unset: a profile, or the release that is
    upgraded, may have other values.

    Args:
        settings: By name, variables as ``env.NAME``.
        target: Whose settings they are.
    """
    values = {half: _half(settings, half, target) for half in _HALVES}
    return {half: of_half for half, of_half in values.items() if of_half}


def values_file(result: SweepResult, verdict: str = "") -> str:
    """Returns the recommended configuration as a values file that says in its head what was measured.

    Args:
        result: Of the sweep.
        verdict: How far the recommendation can be believed.

    Raises:
        ValueError: If the sweep recommends nothing.
    """
    best = next((trial for trial in result.trials if trial.number == result.best), None)
    if best is None:
        raise ValueError("no configuration is to be recommended")
    lines = _head(result, best, verdict)
    values = chart_values(best.settings, result.target)
    body = yaml.safe_dump(values, sort_keys=False) if values else "{}  # nothing to set\n"
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
    if half == "predictor" and target in ("both", half):
        settings = _completed(settings)
        if kind := str(settings.get("device") or "").partition(":")[0]:
            values |= {"cuda": {"gpu": {"enabled": True}}, "cpu": {"gpu": {"enabled": False}}}.get(kind, {})
        if _TOGETHER[0] in settings:
            values["containerConcurrency"] = _container_concurrency(settings)
    if named := {name: value for name, value in settings.items() if _is_written(name, half, target)}:
        values["settings"] = named
    variables = {name: value for name, value in settings.items() if name.startswith(VARIABLE) and not is_secret(name)}
    if variables and target in ("both", half):
        values["extraEnv"] = [
            {"name": name.removeprefix(VARIABLE), "value": str(value)} for name, value in variables.items()
        ]
    return values


def _completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    if settings.keys().isdisjoint(_TOGETHER):
        return dict(settings)
    return {**{name: Settings.model_fields[name].default for name in _TOGETHER}, **settings}


def _is_written(name: str, half: Half, target: Half) -> bool:
    """Whether a setting belongs among those of `half`."""
    if name in _NOT_AMONG_SETTINGS:
        return False
    return (name in _SHARED and half == "predictor") or (target in ("both", half) and name in FIELDS[half])


def _container_concurrency(settings: Mapping[str, Any]) -> int:
    """Returns Knative's limit, moved as little as the chart asks for: batches fill, no call is refused."""
    batch, queue = int(settings["max_batch_size"]), int(settings["max_queue_size"])
    return min(max(_CONTAINER_CONCURRENCY, batch), batch + queue)


def _head(result: SweepResult, best: Trial, verdict: str) -> list[str]:
    trials = searched(result.trials)
    defaults = references(trials, list(result.space))
    # The defaults are there twice.
    states = {repr(trial.settings): trial.state for trial in trials}
    constraint = f" with {result.constraint}" if result.constraint else ""
    is_default = best in defaults
    lines = [
        f"Recommended by florence2 loadtest sweep {result.version}, {result.created}",
        f"Measured on {result.host['cpu']}, {result.host['cpus']} processors: another machine may want others.",
        f"Scenario {result.scenario.get('name', '')}, {_target_words(result.target)}, "
        f"model {best.settings.get('model', Settings.model_fields['model'].default)}; the model isn't set here.",
        f"Objective {result.objective}{constraint}: of {len(states)} configurations "
        f"{sum(state == 'failed' for state in states.values())} failed.",
        f"{'The defaults' if is_default else 'These values'}: {figures(best)}",
    ]
    if is_default:
        lines.append(
            f"The defaults are recommended, so that none of what was searched is set here: {_defaults(result)}. "
            "What a profile sets of it wasn't measured."
        )
    elif defaults:
        lines.append(f"The defaults: {figures(defaults[0]) or defaults[0].state}")
    lines += [verdict] if verdict else []
    if any(level.stable is False for level in best.levels):
        lines.append("These figures come from levels that never settled: measure for longer.")
    variables = [name for name in best.settings if name.startswith(VARIABLE)]
    lines += [
        f"{name.removeprefix(VARIABLE)} is a secret, by its name, and isn't here: set it by extraEnvFrom."
        for name in variables
        if is_secret(name)
    ]
    if any(not is_secret(name) for name in variables):
        lines.append("extraEnv takes the place of a list that other values files have: add what they set.")
    return [part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent="  ")]


def _defaults(result: SweepResult) -> str:
    fields = {name: Settings.model_fields[name].default for name in result.space if not name.startswith(VARIABLE)}
    unset = {name: "unset" for name in result.space if name.startswith(VARIABLE)}
    return formats.settings({**{name: "unset" if value is None else value for name, value in fields.items()}, **unset})


def _target_words(target: Half) -> str:
    return "both halves" if target == "both" else f"the {target} alone"
