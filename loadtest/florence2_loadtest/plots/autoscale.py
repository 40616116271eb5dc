"""Plots of a scaling test: replicas over the request rate, and how pods became ready."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from florence2_loadtest import formats
from florence2_loadtest.plots import style
from florence2_loadtest.plots.run import draw_rates
from florence2_loadtest.plots.style import BLUE, BROWN, GREY, INK, MUTED, ORANGE, PURPLE, SKY, Plot
from florence2_loadtest.results import OK, AutoscaleResult, PodTimes

_ROW_IN, _PANEL_IN = 0.24, 1.25
_MOST_PODS, _MOST_STATUSES = 40, 6
_STEPS = (
    ("scheduled_s", "waiting for a node", GREY),
    ("pulled_s", "image", BROWN),
    ("started_s", "container start", SKY),
    ("loaded_s", "model load", BLUE),
    ("ready_s", "readiness", PURPLE),
    ("first_answer_s", "to the first answer", ORANGE),
)


def replica_timeline(result: AutoscaleResult, path: Path) -> None:
    """Draws replicas of all components over the request rate into a PNG, SVG or PDF, by the path's suffix."""
    timeline_plot(result).save(path)


def timeline_plot(result: AutoscaleResult) -> Plot:
    """Replicas ready, desired and pending over the request rate, with statuses and what happened when."""
    components = _components(result)
    most = "; ".join(
        f"{component}: up to {formats.count(_most(_series(result, component, 'ready')))} ready, "
        f"{formats.count(_most(_series(result, component, 'desired')))} desired"
        for component in components
    )
    events = ", ".join(f"{text} at {second:.0f} s" for second, text in result.notes)
    statuses = _statuses(result)
    notes = 0.2 * min(4, len(result.notes)) + 0.1
    return Plot(
        "Replicas over the request rate",
        f"Request rate and replicas by the second. {most or 'no component was seen'}. {events or 'No notes'}.",
        0.4 + notes + 1.6 + _PANEL_IN * len(components) + (0.3 + 0.2 * len(statuses) if statuses else 0),
        lambda figure: _draw_timeline(figure, result, components, statuses),
    )


def _components(result: AutoscaleResult) -> list[str]:
    return list(dict.fromkeys(name for sample in result.samples for name in sample.components))


def _series(result: AutoscaleResult, component: str, name: str) -> list[float]:
    """Returns what was sampled; NaN, which is a gap, where nobody told."""
    values = [sample.components.get(component, {}).get(name) for sample in result.samples]
    return [math.nan if value is None else value for value in values]


def _most(values: Sequence[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=0.0)


def _statuses(result: AutoscaleResult) -> list[str]:
    """Returns who said what, other than answers, the most frequent first."""
    counted: Counter[str] = Counter()
    for row in result.statuses_per_second:
        counted[_status(row)] += int(row.get("count", 0))
    return [name for name, count in counted.most_common(_MOST_STATUSES) if count and not name.endswith(f"{OK}")]


def _status(row: dict[str, object]) -> str:
    return " ".join(str(row[key]) for key in ("component", "status") if row.get(key))


def _draw_timeline(
    figure: FigureBase, result: AutoscaleResult, components: Sequence[str], statuses: Sequence[str]
) -> None:
    heights = [1.4, *(1.0 for _ in components), *([0.25 + 0.16 * len(statuses)] if statuses else [])]
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    last = max(
        [sample.second + 1 for sample in result.samples]
        + [row["second"] + 1 for row in result.level.per_second]
        + [second for second, _ in result.notes],
        default=1.0,
    )
    if result.level.per_second:
        draw_rates(panels[0], result.level, "")
    else:
        style.say_nothing(panels[0], "no requests were counted by the second")
    for component, axes in zip(components, panels[1:], strict=False):
        _draw_replicas(axes, result, component)
    if statuses:
        _draw_statuses(panels[-1], result, statuses)
    first = min([0.0, *(sample.second for sample in result.samples[:1]), *(second for second, _ in result.notes)])
    _write_notes(panels, result.notes, first, last)
    panels[-1].set_xlim(first, last)
    panels[-1].set_xlabel("seconds from the beginning")


def _draw_replicas(axes: Axes, result: AutoscaleResult, component: str) -> None:
    xs = [sample.second for sample in result.samples]
    ready, pending, leaving, desired = (
        _series(result, component, name) for name in ("ready", "pending", "terminating", "desired")
    )
    if xs:  # the last sample lasts as long as the others
        xs = [*xs, xs[-1] + 1]
        ready, desired, pending, leaving = ([*ys, ys[-1]] for ys in (ready, desired, pending, leaving))
    axes.fill_between(xs, ready, step="post", color=BLUE, alpha=0.75, linewidth=0, label="ready")
    stacked = [a + b for a, b in zip(ready, pending, strict=True)]
    axes.fill_between(
        xs, ready, stacked, step="post", facecolor="none", edgecolor=ORANGE, hatch="////", linewidth=0, label="pending"
    )
    if _most(leaving):
        axes.step(xs, leaving, where="post", color=BROWN, linewidth=1.2, linestyle=":", label="terminating")
    axes.step(xs, desired, where="post", color=INK, linewidth=1.2, label="desired")
    top = max(1.0, _most(stacked), _most(desired))
    axes.set_ylim(0, 1.3 * top)
    style.whole_numbers(axes, most=4)
    axes.set_title(component)
    axes.set_ylabel("replicas")
    style.grid(axes)
    _mark_states(axes, result, component)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=6,
        borderaxespad=0.2,
        handlelength=1.2,
        labelcolor=INK,
        fontsize=style.SMALL_PT,
        columnspacing=1.0,
    )


def _mark_states(axes: Axes, result: AutoscaleResult, component: str) -> None:
    """Draws Knative's panic and the activator's time in the path as bars at the top."""
    for name, label, colour, at in (
        ("panicking", "panic", ORANGE, 0.97),
        ("activator_in_path", "activator in path", PURPLE, 0.9),
    ):
        spans = _spans([(s.second, bool(s.components.get(component, {}).get(name))) for s in result.samples])
        for index, (begin, end) in enumerate(spans):
            axes.plot(
                (begin, end),
                (at, at),
                color=colour,
                linewidth=3,
                solid_capstyle="butt",
                transform=axes.get_xaxis_transform(),
                label=label if index == 0 else None,
            )


def _spans(states: Sequence[tuple[float, bool]]) -> list[tuple[float, float]]:
    """Returns from when to when a state lasted, as often as it did."""
    spans: list[tuple[float, float]] = []
    for second, state in states:
        if state and spans and spans[-1][1] >= second - 0.01:
            spans[-1] = (spans[-1][0], second + 1)
        elif state:
            spans.append((second, second + 1))
    return spans


def _draw_statuses(axes: Axes, result: AutoscaleResult, statuses: Sequence[str]) -> None:
    for row in result.statuses_per_second:
        name = _status(row)
        if name in statuses:
            axes.barh(statuses.index(name), 1, left=row["second"], height=0.6, color=ORANGE)
    axes.set_yticks(range(len(statuses)), [formats.shorten(name, 24) for name in statuses])
    axes.set_ylim(len(statuses) - 0.4, -0.6)
    axes.set_title("not answered")
    style.grid(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _write_notes(panels: Sequence[Axes], notes: Sequence[tuple[float, str]], first: float, last: float) -> None:
    """Draws what happened when as lines through all panels, its words above, in as few rows as they need."""
    ends: list[float] = []  # of each row's words so far, in seconds
    for second, text in sorted(notes):
        for axes in panels:
            axes.axvline(second, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        words = formats.shorten(text, 50)
        width = (last - first) * 0.0125 * len(words)  # of a character at this size, by the plot's width
        left = second if second + width <= last else max(first, last - width)
        row = next((index for index, end in enumerate(ends) if end < left), len(ends))
        ends[row:] = [left + width, *ends[row + 1 :]]
        panels[0].annotate(
            words,
            (left, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 18 + 11 * row),
            textcoords="offset points",
            size=style.SMALL_PT,
            color=MUTED,
            ha="left",
        )


def pods_plot(result: AutoscaleResult) -> Plot | None:
    """Each pod's way from its creation to its first answer."""
    pods = sorted(result.pods, key=lambda pod: pod.created_s)[:_MOST_PODS]
    if not pods:
        return None
    ways = "; ".join(
        f"{pod.component} at {pod.created_s:.0f} s: "
        + (f"ready after {pod.ready_s:.1f} s" if pod.ready_s is not None else "never ready")
        for pod in pods
    )
    return Plot(
        "Pods' way to their first answer",
        f"A bar for each pod, by phase. {ways}.",
        1.1 + _ROW_IN * len(pods),
        lambda figure: _draw_pods(figure, pods),
    )


def _draw_pods(figure: FigureBase, pods: Sequence[PodTimes]) -> None:
    axes = figure.subplots()
    used = set()
    for place, pod in enumerate(pods):
        last = 0.0
        for field, label, colour in _STEPS:
            after = getattr(pod, field)
            if after is None:
                continue
            # The cluster tells whole seconds of some: nothing comes before what it needs.
            axes.barh(place, max(0.0, after - last), left=pod.created_s + last, height=0.62, color=colour)
            last = max(last, after)
            used.add(label)
        words = "never ready" if pod.ready_s is None else f"{last:.1f} s"
        style.beside(axes, words, pod.created_s + last, place)
    axes.set_yticks(range(len(pods)), [f"{pod.component} {_tail(pod.name)}" for pod in pods])
    axes.invert_yaxis()
    furthest = max(pod.created_s + max(getattr(pod, field) or 0.0 for field, _, _ in _STEPS) for pod in pods)
    first = min(pod.created_s for pod in pods)
    margin = 0.12 * max(1.0, furthest - first)
    axes.set_xlim(first - margin / 6, furthest + margin)
    axes.set_xlabel("seconds from the beginning of the run")
    style.grid(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [axes.barh(0, 0, color=colour, label=label) for _, label, colour in _STEPS if label in used]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=6, handlelength=0.9, columnspacing=1.0)


def _tail(name: str) -> str:
    """Returns the part of a pod's name that no other has."""
    return textwrap.shorten(name.rsplit("-", 1)[-1], 12, placeholder="…")
