"""The levels of a scenario, measured one after the other."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from florence2_kserve.client import AsyncFlorence2Client, ClientError, UnavailableError
from florence2_loadtest.generator import Measured, run_closed, run_open
from florence2_loadtest.results import Level, Record, RunResult, ServerSide, Target
from florence2_loadtest.scenario import ClosedLoad, OpenLoad, Scenario
from florence2_loadtest.schedules import parse_schedule
from florence2_loadtest.scrape import Scraper, Snapshot, difference
from florence2_loadtest.summary import slos_of, summarise
from florence2_loadtest.transport import open_transport
from florence2_loadtest.workload import Workload, build_workload

Say = Callable[[str], None]
OnLevel = Callable[[RunResult, Level, list[Record]], None]
OnRecord = Callable[[str, Record], None]
_PROGRESS_S = 10.0
_OTHER_FILES = 200  # that are open beside connections


async def measure(
    target: Target,
    scenario: Scenario,
    *,
    metrics_urls: Sequence[str] = (),
    workload: Workload | None = None,
    headers: Mapping[str, str] | None = None,
    say: Say = print,
    on_level: OnLevel | None = None,
    on_record: OnRecord | None = None,
) -> tuple[RunResult, dict[str, list[Record]]]:
    """Measures all levels of a scenario.

    Args:
        target: The service; its protocol and keep-alive count, not the scenario's.
        scenario: The load.
        metrics_urls: Of the servers' own metrics, read before and after each level, and between its windows.
        workload: The scenario's requests; None encodes them.
        headers: Sent with every request.
        say: Gets lines of progress.
        on_level: Called with each level when it is measured, and the result until then.
        on_record: Called with a level's name and each of its requests that is through, those of the warm-up included.

    Returns:
        The result, and the requests of each level by its name; none where `on_level` took them, as all of a run's
        may be too many for memory.

    Raises:
        UnavailableError: If the service can't be reached before the first level.
        ValueError: If the scenario can't be run.
        RuntimeError: If something goes wrong in a level that isn't the service's; names the level.
    """
    slos = slos_of(scenario)
    scenario = scenario.model_copy(update={"protocol": target.protocol, "keep_alive": target.keep_alive})
    workload = build_workload(scenario, target.model_name) if workload is None else workload
    plans = list(_plan(scenario))
    result = RunResult(
        name=scenario.name,
        target=await describe_target(target, headers or {}, scenario.timeout_s),
        scenario=scenario.model_dump(mode="json"),
    )
    records: dict[str, list[Record]] = {}
    for plan in plans:
        say(f"{plan.name} …")
        scraping = _Scraping(Scraper(metrics_urls, model_name=target.model_name) if metrics_urls else None, say)
        chosen = workload if plan.task is None else workload.only(plan.task)
        progress = _Progress(plan.name, say, on_record)
        try:
            measured = await _measure_level(target, scenario, plan, chosen, headers or {}, scraping, progress)
        except ExceptionGroup as group:
            raise RuntimeError(f"{plan.name}: {'; '.join(_reasons(group))}") from group
        asked = {task: slo for task, slo in slos.items() if plan.task in (None, task)}
        level = summarise(plan.name, measured, asked, scraping.server_side(measured.first_window))
        say(describe_level(level))
        result.levels.append(level)
        if on_level is None:
            records[level.name] = measured.records
        else:
            on_level(result, level, measured.records)
    return result, records


async def describe_target(target: Target, headers: Mapping[str, str], timeout_s: float) -> Target:
    """Returns `target` with the model that its metadata name, if they do.

    Raises:
        UnavailableError: If it can't be reached.
    """
    client = AsyncFlorence2Client(
        target.url, model_name=target.model_name, headers=dict(headers), timeout=timeout_s, retries=3
    )
    async with client:
        try:
            properties = (await client.metadata()).get("properties") or {}
        except UnavailableError:
            raise
        except ClientError:  # another server, which may answer questions nevertheless
            properties = {}
    told = {name: properties.get(name) for name in ("model", "revision")} if isinstance(properties, dict) else {}
    return target.model_copy(update={name: value for name, value in told.items() if value and isinstance(value, str)})


def file_name(level: str) -> str:
    """Returns a level's name as a part of a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", level.lower()).strip("-")[:100]


def describe_level(level: Level) -> str:
    """Returns a level in a line."""
    parts = [f"{level.throughput:.2f} answers/s"]
    if level.answered:
        parts.append(f"latency mean {level.latency.mean_s:.3f} s, p95 {level.latency.p95_s:.3f} s")
    parts += [f"{count} {name}" for name, count in (("failed", level.failed), ("unsent", level.unsent)) if count]
    if level.held_back:
        parts.append(f"{level.held_back} waited for others to be answered")
    if level.stable is False:
        parts.append("windows didn't agree")
    if level.generator.bottleneck:
        parts.append(f"THE LOAD GENERATOR WAS THE BOTTLENECK: {level.generator.bottleneck}")
    return f"{level.name}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class _Plan:
    name: str
    task: str | None
    load: ClosedLoad | OpenLoad
    concurrency: int = 0


def _plan(scenario: Scenario) -> Iterator[_Plan]:
    load = scenario.load
    for task in scenario.tasks if scenario.separately else (None,):
        prefix = f"{task}, " if task else ""
        if isinstance(load, OpenLoad):
            yield _Plan(f"{prefix}{load.schedule}", task, load)
        else:
            for concurrency in load.concurrencies:
                yield _Plan(f"{prefix}concurrency {concurrency}", task, load, concurrency)


async def _measure_level(
    target: Target,
    scenario: Scenario,
    plan: _Plan,
    workload: Workload,
    headers: Mapping[str, str],
    scraping: _Scraping,
    progress: _Progress,
) -> Measured:
    load, timeout_s, retries = plan.load, scenario.timeout_s, scenario.retries
    connections = load.max_in_flight if isinstance(load, OpenLoad) else plan.concurrency
    allow_files(connections + _OTHER_FILES)
    async with open_transport(target, connections=connections, headers=headers) as transport:
        if isinstance(load, OpenLoad):
            return await run_open(
                transport,
                workload,
                parse_schedule(load.schedule, scenario.seed),
                timeout_s,
                retries,
                load.grace_s,
                progress.count,
                max_in_flight=load.max_in_flight,
                mark=scraping.mark,
            )
        return await run_closed(
            transport, workload, load, plan.concurrency, timeout_s, retries, progress.count, mark=scraping.mark
        )


def allow_files(count: int) -> None:
    """Raises this process's limit of open files to `count`.

    Raises:
        ValueError: If that isn't allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ValueError(f"{count} open files are needed, and {hard} are allowed (ulimit -Hn): ask for fewer requests")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _reasons(group: BaseExceptionGroup[BaseException]) -> list[str]:
    """Returns what went wrong, each thing once."""
    found = [
        _reasons(error) if isinstance(error, BaseExceptionGroup) else [f"{type(error).__name__}: {error}"]
        for error in group.exceptions
    ]
    return list(dict.fromkeys(reason for reasons in found for reason in reasons))


class _Scraping:
    """The servers' metrics during one level."""

    def __init__(self, scraper: Scraper | None, say: Say) -> None:
        self._scraper, self._say = scraper, say
        self._snapshots: list[Snapshot] = []

    async def mark(self) -> None:
        """Reads them now."""
        if self._scraper is not None:
            self._snapshots.append(await self._scraper.scrape())

    def server_side(self, first: int) -> ServerSide | None:
        """Returns what happened from mark number `first` to the last one."""
        if self._scraper is None:
            return None
        return difference(self._snapshots[first], self._snapshots[-1], say=self._say)


class _Progress:
    """Says now and then how far a level is."""

    def __init__(self, level: str, say: Say, on_record: OnRecord | None) -> None:
        self._level, self._say, self._on_record = level, say, on_record
        self._began = self._last = time.monotonic()
        self._answered = self._failed = 0

    def count(self, record: Record) -> None:
        """Counts a request, and passes it on."""
        if self._on_record is not None:
            self._on_record(self._level, record)
        if record.is_ok:
            self._answered += 1
        else:
            self._failed += 1
        now = time.monotonic()
        if now - self._last >= _PROGRESS_S:
            self._last = now
            self._say(f"  {now - self._began:.0f} s: {self._answered} answered, {self._failed} failed")
