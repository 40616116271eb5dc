"""A scaling test from its beginning to its end: readiness, the fewest replicas, the load, the way back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from florence2_loadtest.cluster.api import Api, ClusterError
from florence2_loadtest.cluster.expectations import Expectation, problems
from florence2_loadtest.cluster.findings import find, statuses_per_second, with_first_answer
from florence2_loadtest.cluster.interruption import Interrupted, Signals
from florence2_loadtest.cluster.panic import NAMESPACE
from florence2_loadtest.cluster.sampler import Sampler, find_service
from florence2_loadtest.cluster.service import KNATIVE, STANDARD, Service
from florence2_loadtest.generator import Measured, run_open
from florence2_loadtest.results import AutoscaleResult, Generator, Record, Target
from florence2_loadtest.scenario import OpenLoad, Scenario
from florence2_loadtest.schedules import Schedule, parse_schedule
from florence2_loadtest.summary import slos_of, summarise
from florence2_loadtest.transport import open_transport
from florence2_loadtest.workload import Workload, build_workload

# By mode. An HPA looks back for 300 s before it takes a replica away, and then may take one at a time.
WAIT_AFTER_S = {KNATIVE: 300.0, STANDARD: 900.0}
_LOOK_S = 0.5
_SAMPLES_S = 10.0  # until the first samples of all components have to be there
_SETTLED_S = 1.0  # samples of how it was before, and stays


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        name: The InferenceService.
        namespace: Its namespace.
        scenario: With an open load.
        url: Where requests go; None: the service's address inside the cluster.
        headers: Sent with each.
        send_host: Whether the host name that the service's status gives is sent as the Host header.
        model_name: The model's name.
        ca_file: Certificates to trust beside the system's.
        autoscaler: Namespace of Knative's autoscaler.
        wait_ready_s: How long the service may take to be ready.
        wait_before_s: How long it may take to shrink to its fewest replicas before the load; 0 doesn't wait.
        wait_after_s: The same after the load; None: `WAIT_AFTER_S` of the service's mode.
        keep_alive: Whether connections are kept; None: unless new pods would then never be reached.
        expectations: What has to be true of the findings.
    """

    name: str
    namespace: str
    scenario: Scenario
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    send_host: bool = False
    model_name: str = "florence2"
    ca_file: Path | None = None
    autoscaler: str = NAMESPACE
    wait_ready_s: float = 600.0
    wait_before_s: float = 180.0
    wait_after_s: float | None = None
    keep_alive: bool | None = None
    expectations: Sequence[Expectation] = ()


async def watch_scaling(
    api: Api, plan: Plan, say: Callable[[str], None] = print
) -> tuple[AutoscaleResult, list[Record]]:
    """Runs the load and samples the cluster meanwhile.

    Args:
        api: The cluster.
        plan: What is to be done.
        say: Takes a line about each step.

    Returns:
        The result, and all requests.

    Raises:
        ClusterError: If the service isn't there, or isn't ready in time.
        Interrupted: If a signal ended it; has what there was by then.
        ValueError: If the scenario has no schedule, or the URL doesn't fit its protocol.
    """
    load = plan.scenario.load
    if not isinstance(load, OpenLoad):
        raise ValueError(f"scenario {plan.scenario.name}: scaling is watched under a schedule (load.schedule)")
    schedule = parse_schedule(load.schedule, plan.scenario.seed)
    say(f"{plan.scenario.name}: {len(schedule.starts)} requests in {schedule.seconds:g} s")
    workload = build_workload(plan.scenario, plan.model_name)
    signals = Signals()
    try:
        with signals.cancel(_this_task()):
            return await _watch(api, plan, load, schedule, workload, signals, say)
    except asyncio.CancelledError:
        if signals.code is None:
            raise
        raise Interrupted(signals.code) from None


async def _watch(
    api: Api,
    plan: Plan,
    load: OpenLoad,
    schedule: Schedule,
    workload: Workload,
    signals: Signals,
    say: Callable[[str], None],
) -> tuple[AutoscaleResult, list[Record]]:
    service = await _ready_service(api, plan, say)
    target = Target(
        url=plan.url or service.local_url(plan.scenario.protocol),
        protocol=plan.scenario.protocol,
        keep_alive=keeps_alive(plan, service),
        model_name=plan.model_name,
        model=None,  # asking for it would wake the service
        note=f"inferenceservice {service.namespace}/{service.name}",
    )
    headers = {**({"Host": service.host} if plan.send_host and service.host else {}), **plan.headers}
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(
            open_transport(target, connections=load.max_in_flight, headers=headers, ca_file=plan.ca_file)
        )
        sampler = stack.enter_context(Sampler(api, service, say, plan.autoscaler))
        began_from_fewest = await _shrink(sampler, plan.wait_before_s, "at the fewest replicas", say)
        await asyncio.sleep(_SETTLED_S)
        origin: float | None = None
        done: list[Record] = []
        measured: Measured | None = None

        async def mark() -> None:
            nonlocal origin
            if origin is None:  # it is called at the end, too
                origin = time.monotonic()
                sampler.note("the load begins")

        try:
            measured = await run_open(
                transport, workload, schedule, plan.scenario.timeout_s, plan.scenario.retries, load.grace_s,
                done.append, max_in_flight=load.max_in_flight, mark=mark,
            )  # fmt: skip
            sampler.note("the load is over")
            wait_s = WAIT_AFTER_S[service.mode] if plan.wait_after_s is None else plan.wait_after_s
            await _shrink(sampler, wait_s, "back at the fewest replicas", say)
            await asyncio.sleep(_SETTLED_S)
        except asyncio.CancelledError:
            if signals.code is None or origin is None:
                raise
            _this_task().uncancel()
            sampler.note("ended by a signal")
    assert origin is not None
    if measured is None:
        done.sort(key=lambda record: record.index)
        measured = Measured("open", done, time.monotonic() - origin, Generator(), rate=schedule.rate)
    result = _result(service, target, plan, schedule, sampler, measured, origin)
    if plan.wait_before_s and not began_from_fewest:
        result.problems.insert(0, "the load began while there were more than the fewest replicas")
    if signals.code is not None:
        result.problems.insert(0, "ended by a signal: only requests that were done by then are there")
        raise Interrupted(signals.code, (result, measured.records))
    return result, measured.records


async def _ready_service(api: Api, plan: Plan, say: Callable[[str], None]) -> Service:
    """Waits until the service says that it is ready; it may not be there yet, nor the API answer.

    Raises:
        ClusterError: If it doesn't, or may not be asked.
    """
    end, said = time.monotonic() + plan.wait_ready_s, ""
    while True:
        try:
            service = await asyncio.to_thread(find_service, api, plan.name, plan.namespace)
            if service.is_ready:
                return service
            why = f"inferenceservice {plan.namespace}/{plan.name} isn't ready"
        except ClusterError as error:
            if error.is_forbidden:
                raise
            why = str(error)
        if time.monotonic() >= end:
            raise ClusterError(f"{why}, after {plan.wait_ready_s:g} s")
        if why != said:
            say(f"waiting: {why}")
            said = why
        await asyncio.sleep(2 * _LOOK_S)


def keeps_alive(plan: Plan, service: Service) -> bool:
    """Returns whether connections are kept.

    In Standard mode the address inside the cluster is a ClusterIP, which chooses a pod for each connection, not for
    each request.
    """
    if plan.keep_alive is not None:
        return plan.keep_alive
    is_balanced_by_connection = plan.url is None and service.mode == STANDARD and plan.scenario.protocol == "rest"
    return plan.scenario.keep_alive and not is_balanced_by_connection


def _this_task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _shrink(sampler: Sampler, seconds: float, there: str, say: Callable[[str], None]) -> bool:
    """Waits until each component has no more than its fewest replicas, pods that end included; says whether it has."""
    began, is_said = time.monotonic(), False
    while not _is_seen(sampler) and time.monotonic() - began < _SAMPLES_S:
        await asyncio.sleep(_LOOK_S / 5)
    while seconds and time.monotonic() - began < seconds:
        if _is_smallest(sampler):
            sampler.note(there)
            return True
        if not is_said:
            say(f"waiting until it is {there}, {seconds:g} s at most")
            is_said = True
        await asyncio.sleep(_LOOK_S)
    if seconds:
        sampler.note(f"not {there} after {seconds:g} s")
    return False


def _is_smallest(sampler: Sampler) -> bool:
    for name, bounds in sampler.service.bounds.items():
        counts = [sampler.now.get(name, {}).get(what) for what in ("ready", "pending", "terminating")]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts) or sum(known) > bounds.fewest or (known[0] < bounds.fewest):
            return False
    return True


def _is_seen(sampler: Sampler) -> bool:
    return all(sampler.now.get(name, {}).get("ready") is not None for name in sampler.service.bounds)


def _result(
    service: Service,
    target: Target,
    plan: Plan,
    schedule: Schedule,
    sampler: Sampler,
    measured: Measured,
    origin: float,
) -> AutoscaleResult:
    samples, pods = sampler.samples(origin), sampler.pods(origin)
    findings = find(service.bounds, samples, pods, measured.records, schedule.rises)
    rises = [
        (step["second"], f"step to {step['rate']:.3g} requests/s") for step in findings["steps"] if step["second"]
    ]
    return AutoscaleResult(
        name=plan.scenario.name,
        scenario=plan.scenario.model_dump(mode="json"),
        target=target,
        deployment_mode=service.mode,
        level=summarise(plan.scenario.name, measured, slos_of(plan.scenario)),
        samples=samples,
        pods=with_first_answer(pods, measured.records),
        notes=sorted([*sampler.notes(origin), *rises]),
        statuses_per_second=statuses_per_second(measured.records),
        findings=findings,
        problems=problems(plan.expectations, findings),
    )
