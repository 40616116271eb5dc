"""The flags of ``florence2 loadtest sweep``, and what becomes of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from florence2_kserve.exit_codes import ExitCode

if TYPE_CHECKING:
    from florence2_loadtest.scenario import Scenario
    from florence2_loadtest.servers import Half
    from florence2_loadtest.sweep.objective import Objective
    from florence2_loadtest.sweep.search import Search
    from florence2_loadtest.sweep.space import Space


class TargetOption(StrEnum):
    """What is measured."""

    BOTH = "both"
    TRANSFORMER = "transformer"
    PREDICTOR = "predictor"


class GridOption(StrEnum):
    """Built-in spaces."""

    REPLACED = "replaced"


class SearchOption(StrEnum):
    """Ways through a space."""

    GRID = "grid"
    OPTUNA = "optuna"


def sweep(
    scenario: Annotated[str, typer.Argument(help="A scenario's file, or the name of a built-in one.")] = "sweep-quick",
    target: Annotated[
        TargetOption,
        typer.Option(help="The service, or one half of it alone; the transformer beside an instant predictor."),
    ] = TargetOption.BOTH,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="A setting, or a variable as env.NAME, and its values: a,b,c or LOW:HIGH[:STEP]; may be repeated.",
        ),
    ] = None,
    space: Annotated[Path | None, typer.Option(help="The same as YAML; ranges may have `log: true`.")] = None,
    grid: Annotated[
        GridOption | None,
        typer.Option(help="A built-in space; `replaced`: what the Triton deployment was tuned with."),
    ] = None,
    fixed: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of all configurations; may be repeated."),
    ] = None,
    search: Annotated[
        SearchOption,
        typer.Option(help="Every configuration, or what optuna's TPE sampler chooses."),
    ] = SearchOption.GRID,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Take the grid in a random order, by --seed.")] = False,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    trials: Annotated[int | None, typer.Option(help="Most configurations, beside the defaults.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no further one after this time.", min=0)] = None,
    objective: Annotated[
        str, typer.Option(help="throughput or goodput; or a latency: mean, p50, p90, p95, p99.")
    ] = "throughput",
    constraint: Annotated[
        str | None, typer.Option(help="What a configuration must keep to be recommended, such as p95<2s.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="In place of the scenario's load: 36, or FROM:TO:STEP such as 12:60:12.")
    ] = None,
    confirm: Annotated[
        int,
        typer.Option(
            help="How often the three best and the defaults are measured again, which decides: 2 or more; "
            "0: not at all, and no gain is claimed.",
            min=0,
        ),
    ] = 2,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure again what failed in an earlier run.")
    ] = False,
    start_seconds: Annotated[float, typer.Option(help="Time in which a server has to be ready.", min=1)] = 300,
    answer_tokens: Annotated[
        int, typer.Option(help="Length of the answers that the transformer alone gets.", min=3)
    ] = 40,
    output: Annotated[
        Path,
        typer.Option(help="Folder of its checkpoint, result.json and values.yaml; a sweep that is there goes on."),
    ] = Path("sweep-output"),
    verbose: Annotated[bool, typer.Option("--verbose", help="Tell of each measuring window.")] = False,
) -> None:
    """Search for the best settings, each configuration in fresh servers; killed, the same command goes on."""
    from rich.console import Console

    from florence2_kserve.model_files import ModelFilesError
    from florence2_loadtest.slo import parse_slo
    from florence2_loadtest.sweep import outcome
    from florence2_loadtest.sweep.checkpoint import Checkpoint, CheckpointError
    from florence2_loadtest.sweep.confirmation import FEWEST_REPEATS
    from florence2_loadtest.sweep.fingerprint import fingerprint
    from florence2_loadtest.sweep.loop import Budget, Sweep
    from florence2_loadtest.sweep.objective import read_objective
    from florence2_loadtest.sweep.search import Grid
    from florence2_loadtest.sweep.trial import Bench, make_workload

    half: Half = target.value
    try:
        if 0 < confirm < FEWEST_REPEATS:
            raise ValueError("--confirm 1 would tell nothing of how much figures vary: 2 or more, or 0")
        chosen = _read_space(param, space, grid, half)
        settings = _read_fixed(fixed, chosen, half)
        load = _read_load(scenario, concurrency)
        goal = read_objective(objective, parse_slo(constraint) if constraint else None)
        if objective == "goodput" and not any(item.slo for item in load.mix):
            raise ValueError("goodput counts answers that met their task's slo, and the scenario names none")
        way = _make_search(search, chosen, goal, seed, shuffle, has_budget=trials is not None or minutes is not None)
        workload = make_workload(load, half, settings)
    except (ValueError, ModelFilesError) as error:
        raise typer.BadParameter(str(error)) from None
    for note in chosen.notes:
        typer.echo(note)
    if isinstance(way, Grid):
        typer.echo(f"{len(way)} configurations, the defaults at both ends, and the best again")
    say = typer.echo if verbose else _say_nothing
    bench = Bench(load, workload, half, start_s=start_seconds, answer_tokens=answer_tokens, say=say)
    loop = Sweep(
        list(chosen.parameters),
        way,
        goal,
        bench.measure,
        settings,
        Budget(trials, minutes),
        confirm,
        retry_failed,
        say=typer.echo,
    )
    mark = fingerprint(chosen, load, half, settings, answer_tokens=answer_tokens)
    interrupted = False
    try:
        with Checkpoint(output / outcome.CHECKPOINT, mark) as checkpoint:
            try:
                loop.run(checkpoint)
            except KeyboardInterrupt:
                interrupted = True
            finished = checkpoint.trials
    except (CheckpointError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    result = outcome.make_result(finished, chosen, load, half, goal, constraint)
    written = outcome.write(result, output)
    outcome.show(result, goal, Console())
    for path in written:
        typer.echo(f"wrote {path}")
    if interrupted:
        typer.echo("interrupted: the same command goes on from here", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)
    raise typer.Exit(ExitCode.OK if result.best is not None else ExitCode.FAILED)


def _read_space(param: list[str] | None, path: Path | None, grid: GridOption | None, target: Half) -> Space:
    from florence2_loadtest.sweep.grids import replaced_grid
    from florence2_loadtest.sweep.space import make_space, parse_assignments, read_space

    if sum(1 for way in (param, path, grid) if way) > 1:
        raise ValueError("give one of --param, --space and --grid")
    if grid:
        return replaced_grid(target)
    if path:
        return read_space(path, target)
    return make_space(parse_assignments(param or (), "--param"), target)


def _read_fixed(fixed: list[str] | None, space: Space, target: Half) -> dict[str, Any]:
    from florence2_loadtest.servers import check_name
    from florence2_loadtest.sweep.space import parse_assignments, read_value

    settings = {}
    for name, text in parse_assignments(fixed or (), "--set").items():
        check_name(name, target)
        if name in space.parameters:
            raise ValueError(f"--set {name}: it is searched over")
        settings[name] = read_value(name, text)
    return settings


def _read_load(scenario: str, concurrency: str | None) -> Scenario:
    from florence2_loadtest.scenario import ClosedLoad, parse_concurrency, read_scenario

    load = read_scenario(scenario)
    if load.separately:
        raise ValueError("a sweep measures a scenario's tasks together: it can't have `separately`")
    if concurrency is None:
        return load
    parse_concurrency(concurrency)
    closed = load.load if isinstance(load.load, ClosedLoad) else ClosedLoad()
    return load.model_copy(update={"load": closed.model_copy(update={"concurrency": concurrency})})


def _make_search(
    kind: SearchOption, space: Space, objective: Objective, seed: int, shuffle: bool, *, has_budget: bool
) -> Search:
    from florence2_loadtest.sweep.search import Grid, Tpe

    if kind is SearchOption.GRID:
        return Grid(space, seed if shuffle else None)
    if not has_budget:
        raise ValueError("optuna needs a budget: --trials or --minutes")
    return Tpe(space, objective, seed)


def _say_nothing(text: str) -> None: ...
