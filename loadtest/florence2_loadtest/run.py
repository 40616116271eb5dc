"""``florence2 loadtest run``: measures a service under a scenario's load."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, BinaryIO

import typer

from florence2_kserve.client import AsyncFlorence2Client, UnavailableError
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.options import MODEL_NAME, Headers, MaxNewTokens, Model, ModelName, Url, given, read_headers
from florence2_kserve.urls import check_url, public_url
from florence2_loadtest.console import show
from florence2_loadtest.measure import file_name, measure
from florence2_loadtest.overrides import override
from florence2_loadtest.perf_csv import write_csv
from florence2_loadtest.results import Level, Record, RunResult, Target, record_line, write_records, write_result
from florence2_loadtest.scenario import Scenario, read_scenario
from florence2_loadtest.servers import Servers
from florence2_loadtest.transport import CONNECTION

__all__ = ["measure", "run"]

RESULT, CSV = "result.json", "perf_analyzer.csv"
_OF_A_RUN = (CSV, f"*.{CSV}", "records-*.jsonl")  # beside its result, which is written over


class Protocol(StrEnum):
    """What is spoken."""

    REST = "rest"
    GRPC = "grpc"


class Encoding(StrEnum):
    """How pictures travel."""

    JSON = "json"
    BINARY = "binary"


def run(
    url: Url = None,
    scenario: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="A file of YAML, or one of the built-in scenarios.")
    ] = "quick",
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: 36, 1,4,16, or from, to and step as in 12:60:12.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="Open loop: poisson:50/s,60s, ramp:0-100/s,60s, spike:5/s,20s;100/s,5s, replay:FILE, …"),
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="TASK,…|all", help="What is asked.")] = None,
    separately: Annotated[bool | None, typer.Option("--separately/--mixed", help="A level for each task.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of pictures to ask about, in place of drawn ones.")
    ] = None,
    protocol: Annotated[Protocol | None, typer.Option(help="By the URL, if it isn't given.")] = None,
    encoding: Annotated[Encoding | None, typer.Option(help="Pictures as base64 text in JSON, or as they are.")] = None,
    keep_alive: Annotated[
        bool | None, typer.Option("--keep-alive/--no-keep-alive", help="Whether connections are kept.")
    ] = None,
    slo: Annotated[
        list[str] | None, typer.Option(metavar="[TASK=]p95<2s", help="Limit of latency; may be repeated.")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    window: Annotated[float | None, typer.Option(help="Seconds of a measuring window.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Most windows of a level.")] = None,
    requests: Annotated[int | None, typer.Option(help="End a level after so many.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one request, retries included.")] = None,
    retries: Annotated[int | None, typer.Option(help="How often a refused request is sent again.")] = None,
    wait_ready: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long the service of --url may take to be ready.", min=0),
    ] = 60,
    header: Headers = None,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(help="A server's own metrics, http://HOST:PORT/metrics; may be repeated."),
    ] = None,
    model: Model = "embedded",
    model_name: ModelName = MODEL_NAME,
    output: Annotated[
        Path | None, typer.Option(help=f"Folder for {RESULT}, {CSV} and the requests (records-….jsonl).")
    ] = None,
) -> None:
    """Measure a service under load: throughput, latency, goodput, and whether to believe them.

    Exit code 1: an SLO was missed, or a level got no answer at all.
    """
    check_url(url)
    headers = read_headers(header)
    spoken = protocol.value if protocol else None
    if url is not None:
        by_url = "grpc" if url.startswith("grpc://") else "rest"
        if spoken not in (None, by_url):
            raise typer.BadParameter(f"{url} is not asked over {spoken}", param_hint="--protocol")
        spoken = by_url
    try:
        chosen = override(
            read_scenario(scenario),
            tasks=tasks,
            slos=slo or (),
            concurrency=concurrency,
            schedule=schedule,
            pictures=pictures,
            parameters=given(max_new_tokens=max_new_tokens),
            load={"window_s": window, "max_windows": max_windows, "max_requests": requests},
            others={
                "separately": separately,
                "protocol": spoken,
                "encoding": encoding.value if encoding else None,
                "keep_alive": keep_alive,
                "timeout_s": timeout,
                "retries": retries,
            },
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    files = _Files(output)

    async def measure_when_ready(target: Target, metrics_urls: Sequence[str]) -> RunResult:
        if url is not None and wait_ready:
            await _wait_ready(target, headers, wait_ready)
        result, _ = await measure(
            target,
            chosen,
            metrics_urls=metrics_urls,
            headers=headers,
            say=_say,
            on_level=files.add,
            on_record=files.note,
        )
        return result

    terminations: list[int] = []
    try:
        with (
            files,
            _ending_on_termination(terminations),
            _target(url, chosen, model, model_name, metrics_url or ()) as (target, metrics_urls),
        ):
            result = asyncio.run(measure_when_ready(target, metrics_urls))
    except KeyboardInterrupt:  # what was measured is written
        raise typer.Exit(ExitCode.TERMINATED if terminations else ExitCode.INTERRUPTED) from None
    except (UnavailableError, ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        is_gone = isinstance(error, UnavailableError)
        raise typer.Exit(ExitCode.UNREACHABLE if is_gone else ExitCode.FAILED) from None
    show(result)
    raise typer.Exit(exit_code(result))


def exit_code(result: RunResult) -> ExitCode:
    """Returns how a run ended: not well where an SLO was missed, or a level got no answer."""
    statuses = {status for level in result.levels for status in level.statuses}
    if statuses == {CONNECTION}:
        return ExitCode.UNREACHABLE
    is_missed = any(task.slo_met is False for level in result.levels for task in level.tasks.values())
    is_silent = any(level.planned and not level.answered for level in result.levels)
    return ExitCode.FAILED if is_missed or is_silent else ExitCode.OK


class _Files:
    """What is written: each request when it is through, each level when it is measured, and their table at the end.

    What an earlier run left in the folder goes when the first of it is written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._is_clean = folder, False
        self._records: BinaryIO | None = None
        self._levels: list[Level] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._folder is not None and self._levels:
            write_csv(self._levels, self._folder / CSV)

    def note(self, level: str, record: Record) -> None:
        """Writes a request at once: whatever ends the level early, those until then are there."""
        if self._folder is None:
            return
        if self._records is None:
            self._records = self._path(self._folder, level).open("wb", buffering=0)
        self._records.write(record_line(record))

    def add(self, result: RunResult, level: Level, records: list[Record]) -> None:
        """Writes a level, the result so far, and in place of all requests those that the figures are of."""
        if self._folder is None:
            return
        self._close()
        write_records(records, self._path(self._folder, level.name))
        write_result(result, self._folder / RESULT)
        self._levels = list(result.levels)

    def _path(self, folder: Path, level: str) -> Path:
        if not self._is_clean:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in [path for pattern in _OF_A_RUN for path in folder.glob(pattern)]:
                stale.unlink()
            self._is_clean = True
        return folder / f"records-{file_name(level)}.jsonl"

    def _close(self) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None


def _say(line: str) -> None:
    typer.echo(line, err=True)


async def _wait_ready(target: Target, headers: Mapping[str, str], seconds: float) -> None:
    """Waits until the service is ready.

    Raises:
        UnavailableError: If it isn't in time.
    """
    async with AsyncFlorence2Client(target.url, model_name=target.model_name, headers=dict(headers)) as client:
        if not await client.is_ready():
            _say(f"waiting until {public_url(target.url)} is ready …")
            await client.wait_ready(seconds)


@contextmanager
def _ending_on_termination(received: list[int]) -> Iterator[None]:
    """Has SIGTERM end what is done as Ctrl-C does; it is in `received` then."""

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        interrupt = signal.getsignal(signal.SIGINT)  # asyncio's, while a loop runs
        if not callable(interrupt):  # ignored, as it is behind a shell's `&`
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _target(
    url: str | None, scenario: Scenario, model: str, model_name: str, metrics_urls: Sequence[str]
) -> Iterator[tuple[Target, Sequence[str]]]:
    """Yields whom to ask and where its metrics are; starts a service where no URL was given."""
    if url is not None:
        keep_alive = scenario.keep_alive
        target = Target(url=url, protocol=scenario.protocol, keep_alive=keep_alive, model_name=model_name, model=None)
        yield target, metrics_urls
        return
    _say("starting a service …")
    settings = {"model": model, "model_name": model_name}
    with Servers(settings, protocol=scenario.protocol, keep_alive=scenario.keep_alive) as servers:
        yield servers.target, [*servers.metrics_urls, *metrics_urls]
