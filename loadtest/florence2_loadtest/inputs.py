"""``florence2 loadtest inputs``: the requests of a scenario as files that perf_analyzer's ``--input-data`` takes."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.tasks import TASKS, TaskInput
from florence2_loadtest.scenario import MixItem, Scenario, read_scenario
from florence2_loadtest.workload import build_workload


def inputs(
    output: Annotated[Path, typer.Argument(help="Folder for load_data_TASK.json, one file a task.")],
    scenario: Annotated[
        str | None,
        typer.Option(help="A scenario's file, or a built-in one's name; without it, all tasks about drawn scenes."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder of pictures, in place of the scenario's.")] = None,
    scenes: Annotated[int | None, typer.Option(help="Draw so many scenes, in place of pictures.", min=1)] = None,
    text: Annotated[str | None, typer.Option(help="Text or region, for the tasks that take one.")] = None,
) -> None:
    """Write a scenario's requests as perf_analyzer's --input-data files."""
    try:
        chosen = _choose(scenario, task, pictures, scenes, text)
        paths = write_inputs(chosen, output)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    for path in paths:
        typer.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    if names := sorted({name for item in chosen.mix for name in (*chosen.parameters, *item.parameters)}):
        typer.echo(f"without the scenario's {', '.join(names)}: perf_analyzer sends no parameters over HTTP")


def write_inputs(scenario: Scenario, folder: Path) -> list[Path]:
    """Writes a file for each of the scenario's tasks, with the requests that `loadtest run` would send.

    Returns:
        The files.

    Raises:
        ValueError: As `build_workload`.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for item in scenario.mix:
        by_task.setdefault(item.task, []).extend(_entries(scenario, item))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for task, entries in by_task.items():
        path = folder / f"load_data_{task.strip('<>')}.json"
        path.write_bytes(orjson.dumps({"data": entries}) + b"\n")
        paths.append(path)
    return paths


def _entries(scenario: Scenario, item: MixItem) -> list[dict[str, Any]]:
    alone = scenario.model_copy(update={"mix": [item], "protocol": "rest", "encoding": "json"})
    workload = build_workload(alone, "")
    bodies = [workload[0].body]
    for index in count(1):  # pictures come in turn: round once
        body = workload[index].body
        if body == bodies[0]:
            break
        bodies.append(body)
    return [
        {tensor["name"]: {"content": tensor["data"], "shape": [1]} for tensor in orjson.loads(body)["inputs"]}
        for body in bodies
    ]


def _choose(
    name: str | None, tasks: list[str] | None, folder: Path | None, scenes: int | None, text: str | None
) -> Scenario:
    """Returns the scenario of that name with what was given in its place.

    Raises:
        ValueError: If there is no such scenario or task, or what was given contradicts itself.
    """
    if folder is not None and scenes is not None:
        raise ValueError("--pictures and --scenes exclude each other")
    scenario = Scenario(mix=[MixItem(task=task) for task in TASKS]) if name is None else read_scenario(name)
    mix = scenario.mix
    if tasks:
        wanted = [MixItem(task=task).task for task in tasks]
        mix = [item for item in mix if item.task in wanted]
        if missing := [task for task in wanted if task not in scenario.tasks]:
            raise ValueError(f"{', '.join(missing)} isn't among the scenario's tasks: {', '.join(scenario.tasks)}")
    if text is not None:
        mix = [
            item.model_copy(update={"text": text}) if TASKS[item.task].takes is not TaskInput.NONE else item
            for item in mix
        ]
    pictures = scenario.pictures
    if folder is not None:
        pictures = pictures.model_copy(update={"folder": folder})
    elif scenes is not None:
        pictures = pictures.model_copy(update={"folder": None, "scenes": scenes})
    return scenario.model_copy(update={"mix": mix, "pictures": pictures})
