"""The report of the same load on several services."""

from __future__ import annotations

from florence2_loadtest.formats import NOTHING, digits, ratio, seconds
from florence2_loadtest.pages.common import facts_of, warnings_of
from florence2_loadtest.pages.document import Headline, Mark, Part, Row, Section, Table, section
from florence2_loadtest.pages.run import verdict_of
from florence2_loadtest.plots.peers import GOAL, ratios_plot
from florence2_loadtest.plots.run import load_plot
from florence2_loadtest.results import Level, PeersResult


def peers_part(result: PeersResult) -> Part:
    """Returns the report of peers."""
    return Part(
        title=result.name,
        facts=[
            *((f"Service {name}", _about(result, name)) for name in result.runs),
            *facts_of(result, None),
        ],
        verdict=_verdict(result),
        headlines=_headlines(result),
        warnings=_warnings(result),
        sections=[
            *section("Ratios", ratios_plot(ratios(result), result.baseline), ratios_table(result)),
            *(each for name in result.runs for each in _alone(result, name)),
        ],
    )


def _alone(result: PeersResult, name: str) -> list[Section]:
    levels = result.runs[name].levels
    return section(f"{name} alone", load_plot(levels), text=verdict_of(levels))


def _about(result: PeersResult, name: str) -> str:
    target = result.runs[name].target
    said = [target.url, target.model or "model not told", target.note]
    return ", ".join(filter(None, said)) + (" (the baseline)" if name == result.baseline else "")


def _levels(result: PeersResult, name: str) -> dict[str, Level]:
    run = result.runs.get(name)
    return {level.name: level for level in run.levels} if run else {}


def ratios(result: PeersResult) -> dict[str, dict[str, float]]:
    """Returns throughput ÷ the baseline's, by run and level; without levels that either lacks answers for."""
    base = _levels(result, result.baseline)
    return {
        name: {
            key: level.throughput / base[key].throughput
            for key, level in _levels(result, name).items()
            if key in base and base[key].throughput > 0 and level.answered
        }
        for name in result.runs
        if name != result.baseline
    }


def ratios_table(result: PeersResult) -> Table | None:
    """Each level of each run beside the baseline's."""
    base, divided = _levels(result, result.baseline), ratios(result)
    rows = []
    for name in divided:
        for key, level in _levels(result, name).items():
            other, times = base.get(key), divided[name].get(key)
            answered = level.latency.count and other is not None and other.latency.count
            faster = other.latency.mean_s / level.latency.mean_s if answered and other is not None else None
            mark: Mark = "bad" if times is None or times < 1 else "best" if times >= GOAL else ""
            rows.append(
                Row(
                    [
                        key,
                        name,
                        digits(level.throughput),
                        digits(other.throughput) if other else NOTHING,
                        ratio(times),
                        _mean(level),
                        _mean(other),
                        ratio(faster),
                    ],
                    mark,
                )
            )
    if not rows:
        return None
    baseline = result.baseline
    columns = ["Load", "Service", "Answers/s", f"{baseline}: answers/s", "Ratio", "Latency", f"{baseline}: latency"]
    return Table(
        "Ratios",
        [*columns, "Times as quick"],
        rows,
        text=frozenset({0, 1}),
        note=f"Ratio: throughput ÷ that of {baseline}. Times as quick: {baseline}'s mean latency ÷ the service's.",
    )


def _mean(level: Level | None) -> str:
    return seconds(level.latency.mean_s) if level is not None and level.latency.count else NOTHING


def _mixed(levels: dict[str, float]) -> str | None:
    return next((key for key in levels if "mixed" in key.lower()), None)


def _extremes(levels: dict[str, float]) -> tuple[str, str]:
    """Returns the loads with the least and the greatest ratio, of single tasks where there are such."""
    apart = [key for key in levels if key != _mixed(levels)] or list(levels)
    return min(apart, key=lambda key: levels[key]), max(apart, key=lambda key: levels[key])


def _verdict(result: PeersResult) -> str:
    said = []
    for name, levels in ratios(result).items():
        if not levels:
            said.append(f"{name} and {result.baseline} have no answered load in common")
            continue
        low, high = _extremes(levels)
        text = f"{ratio(levels[low])} ({low}) to {ratio(levels[high])} ({high})"
        if (mixed := _mixed(levels)) is not None:
            text = f"{ratio(levels[mixed])} on the mixed load, {text} by task"
        said.append(f"{name}'s throughput, divided by {result.baseline}'s, is {text}")
    return "; ".join(said) + "." if said else f"There is nothing to compare {result.baseline} with."


def _headlines(result: PeersResult) -> list[Headline]:
    figures = []
    for name, levels in ratios(result).items():
        if levels:
            shown = dict.fromkeys(filter(None, (_mixed(levels), *_extremes(levels))))
            figures += [Headline(ratio(levels[key]), key, f"{name} ÷ {result.baseline}") for key in shown]
    return figures


def _warnings(result: PeersResult) -> list[str]:
    said: list[str] = []
    for name, run in result.runs.items():
        for warning in warnings_of(run.levels, [run.target.model]):
            if warning not in said:
                said.append(warning if "toy" in warning else f"{name}: {warning}")
    missing = [
        f"{key} of {name}"
        for name, levels in ratios(result).items()
        for key in _levels(result, name)
        if key not in levels
    ]
    return said + ([f"No ratio for {', '.join(missing)}: nothing answered on one side."] if missing else [])
