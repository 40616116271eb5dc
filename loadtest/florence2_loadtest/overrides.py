"""What the command line changes about a scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from florence2_kserve.tasks import TASKS, find_task
from florence2_loadtest.scenario import Scenario, explain
from florence2_loadtest.summary import slos_of

_OF_CLOSED = ("window_s", "max_windows", "max_requests")


def override(
    scenario: Scenario,
    *,
    tasks: str | None = None,
    slos: Sequence[str] = (),
    concurrency: str | None = None,
    schedule: str | None = None,
    pictures: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    load: Mapping[str, Any] | None = None,
    others: Mapping[str, Any] | None = None,
) -> Scenario:
    """Returns a scenario with what was given in the place of its own.

    Args:
        scenario: The scenario.
        tasks: ``CAPTION,OD``, or ``all``; weights, texts and SLOs of those that it has are kept.
        slos: ``p95<2s`` for all tasks, or ``OD=p95<2s`` for one.
        concurrency: Makes it a closed loop.
        schedule: Makes it an open one.
        pictures: A folder.
        parameters: Request parameters, beside its own.
        load: Fields of the load.
        others: Fields of the scenario.

    Raises:
        ValueError: If something is wrong; says what and where.
    """
    content = scenario.model_dump()
    if concurrency is not None and schedule is not None:
        raise ValueError("a closed loop has a concurrency, an open one a schedule: give one of them")
    if concurrency is not None:
        content["load"] = _kept(content["load"], "schedule") | {"concurrency": concurrency}
    if schedule is not None:
        content["load"] = _kept(content["load"], "concurrency") | {"schedule": schedule}
    content["load"] |= {name: value for name, value in (load or {}).items() if value is not None}
    if "schedule" in content["load"] and (wrong := [name for name in _OF_CLOSED if name in content["load"]]):
        raise ValueError(f"an open loop goes by its schedule, it has no {', '.join(wrong)}")
    if tasks is not None:
        content["mix"] = _mix(content["mix"], tasks)
    for slo in slos:
        _set_slo(content["mix"], slo)
    if pictures is not None:
        content["pictures"] |= {"folder": pictures}
    content["parameters"] |= dict(parameters or {})
    content |= {name: value for name, value in (others or {}).items() if value is not None}
    try:
        overridden = Scenario.model_validate(content)
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    slos_of(overridden)
    return overridden


def _kept(load: dict[str, Any], other: str) -> dict[str, Any]:
    """Returns a load's fields, if it isn't of the `other` kind."""
    return {} if other in load else load


def _mix(mix: list[dict[str, Any]], tasks: str) -> list[dict[str, Any]]:
    known = {item["task"]: item for item in mix}
    try:
        names = list(TASKS) if tasks.strip() == "all" else [find_task(name).name for name in tasks.split(",")]
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    return [known.get(name, {"task": name}) for name in dict.fromkeys(names)]


def _set_slo(mix: list[dict[str, Any]], text: str) -> None:
    task, equals, slo = text.rpartition("=")
    try:
        chosen = [item for item in mix if not equals or item["task"] == find_task(task).name]
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    if not chosen:
        raise ValueError(f"the SLO {text!r} is of a task that isn't asked")
    for item in chosen:
        item["slo"] = slo
