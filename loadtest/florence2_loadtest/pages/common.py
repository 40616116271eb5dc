"""What all kinds of results tell alike: what was tested, on what, and what to beware of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from florence2_loadtest import formats
from florence2_loadtest.results import Level, Result, Target

TOY = "embedded"
_MOST_NAMED = 3


def facts_of(result: Result, target: Target | None, settings: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """Returns what was tested, by whom, where and when."""
    facts: list[tuple[str, str]] = []
    if target is not None:
        where = f"{target.url} ({target.protocol.upper() if target.protocol == 'rest' else 'gRPC'}"
        facts.append(("Target", where + (")" if target.keep_alive else ", a connection for each request)")))
        facts.append(("Model", target.model or "not told"))
        if target.revision:
            facts.append(("Revision", target.revision))
        if target.settings:
            facts.append(("Settings", formats.settings(target.settings)))
        if target.note:
            facts.append(("Note", target.note))
    if settings:
        facts.append(("Settings", formats.settings(settings)))
    if load := _load(result.scenario):
        facts.append(("Load", load))
    host = result.host
    machine = f"{host.get('cpu', 'unknown processor')}, {host.get('cpus', '?')} processors"
    facts.append(("Load came from", f"{machine}, {host.get('system', '?')}, Python {host.get('python', '?')}"))
    facts.append(("When", f"{_date(result.created)}, florence2-kserve {result.version}"))
    return facts


def _load(scenario: dict[str, Any]) -> str:
    """Says in a line what a scenario asks for."""
    load = scenario.get("load") or {}
    said = []
    if "concurrency" in load:
        said.append(f"concurrency {load['concurrency']}")
    if "schedule" in load:
        said.append(f"schedule {load['schedule']}")
    tasks = [str(item.get("task")) for item in scenario.get("mix") or []]
    if tasks:
        how = "one after the other" if scenario.get("separately") else "mixed"
        said.append(f"{len(tasks)} tasks {how}" if len(tasks) > 1 else tasks[0])
    return ", ".join(said)


def _date(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def warnings_of(levels: Iterable[Level], models: Iterable[str | None]) -> list[str]:
    """Returns what a reader of levels has to know before believing them."""
    levels = list(levels)
    said = []
    if TOY in models:
        said.append(
            "The model is the embedded toy: its figures say nothing of Florence-2's speed, only of what surrounds it."
        )
    for reason, names in _grouped((level.generator.bottleneck, level.name) for level in levels):
        said.append(f"The load generator, not the server, set the figures of {_named(names)}: {reason}")
    if unstable := [level.name for level in levels if level.stable is False]:
        said.append(f"Not stable within its windows: {_named(unstable)}.")
    if silent := [level.name for level in levels if not level.answered]:
        said.append(f"Nothing was answered at {_named(silent)}.")
    failed = [level for level in levels if level.failed]
    if failed:
        counted = sum(level.failed for level in failed)
        every = sum(level.answered + level.failed for level in failed)
        kinds = sorted({name for level in failed for name in level.statuses if name not in ("ok", "unsent")})
        said.append(
            f"{formats.count(counted)} of {formats.count(every)} requests failed"
            + (f" ({', '.join(kinds)})" if kinds else "")
            + f", at {_named([level.name for level in failed])}."
        )
    if unsent := [level for level in levels if level.unsent]:
        said.append(
            f"{formats.count(sum(level.unsent for level in unsent))} planned requests were never sent, "
            f"at {_named([level.name for level in unsent])}."
        )
    return said


def _grouped(pairs: Iterable[tuple[str | None, str]]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for reason, name in pairs:
        if reason:
            groups.setdefault(reason, []).append(name)
    return list(groups.items())


def _named(names: Sequence[str]) -> str:
    """Names a few, and says how many more there are."""
    names = list(dict.fromkeys(names))
    shown = [formats.shorten(name, 40) for name in names[:_MOST_NAMED]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
