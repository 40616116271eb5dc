"""The report of a scaling test."""

from __future__ import annotations

from collections import Counter
from typing import Any

from florence2_loadtest.formats import NOTHING, count, digits, seconds, share
from florence2_loadtest.pages.common import facts_of, warnings_of
from florence2_loadtest.pages.document import Headline, Part, Row, Table, section
from florence2_loadtest.pages.run import levels_table
from florence2_loadtest.plots.autoscale import pods_plot, timeline_plot
from florence2_loadtest.plots.percentiles import lateness_plot
from florence2_loadtest.results import AutoscaleResult

_MOST_ROWS = 40
_TITLES = {
    "sent_share": "planned requests sent",
    "first_answer_s": "first answer, from zero",
    "first_answer_parts": "on the way to the first answer",
    "held_longest_s": "longest held before sending on",
    "enough_s": "until replicas sufficed",
    "back_s": "until back at the fewest",
    "gone_s": "until spare pods were gone",
    "replica_s": "replicas × time",
    "surplus_replica_s": "surplus replicas × time",
    "surplus_share": "surplus",
    "activator_s": "activator in the path",
}
_HEADLINES = {"first_answer_s": "first answer", "enough_s": "enough replicas", "back_s": "back down"}
_SHOWN_APART = ("steps",)
_PARTS_IN_SECONDS = ("first_answer_parts",)


def autoscale_part(result: AutoscaleResult) -> Part:
    """Returns the report of a scaling test."""
    level = result.level
    return Part(
        title=result.name,
        facts=[("Deployment mode", result.deployment_mode), *facts_of(result, result.target)],
        verdict=_verdict(result),
        headlines=_headlines(result),
        warnings=[*result.problems, *warnings_of([level], [result.target.model])],
        sections=[
            *section("Replicas over the request rate", timeline_plot(result)),
            *section(
                "Findings",
                findings_table(result),
                components_table(result),
                steps_table(result),
                statuses_table(result),
            ),
            *section("Pods", pods_plot(result), pods_table(result)),
            *section("Latency", lateness_plot(level), levels_table([level])),
        ],
    )


def _verdict(result: AutoscaleResult) -> str:
    level = result.level
    most: dict[str, float] = {}
    for sample in result.samples:
        for component, told in sample.components.items():
            most[component] = max(most.get(component, 0.0), told.get("ready") or 0.0)
    grown = " and ".join(f"{digits(n, 1)} {name}{'s' if n != 1 else ''}" for name, n in most.items())
    said = f"{count(level.answered)} of {count(level.planned)} planned requests were answered"
    said += f", by up to {grown}" if grown else ""
    met = (
        "every expectation was met"
        if not result.problems
        else (f"{len(result.problems)} expectation{'s were' if len(result.problems) > 1 else ' was'} not met")
    )
    return f"{said}; {met}."


def _headlines(result: AutoscaleResult) -> list[Headline]:
    level = result.level
    planned = level.planned or 1
    figures = [
        Headline(share(level.sent / planned), "sent as planned", f"{count(level.planned)} planned"),
        Headline(count(level.failed), "failed after retries", f"{count(level.retried)} retried"),
        Headline(seconds(level.latency.p99_s), "99 % within", "from intended start"),
    ]
    found = [name for name in _HEADLINES if result.findings.get(name) is not None]
    return figures + [Headline(_told(name, result.findings[name]), _HEADLINES[name]) for name in found]


def _words(name: str) -> str:
    return _TITLES.get(name) or name.removesuffix("_s").removesuffix("_share").replace("_", " ")


def findings_table(result: AutoscaleResult) -> Table | None:
    """Findings of the whole."""
    names = [name for name, value in result.findings.items() if not _is_by_component(result, name) and value != []]
    rows = [Row([_words(name), _told(name, result.findings[name])]) for name in names if name not in _SHOWN_APART]
    return Table("Findings", ["Finding", "Value"], rows, text=frozenset({0, 1})) if rows else None


def components_table(result: AutoscaleResult) -> Table | None:
    """Findings of each component, a column a component."""
    components = _components(result)
    told = {name: result.findings.get(name) or {} for name in components}
    names = list(dict.fromkeys(name for found in told.values() for name in found if name not in _SHOWN_APART))
    rows = [Row([_words(name), *(_told(name, told[each].get(name)) for each in components)]) for name in names]
    for name, value in result.findings.items():
        if _is_by_component(result, name) and name not in components:
            rows.append(Row([_words(name), *(_told(name, value.get(each)) for each in components)]))
    columns = frozenset(range(len(components) + 1))
    return Table("By component", ["Finding", *components], rows, text=columns) if rows else None


def steps_table(result: AutoscaleResult) -> Table | None:
    """How soon each rise of the rate was met."""
    found = [
        (component, step)
        for component in _components(result)
        if isinstance(told := result.findings.get(component), dict)
        for step in told.get("steps") or []
    ]
    names = list(dict.fromkeys(name for _, step in found for name in step))
    rows = [Row([component, *(_told(name, step.get(name)) for name in names)]) for component, step in found]
    return Table("Steps", ["Component", *map(_words, names)], rows) if rows else None


def _components(result: AutoscaleResult) -> list[str]:
    return list(dict.fromkeys(name for sample in result.samples for name in sample.components))


def _is_by_component(result: AutoscaleResult, name: str) -> bool:
    value = result.findings[name]
    return name in _components(result) or (
        isinstance(value, dict) and bool(value) and value.keys() <= set(_components(result))
    )


def _told(name: str, value: Any) -> str:
    """Says a finding in words; its name tells its unit."""
    if value is None:
        return NOTHING
    if isinstance(value, dict):
        unit = "_s" if name in _PARTS_IN_SECONDS else ""
        return ", ".join(f"{_words(key)} {_told(key + unit, part)}" for key, part in value.items()) or NOTHING
    if isinstance(value, list):
        return "; ".join(_told(name, part) for part in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if name.endswith("_s"):
        return seconds(float(value))
    if name.endswith("_share"):
        return share(float(value))
    return count(value) if float(value).is_integer() else digits(float(value))


def statuses_table(result: AutoscaleResult) -> Table | None:
    """How often who said what."""
    counted: Counter[tuple[str, str]] = Counter()
    for row in result.statuses_per_second:
        counted[str(row.get("component") or NOTHING), str(row.get("status"))] += int(row.get("count", 0))
    rows = [Row([status, component, count(number)]) for (component, status), number in counted.most_common()]
    return Table("Statuses", ["Status", "By", "Count"], rows, text=frozenset({0, 1})) if rows else None


def pods_table(result: AutoscaleResult) -> Table | None:
    """Each pod's way, in seconds from its creation."""
    names = ("scheduled_s", "pulled_s", "started_s", "loaded_s", "ready_s", "first_answer_s", "gone_s")
    rows = []
    for pod in sorted(result.pods, key=lambda pod: pod.created_s)[:_MOST_ROWS]:
        ways = [getattr(pod, name) for name in names]
        after = [NOTHING if after is None else f"{after:.1f}" for after in ways]
        rows.append(Row([pod.name, f"{pod.created_s:.1f}", *after], "" if pod.ready_s is not None else "bad"))
    if not rows:
        return None
    titles = ["Scheduled", "Image", "Started", "Loaded", "Ready", "First answer", "Gone"]
    return Table(
        "Pods",
        ["Pod", "Created at", *titles],
        rows,
        note="Created: seconds from the beginning; the others: from then.",
    )
