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
from florence2_loadtest.cluster.panic import NAMESPACE
from florence2_loadtest.cluster.sampler import Sampler, find_service
from florence2_loadtest.cluster.service import Service
from florence2_loadtest.generator import Measured, run_open
from florence2_loadtest.results import AutoscaleResult, Record, Target
from florence2_loadtest.scenario import OpenLoad, Scenario
from florence2_loadtest.schedules import parse_schedule
from florence2_loadtest.summary import summarise
from florence2_loadtest.transport import open_transport
from florence2_loadtest.workload import build_workload

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
        wait_after_s: The same after the load.
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
    wait_after_s: float = 300.0
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
        ValueError: If the scenario has no schedule, or the URL doesn't fit its protocol.
    """
    load = plan.scenario.load
    if not isinstance(load, OpenLoad):
        raise ValueError(f"scenario {plan.scenario.name}: scaling is watched under a schedule (load.schedule)")
    schedule = parse_schedule(load.schedule, plan.scenario.seed)
    say(f"{plan.scenario.name}: {len(schedule.starts)} requests in {schedule.seconds:g} s")
    workload = build_workload(plan.scenario, plan.model_name)
    service = await _ready_service(api, plan, say)
    target = Target(
        url=plan.url or service.local_url(plan.scenario.protocol),
        protocol=plan.scenario.protocol,
        keep_alive=plan.scenario.keep_alive,
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

        async def mark() -> None:
            nonlocal origin
            if origin is None:  # it is called at the end, too
                origin = time.monotonic()
                sampler.note("the load begins")

        measured = await run_open(
            transport, workload, schedule, plan.scenario.timeout_s, plan.scenario.retries, load.grace_s,
            max_in_flight=load.max_in_flight, mark=mark,
        )  # fmt: skip
        sampler.note("the load is over")
        await _shrink(sampler, plan.wait_after_s, "back at the fewest replicas", say)
        await asyncio.sleep(_SETTLED_S)
    assert origin is not None
    result = _result(service, target, plan, sampler, measured, origin)
    if plan.wait_before_s and not began_from_fewest:
        result.problems.insert(0, "the load began while there were more than the fewest replicas")
    return result, measured.records


async def _ready_service(api: Api, plan: Plan, say: Callable[[str], None]) -> Service:
    """Waits until the service says that it is ready.

    Raises:
        ClusterError: If it doesn't.
    """
    end, is_said = time.monotonic() + plan.wait_ready_s, False
    while True:
        service = await asyncio.to_thread(find_service, api, plan.name, plan.namespace)
        if service.is_ready:
            return service
        if time.monotonic() >= end:
            raise ClusterError(
                f"inferenceservice {plan.namespace}/{plan.name} isn't ready, after {plan.wait_ready_s:g} s"
            )
        if not is_said:
            say(f"waiting for inferenceservice {plan.namespace}/{plan.name} to be ready")
            is_said = True
        await asyncio.sleep(2 * _LOOK_S)


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
    service: Service, target: Target, plan: Plan, sampler: Sampler, measured: Measured, origin: float
) -> AutoscaleResult:
    samples, pods = sampler.samples(origin), sampler.pods(origin)
    findings = find(service.bounds, samples, pods, measured.records)
    rises = [
        (step["second"], f"step to {step['rate']:.3g} requests/s") for step in findings["steps"] if step["second"]
    ]
    return AutoscaleResult(
        name=plan.scenario.name,
        scenario=plan.scenario.model_dump(mode="json"),
        target=target,
        deployment_mode=service.mode,
        level=summarise(
            plan.scenario.name, measured, {item.task: item.slo for item in plan.scenario.mix if item.slo is not None}
        ),
        samples=samples,
        pods=with_first_answer(pods, measured.records),
        notes=sorted([*sampler.notes(origin), *rises]),
        statuses_per_second=statuses_per_second(measured.records),
        findings=findings,
        problems=problems(plan.expectations, findings),
    )
