"""``florence2 loadtest peers``: the same load on this service and on Triton, in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.model_files import ModelFilesError, locate_model
from florence2_kserve.options import Model
from florence2_loadtest.measure import Say, file_name, measure
from florence2_loadtest.overrides import override
from florence2_loadtest.peer_requests import ask_each, differences, for_triton, with_lengths
from florence2_loadtest.peer_table import show
from florence2_loadtest.reference import REPLACED
from florence2_loadtest.results import Level, PeersResult, Record, RunResult, Target, write_records, write_result
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.servers import Servers
from florence2_loadtest.triton import Triton, set_up, why_not
from florence2_loadtest.workload import Workload, build_workload

OURS, TRITON = "florence2-kserve", "Triton"
RESULT = "peers.json"
_NINE = "nine"
_ASKED_PICTURES = 2  # of each task, before anything is timed


class Service(Protocol):
    """A started service."""

    target: Target
    metrics_urls: list[str]


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the services.

    Attributes:
        name: In the result.
        start: Starts it, as a context manager.
        workload: The load's requests as it takes them.
    """

    name: str
    start: Callable[[], AbstractContextManager[Service]]
    workload: Workload


@dataclass(slots=True)
class _Found:
    """What is known of one peer so far."""

    answers: dict[str, list[Any]] = field(default_factory=dict)
    runs: list[RunResult] = field(default_factory=list)


def peers(
    model: Model = "embedded",
    concurrency: Annotated[int, typer.Option(help="Clients that each wait for their answer.", min=1)] = 36,
    tasks: Annotated[
        str, typer.Option(metavar="nine|TASK,…", help="Each is measured alone; nine are the replaced deployment's.")
    ] = _NINE,
    alone: Annotated[bool, typer.Option("--alone/--no-alone", help="Measure each task alone.")] = True,
    mixed: Annotated[bool, typer.Option("--mixed/--no-mixed", help="Measure all tasks mixed.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N|typical",
            help="Tokens of each answer, for random weights: a number, or drawn by task as real answers are long.",
        ),
    ] = None,
    scenes: Annotated[int, typer.Option(help="Different pictures; 1 asks about the same one always.", min=1)] = 16,
    pictures: Annotated[Path | None, typer.Option(help="Folder of pictures, in place of drawn ones.")] = None,
    feature_cache: Annotated[
        bool, typer.Option("--feature-cache/--no-feature-cache", help="Whether ours knows a picture again.")
    ] = True,
    window: Annotated[float, typer.Option(help="Seconds of a measuring window.")] = 10.0,
    max_windows: Annotated[int, typer.Option(help="Most windows of a level.")] = 10,
    requests: Annotated[int | None, typer.Option(help="End a level after so many.")] = None,
    repeats: Annotated[int, typer.Option(help="Measure so often, in alternating order; medians count.", min=1)] = 1,
    setting: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of ours; may be repeated.")
    ] = None,
    triton_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of triton_baseline/start.py; may be repeated."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 300.0,
    setup: Annotated[bool, typer.Option("--setup", help="Install Triton (7 GB), and end.")] = False,
    output: Annotated[
        Path | None, typer.Option(help=f"Folder for {RESULT} and the requests (records-….jsonl).")
    ] = None,
) -> None:
    """Measure this service and Triton under the same load, one after the other, and print the ratios.

    Triton runs what the replaced deployment ran: one process for pictures, dynamic batching, and ``generate``.
    """
    try:
        if setup:
            set_up(_say)
            return
        options = _pairs(triton_option, "--triton-option")
        if "server" not in options and (reason := why_not()) is not None:
            raise RuntimeError(reason)
        scenario = _scenario(tasks, concurrency, scenes, pictures, window, max_windows, requests, timeout)
        folder = locate_model(model).folder
        workload = with_lengths(build_workload(scenario, "florence2"), lengths, scenario.seed)
        ours = {
            "model": model,
            "device": device,
            "dtype": dtype,
            "feature_cache_mib": None if feature_cache else 0,
            **_pairs(setting, "--setting"),
        }
        chosen = [
            Peer(
                TRITON,
                lambda: Triton(folder, device=device, dtype=dtype, options=options),
                workload.mapped(for_triton),
            ),
            Peer(OURS, lambda: Servers(ours), workload),
        ]
        result = compare_peers(chosen, scenario, alone=alone, mixed=mixed, repeats=repeats, output=output)
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except (ModelFilesError, ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    result.scenario |= {"lengths": lengths, "feature_cache": feature_cache}
    if output is not None:
        write_result(result, output / RESULT)
    show(result)


def compare_peers(
    chosen: list[Peer],
    scenario: Scenario,
    *,
    alone: bool = True,
    mixed: bool = True,
    repeats: int = 1,
    output: Path | None = None,
    say: Say | None = None,
) -> PeersResult:
    """Measures services in turn: only one of them runs at a time.

    Args:
        chosen: They; the first is the one that others are divided by.
        scenario: The load.
        alone: Whether each task is measured alone.
        mixed: Whether all tasks are measured mixed.
        repeats: How often; every other time in the opposite order. Of each load that with the median throughput is
            kept.
        output: Folder for the requests and, beside them, each repeat's result; None for none.
        say: Gets lines of progress.

    Raises:
        RuntimeError: If a service doesn't start.
        ValueError: If there is nothing to measure.
    """
    say = say or _say
    kinds = [kind for kind, is_asked in (("alone", alone), ("mixed", mixed)) if is_asked]
    if not kinds:
        raise ValueError("nothing to measure: ask for tasks alone, or mixed")
    found = {peer.name: _Found() for peer in chosen}
    for repeat in range(repeats):
        for peer in chosen if repeat % 2 == 0 else reversed(chosen):
            say(f"{peer.name}: starting …")
            with peer.start() as service:
                if repeat == 0:
                    found[peer.name].answers = asyncio.run(ask_each(service.target, peer.workload, _ASKED_PICTURES))
                    _say_differences(found, chosen[0].name, say)
                files = _Files(output, f"{peer.name} {repeat + 1}")
                run = asyncio.run(_measure(service, peer, scenario, kinds, files, say))
            found[peer.name].runs.append(run)
    return PeersResult(
        name=f"{' and '.join(peer.name for peer in reversed(chosen))}",
        baseline=chosen[0].name,
        scenario=scenario.model_dump(mode="json"),
        runs={
            name: _median(each.runs, differences(found[chosen[0].name].answers, each.answers))
            for name, each in found.items()
        },
    )


async def _measure(
    service: Service, peer: Peer, scenario: Scenario, kinds: list[str], files: _Files, say: Say
) -> RunResult:
    """Measures one service under all loads that are asked for."""
    whole: RunResult | None = None
    for kind in kinds:
        result, records = await measure(
            service.target,
            scenario.model_copy(update={"separately": kind == "alone"}),
            metrics_urls=service.metrics_urls,
            workload=peer.workload,
            say=say,
        )
        if kind == "mixed":
            records = {f"mixed, {name}": of for name, of in records.items()}
            for level in result.levels:
                level.name = f"mixed, {level.name}"
        whole = result if whole is None else whole.model_copy(update={"levels": [*whole.levels, *result.levels]})
        files.add(whole, records)
    assert whole is not None
    return whole


def _median(runs: list[RunResult], unlike: list[str]) -> RunResult:
    """Returns one run whose levels are, each, the one with the median throughput."""
    names = [level.name for level in runs[0].levels]
    levels = [_middle([level for run in runs for level in run.levels if level.name == name]) for name in names]
    target = runs[0].target
    note = ", ".join(filter(None, [target.note, f"answers differ: {', '.join(unlike)}" if unlike else ""]))
    return runs[0].model_copy(update={"levels": levels, "target": target.model_copy(update={"note": note})})


def _middle(levels: list[Level]) -> Level:
    return sorted(levels, key=lambda level: level.throughput)[(len(levels) - 1) // 2]


def _say_differences(found: Mapping[str, _Found], baseline: str, say: Say) -> None:
    """Says whether answers are alike, as soon as two services have been asked."""
    asked = {name: each.answers for name, each in found.items() if each.answers}
    if len(asked) < 2:
        return
    for name, answers in asked.items():
        if name != baseline:
            unlike = differences(asked[baseline], answers)
            said = (
                f"ANSWERS DIFFER from {baseline}'s: {', '.join(unlike)}" if unlike else f"answers as {baseline} does"
            )
            say(f"{name}: {said}")


class _Files:
    """What is written of one run: its result and its requests."""

    def __init__(self, folder: Path | None, run: str) -> None:
        self._folder = None if folder is None else folder / file_name(run)

    def add(self, result: RunResult, records: Mapping[str, list[Record]]) -> None:
        """Writes the result so far, and the requests of its last levels."""
        if self._folder is not None:
            write_result(result, self._folder / "result.json")
            for level, of in records.items():
                write_records(of, self._folder / f"records-{file_name(level)}.jsonl")


def _scenario(
    tasks: str,
    concurrency: int,
    scenes: int,
    pictures: Path | None,
    window: float,
    max_windows: int,
    requests: int | None,
    timeout: float,
) -> Scenario:
    chosen = Scenario.model_validate({"name": "peers", "pictures": {"scenes": scenes}})
    return override(
        chosen,
        tasks=",".join(REPLACED) if tasks == _NINE else tasks,
        concurrency=str(concurrency),
        pictures=pictures,
        load={"window_s": window, "max_windows": max_windows, "max_requests": requests},
        others={"timeout_s": timeout},
    )


def _pairs(lines: list[str] | None, option: str) -> dict[str, str]:
    """Reads ``NAME=VALUE`` lines.

    Raises:
        typer.BadParameter: If one isn't of that form.
    """
    pairs = {}
    for line in lines or ():
        name, equals, value = line.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"has to be NAME=VALUE, not {line!r}", param_hint=option)
        pairs[name.replace("-", "_")] = value
    return pairs


def _say(line: str) -> None:
    typer.echo(line, err=True)
