"""What a sweep leaves: its result, a table of the best configurations, and a values file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from florence2_kserve import __version__
from florence2_loadtest import formats
from florence2_loadtest.results import SweepResult, Trial, describe_host, write_result
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.servers import Half
from florence2_loadtest.sweep.loop import noise, recommend, references
from florence2_loadtest.sweep.objective import Objective
from florence2_loadtest.sweep.space import Space
from florence2_loadtest.sweep.values import values_file
from florence2_loadtest.trials import representative

CHECKPOINT, RESULT, VALUES = "checkpoint.jsonl", "result.json", "values.yaml"
_ROWS = 10


def fingerprint(
    space: Space, scenario: Scenario, target: Half, fixed: Mapping[str, Any], **further: Any
) -> dict[str, Any]:
    """Returns what trials depend on: those of another sweep mustn't be mixed with its own.

    What they are judged by isn't part of it, nor is the budget: both may change when a sweep goes on.
    """
    return {
        "target": target,
        "space": space.as_lists(),
        "settings": dict(fixed),
        "scenario": scenario.model_dump(mode="json"),
        "version": __version__,
        "host": describe_host(),
        **further,
    }


def make_result(
    trials: Sequence[Trial],
    space: Space,
    scenario: Scenario,
    target: Half,
    objective: Objective,
    constraint: str | None,
) -> SweepResult:
    """Returns a sweep's result."""
    best = recommend(trials, list(space.parameters), objective)
    return SweepResult(
        name=scenario.name,
        scenario=scenario.model_dump(mode="json"),
        target=target,
        objective=objective.name,
        constraint=constraint,
        direction=objective.direction,
        space=space.as_lists(),
        trials=list(trials),
        best=None if best is None else best.number,
    )


def write(result: SweepResult, folder: Path) -> list[Path]:
    """Writes the result, and the values file if there is something to recommend; returns what was written."""
    paths = [folder / RESULT]
    write_result(result, paths[0])
    values = folder / VALUES
    if result.best is None:
        values.unlink(missing_ok=True)  # of an earlier run, of which it isn't true any more
        return paths
    values.write_text(values_file(result, describe_noise(result)))
    return [*paths, values]


def show(result: SweepResult, objective: Objective, console: Console) -> None:
    """Prints the best configurations, how reliable the figures are, and what failed."""
    names = list(result.space)
    table = Table(title=f"{result.name}: {result.objective}" + (f", {result.constraint}" if result.constraint else ""))
    for column in ("", *names, "answers/s", "at", "p95", ""):
        table.add_column(column, justify="right", overflow="fold")
    for trial in objective.rank(result.trials)[:_ROWS]:
        level = representative(trial, result)
        assert level is not None
        table.add_row(
            str(trial.number),
            *(_cell(trial.settings, name) for name in names),
            formats.digits(level.throughput, 4),
            str(level.concurrency or level.name),
            formats.seconds(level.latency.p95_s),
            _marks(trial, result),
        )
    console.print(table)
    if text := describe_noise(result):
        console.print(text)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    for trial in failed[:_ROWS]:
        console.print(f"{trial.number} failed: {formats.settings(trial.settings)}: {_last_line(trial.error)}")
    if result.best is None:
        console.print("No configuration is admissible: nothing is recommended.")


def describe_noise(result: SweepResult) -> str | None:
    """Returns what is known of how far figures can be believed."""
    names = list(result.space)
    share = noise(result.trials, names)
    if share is None:
        return None
    text = f"The defaults, measured at the beginning and at the end, differ by {formats.share(share)}"
    best = next((trial for trial in result.trials if trial.number == result.best), None)
    defaults = references(result.trials, names)
    if best is None or best in defaults or not best.score:
        return f"{text}: smaller differences mean nothing."
    scores = [trial.score for trial in defaults if trial.score and trial.admissible]
    if not scores:
        return f"{text}, and aren't admissible."
    gain = best.score / max(scores) if result.direction == "maximize" else min(scores) / best.score
    if gain - 1 <= share:
        return f"{text}; as far as that tells, the recommended values are no better."
    return f"{text}; the recommended values are {formats.share(gain - 1)} better than the better of the two."


def _cell(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "default"
    return "unset" if settings[name] is None else str(settings[name])


def _marks(trial: Trial, result: SweepResult) -> str:
    marks = {
        "recommended": trial.number == result.best,
        "not admissible": not trial.admissible,
        "limited by the generator": any(level.generator.bottleneck for level in trial.levels),
    }
    return ", ".join(mark for mark, holds in marks.items() if holds)


def _last_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[-1]
