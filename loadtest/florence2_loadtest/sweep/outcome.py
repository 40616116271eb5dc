"""What a sweep leaves: its result, a table of the best configurations, and a values file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from florence2_loadtest import formats
from florence2_loadtest.results import SweepResult, Trial, write_result
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.servers import Half
from florence2_loadtest.sweep.confirmation import confirmations, decide, searched
from florence2_loadtest.sweep.loop import without_retried
from florence2_loadtest.sweep.objective import Objective
from florence2_loadtest.sweep.space import Space
from florence2_loadtest.sweep.values import values_file
from florence2_loadtest.trials import representative, unsettled, verdict

CHECKPOINT, RESULT, VALUES = "checkpoint.jsonl", "result.json", "values.yaml"
_ROWS = 10


def make_result(
    trials: Sequence[Trial],
    space: Space,
    scenario: Scenario,
    target: Half,
    objective: Objective,
    constraint: str | None,
) -> SweepResult:
    """Returns a sweep's result."""
    kept = without_retried(trials, list(space.parameters))
    best = decide(kept, list(space.parameters), objective).best
    return SweepResult(
        name=scenario.name,
        scenario=scenario.model_dump(mode="json"),
        target=target,
        objective=objective.name,
        constraint=constraint,
        direction=objective.direction,
        space=space.as_lists(),
        trials=kept,
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
    values.write_text(values_file(result, verdict(result)))
    return [*paths, values]


def show(result: SweepResult, objective: Objective, console: Console) -> None:
    """Prints the best configurations, how reliable the figures are, and what failed."""
    names = list(result.space)
    title = f"{result.name}: {result.objective}" + (f", {result.constraint}" if result.constraint else "")
    # Names, settings and errors are anything: none of them is markup.
    table = Table(title=Text(title))
    for column in ("", *names, "answers/s", "at", "p95", ""):
        table.add_column(Text(column), justify="right", overflow="fold")
    for trial in objective.rank(searched(result.trials))[:_ROWS]:
        level = representative(trial, result)
        assert level is not None
        cells = (
            str(trial.number),
            *(_cell(trial.settings, name) for name in names),
            formats.digits(level.throughput, 4),
            str(level.concurrency or level.name),
            formats.seconds(level.latency.p95_s),
            _marks(trial, result),
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for line in (verdict(result), *_remarks(result)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _remarks(result: SweepResult) -> list[str]:
    lines = []
    if numbers := [str(trial.number) for trial in unsettled(result)]:
        lines.append(f"Not stable, measure for longer (window_s, max_windows): {', '.join(numbers)}")
    failed = [trial for trial in result.trials if trial.state == "failed"]
    for trial in failed[:_ROWS]:
        lines.append(f"{trial.number} failed: {formats.settings(trial.settings)}: {_last_line(trial.error)}")
    return lines


def _cell(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "default"
    return "unset" if settings[name] is None else str(settings[name])


def _marks(trial: Trial, result: SweepResult) -> str:
    again = [formats.digits(other.score) for other in confirmations(result.trials) if other.confirms == trial.number]
    marks = {
        "recommended": trial.number == result.best,
        f"again {', '.join(again)}": bool(again),
        "not admissible": not trial.admissible,
        "not stable": trial.number in {other.number for other in unsettled(result)},
        "limited by the generator": any(level.generator.bottleneck for level in trial.levels),
    }
    return ", ".join(mark for mark, holds in marks.items() if holds)


def _last_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[-1]
