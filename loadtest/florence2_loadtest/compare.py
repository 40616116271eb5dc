"""``florence2 loadtest compare``: what has changed from one result to another, and whether it may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from florence2_kserve.exit_codes import ExitCode
from florence2_loadtest import formats
from florence2_loadtest.conditions import (
    EACH_TASK,
    Condition,
    Figures,
    kind_of,
    level_figures,
    parse_condition,
    relative_change,
    task_figures,
)
from florence2_loadtest.results import (
    AutoscaleResult,
    Level,
    PeersResult,
    Result,
    RunResult,
    SweepResult,
    Target,
    Trial,
    read_result,
)

Pairs = Mapping[str, tuple[Level, Level]]
# What is shown in any case, where it is known.
_SHOWN = (
    *("throughput", "goodput", "mean", "p50", "p95", "p99", "failed", "unsent"),
    *("server.queue", "server.preprocess", "server.generate", "server.postprocess"),
    *("server.batch_rows", "server.cache_hits_share"),
)
_OF_TASKS = ("throughput", "p95")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition on one level, or one task of it.

    Attributes:
        condition: The condition.
        where: The level, and the task if it is about one.
        a: The figure before; None if it isn't known.
        b: The figure after.
        holds: Whether it holds; None if that can't be known.
    """

    condition: Condition
    where: str
    a: float | None
    b: float | None
    holds: bool | None


def compare(
    a: Annotated[Path, typer.Argument(help="The result before, a JSON file.")],
    b: Annotated[Path, typer.Argument(help="The result after.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with code 1 if this holds of any level: of the change, p95>+10%, throughput<-5%; of B, "
            "failed>0, p95>2s; of a task, OD.p95>+10%, or of each, *.p95>+10%. May be repeated.",
        ),
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Compare the levels that both have, and leave out the others.")
    ] = False,
) -> None:
    """Compare two results, level by level, and exit with code 1 if a condition holds."""
    try:
        conditions = [parse_condition(text) for text in fail_if or ()]
        before, after = read_result(a), read_result(b)
        pairs = match_levels(before, after, only_common=common)
        verdicts = judge(conditions, pairs)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for letter, path, result in (("A", a, before), ("B", b, after)):
        typer.echo(f"{letter}: {path}: {result.kind} of {result.name}, {result.created}, version {result.version}")
    for warning in find_obstacles(before, after, pairs):
        typer.echo(f"warning: {warning}")
    for name, first_value, last_value in _differences(_settings(before), _settings(after)):
        typer.echo(f"setting {name}: {first_value} → {last_value}")
    for name, (first, last) in pairs.items():
        _show_level(name, first, last, [condition.name for condition in conditions if condition.task is None])
    if not verdicts:
        return
    broken = [verdict for verdict in verdicts if verdict.holds]
    for verdict in verdicts:
        if verdict.holds is not False:
            typer.echo(("FAILS " if verdict.holds else "not known: ") + _describe(verdict))
    if broken:
        raise typer.Exit(ExitCode.FAILED)
    typer.echo("no condition holds")


def levels_of(result: Result) -> dict[str, Level]:
    """Returns a result's levels by names that tell them apart; of a sweep, the recommended configuration's."""
    match result:
        case RunResult():
            return {level.name: level for level in result.levels}
        case AutoscaleResult():
            return {result.level.name: result.level}
        case PeersResult():
            return {f"{peer}: {level.name}": level for peer, run in result.runs.items() for level in run.levels}
        case SweepResult():
            best = _best(result)
            return {level.name: level for level in best.levels} if best else {}
    raise ValueError(f"results of the kind {result.kind} can't be compared")


def match_levels(before: Result, after: Result, *, only_common: bool = False) -> dict[str, tuple[Level, Level]]:
    """Returns the levels of both by name.

    Raises:
        ValueError: If the results are of different kinds, or a level is in one of them alone.
    """
    if before.kind != after.kind:
        raise ValueError(f"A is a {before.kind} and B a {after.kind}: they have nothing to compare")
    first, last = levels_of(before), levels_of(after)
    pairs = {name: (level, last[name]) for name, level in first.items() if name in last}
    alone = [("A", name) for name in first if name not in last] + [("B", name) for name in last if name not in first]
    if not pairs or (alone and not only_common):
        told = "; ".join(
            f"in {letter} alone: {', '.join(name for where, name in alone if where == letter)}"
            for letter in dict.fromkeys(letter for letter, _ in alone)
        )
        hint = " (--common compares the others)" if pairs else ""
        raise ValueError(f"{told}{hint}" if told else "neither result has a level")
    return pairs


def judge(conditions: Sequence[Condition], pairs: Pairs) -> list[Verdict]:
    """Returns whether each condition holds of each level.

    Raises:
        ValueError: If nothing is known of what a condition is about, so that it could never hold.
    """
    verdicts = []
    for condition in conditions:
        of_it = []
        for name, first, last in _subjects(condition, pairs):
            a, b = first.get(condition.name), last.get(condition.name)
            of_it.append(Verdict(condition, name, a, b, condition.holds(a, b)))
        if all(verdict.holds is None for verdict in of_it):
            missing = "A and B" if all(verdict.b is None for verdict in of_it) else "A"
            raise ValueError(f"{condition.text}: {condition.name} isn't known in {missing}")
        verdicts += of_it
    return verdicts


def find_obstacles(before: Result, after: Result, pairs: Pairs) -> Iterator[str]:
    """Yields why figures may not be comparable."""
    for name, a, b in _differences(before.host, after.host):
        yield f"on another machine: {name} {a} | {b}"
    for name, a, b in _differences(_flat(before.scenario), _flat(after.scenario)):
        if name != "name":
            yield f"another scenario: {name} {a} | {b}"
    for name, a, b in _differences(_describe_targets(before), _describe_targets(after)):
        yield f"another target: {name} {a} | {b}"
    for name, levels in pairs.items():
        for letter, level in zip("AB", levels, strict=True):
            if level.generator.bottleneck:
                yield f"{name} of {letter}: the load generator was the bottleneck: {level.generator.bottleneck}"
            if level.stable is False:
                yield f"{name} of {letter}: its windows didn't become stable"


def _subjects(condition: Condition, pairs: Pairs) -> Iterator[tuple[str, Figures, Figures]]:
    """Yields what a condition is about: where, and the figures of A and of B."""
    for name, (first, last) in pairs.items():
        if condition.task is None:
            yield name, level_figures(first), level_figures(last)
            continue
        tasks = dict.fromkeys((*first.tasks, *last.tasks)) if condition.task == EACH_TASK else (condition.task,)
        for task in tasks:
            yield f"{name} {task}", task_figures(first.tasks.get(task)), task_figures(last.tasks.get(task))


def _targets(result: Result) -> dict[str, Target]:
    """Returns what was asked; each of several by its name."""
    match result:
        case RunResult() | AutoscaleResult():
            return {"": result.target}
        case PeersResult():
            return {f"{peer} ": run.target for peer, run in result.runs.items()}
    return {}


def _describe_targets(result: Result) -> dict[str, Any]:
    """Returns what figures depend on of what was asked, beside its settings."""
    if isinstance(result, SweepResult):
        return {"target": result.target, "objective": result.objective, "constraint": result.constraint}
    return {
        f"{prefix}{name}": value
        for prefix, target in _targets(result).items()
        for name, value in target.model_dump(include={"protocol", "keep_alive", "model", "revision"}).items()
        if value is not None
    }


def _settings(result: Result) -> dict[str, Any]:
    """Returns the servers' settings, as far as they are known: they may differ, which is often why one compares."""
    if isinstance(result, SweepResult):
        best = _best(result)
        return best.settings if best else {}
    return {
        f"{prefix}{name}": value
        for prefix, target in _targets(result).items()
        for name, value in target.settings.items()
    }


def _best(result: SweepResult) -> Trial | None:
    return next((trial for trial in result.trials if trial.number == result.best), None)


def _flat(given: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested values by their dotted names."""
    if isinstance(given, list):
        given = dict(enumerate(given))
    if not isinstance(given, Mapping):
        return {prefix: given}
    return {
        name: value
        for key, inner in given.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            yield name, formats.shorten(str(a.get(name, "–"))), formats.shorten(str(b.get(name, "–")))


def _show_level(name: str, first: Level, last: Level, asked: Sequence[str]) -> None:
    a, b = level_figures(first), level_figures(last)
    shown = [figure for figure in dict.fromkeys((*_SHOWN, *asked)) if not a[figure] is b[figure] is None]
    _show(name, ("", "A", "B", "change"), [(figure, *_cells(figure, a[figure], b[figure])) for figure in shown])
    tasks = dict.fromkeys((*first.tasks, *last.tasks))
    if len(tasks) > 1:
        rows = []
        for task in tasks:
            of_a, of_b = task_figures(first.tasks.get(task)), task_figures(last.tasks.get(task))
            rows += [(task, figure, *_cells(figure, of_a[figure], of_b[figure])) for figure in _OF_TASKS]
        _show(f"{name}, by task", ("", "", "A", "B", "change"), rows)


def _show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def _cells(name: str, a: float | None, b: float | None) -> tuple[str, str, str]:
    change = "" if a is None or b is None or not (a or b) else _per_cent(relative_change(a, b))
    return _format(name, a), _format(name, b), change


def _format(name: str, value: float | None) -> str:
    match kind_of(name):
        case "seconds":
            return formats.seconds(value)
        case "rate":
            return formats.rate(value)
        case "share":
            return formats.share(value)
    is_whole = value is None or float(value).is_integer()
    return formats.count(value) if is_whole else formats.digits(value)


def _per_cent(change: float) -> str:
    return "from 0" if abs(change) == float("inf") else f"{100 * change:+.1f} %"


def _describe(verdict: Verdict) -> str:
    a, b, change = _cells(verdict.condition.name, verdict.a, verdict.b)
    return f"{verdict.condition.text}: {verdict.where}: {a} → {b}{f' ({change})' if change else ''}"
