"""Plots of a run: what came at which load, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from florence2_loadtest import formats
from florence2_loadtest.plots import style
from florence2_loadtest.plots.style import BLUE, BROWN, FAINT, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, SKY, Plot
from florence2_loadtest.results import Level

_MOST_BARS = 24
_MOST_TICKS = 7
_PERCENTILES = (("p50_s", "50 %", SKY), ("p95_s", "95 %", BLUE), ("p99_s", "99 %", PURPLE))
PARTS = (
    ("late sending", GREY),
    ("client send", BROWN),
    ("preprocess", SKY),
    ("queue", ORANGE),
    ("generate", BLUE),
    ("postprocess", PURPLE),
    ("rest: network, other", FAINT),
)


def by_load(levels: Sequence[Level]) -> dict[str, list[Level]]:
    """Returns levels with the same mix, ascending by load; a task measured apart has a row of its own."""
    apart = len({next(iter(level.tasks)) for level in levels if len(level.tasks) == 1}) > 1
    rows: dict[str, list[Level]] = {}
    for level in levels:
        name = next(iter(level.tasks)) if apart and len(level.tasks) == 1 else "mixed" if apart else ""
        rows.setdefault(name, []).append(level)
    return {name: sorted(row, key=load_of) for name, row in rows.items()}


def names_of(levels: Sequence[Level]) -> list[str]:
    """Returns what tells levels apart: their task where each has another at one and the same load, else their name."""
    tasks = [next(iter(level.tasks)) for level in levels if len(level.tasks) == 1]
    if len(set(tasks)) == len(levels) > 1 and len({load_of(level) for level in levels}) == 1:
        return tasks
    return [level.name for level in levels]


def load_of(level: Level) -> float:
    """Returns its concurrency, or its planned rate."""
    return float(level.concurrency or 0) if level.mode == "closed" else float(level.rate or 0.0)


def load_plot(levels: Sequence[Level]) -> Plot | None:
    """Throughput and latency over concurrency or planned rate; bars where there is one load only."""
    if not levels:
        return None
    rows = by_load(levels)
    if max(len({load_of(level) for level in row}) for row in rows.values()) < 2:
        return _bars_plot(levels)
    load = "concurrency" if levels[0].mode == "closed" else "planned rate"
    what = ", ".join(
        f"{name or 'all tasks'}: {formats.rate(row[-1].throughput)} at {formats.digits(load_of(row[-1]))}"
        for name, row in rows.items()
    )
    return Plot(
        f"Throughput and latency against {load}",
        f"Two line charts over {load}: answers a second, and latency. {what}.",
        3.0,
        lambda figure: _draw_load(figure, rows, open_loop=levels[0].mode == "open"),
    )


def _draw_load(figure: FigureBase, rows: dict[str, list[Level]], *, open_loop: bool) -> None:
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.12})
    label = "planned rate (requests/s)" if open_loop else "concurrency (requests in flight)"
    ends = []
    for colour, (name, row) in zip(cycle(style.CYCLE), rows.items(), strict=False):
        xs = [load_of(level) for level in row]
        left.plot(xs, [level.throughput for level in row], marker="o", color=colour)
        ends.append((row[-1].throughput, name, colour))
        if len(rows) == 1 and any(level.goodput is not None for level in row):
            goods = [level.goodput if level.goodput is not None else float("nan") for level in row]
            left.plot(xs, goods, marker="o", markersize=3, color=GREEN, linestyle="--")
            ends = [(row[-1].throughput, "answered", colour), (goods[-1], "within SLO", GREEN)]
    if open_loop:
        most = max(load_of(level) for row in rows.values() for level in row)
        left.plot((0, most), (0, most), color=MUTED, linewidth=0.9, linestyle=":")
        ends = [(y, name or "answered", colour) for y, name, colour in ends] + [(most, "planned", MUTED)]
    style.from_zero(left)
    _over_load(left, "Throughput (answers/s)", label)
    # Names of tasks are long: where there are several lines, they stand at the right plot alone.
    style.label_ends(left, [end for end in ends if end[1] and len(rows) == 1 and end[0] == end[0]])
    _draw_latency(right, rows)
    _over_load(right, "Latency (s)" if len(rows) == 1 else "Latency, 95 % (s)", label)


def _draw_latency(axes: Axes, rows: dict[str, list[Level]]) -> None:
    ends = []
    if len(rows) == 1:
        row = [level for level in next(iter(rows.values())) if level.latency.count]
        for field, name, colour in _PERCENTILES:
            ys = [getattr(level.latency, field) for level in row]
            axes.plot([load_of(level) for level in row], ys, marker="o", color=colour)
            ends += [(ys[-1], name, colour)] if ys else []
    for colour, (name, row) in zip(cycle(style.CYCLE), rows.items() if len(rows) > 1 else (), strict=False):
        answered = [level for level in row if level.latency.count]
        ys = [level.latency.p95_s for level in answered]
        axes.plot([load_of(level) for level in answered], ys, marker="o", color=colour)
        ends += [(ys[-1], formats.shorten(name.strip("<>"), 24), colour)] if ys else []
    style.from_zero(axes)
    style.label_ends(axes, ends)


def _over_load(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.xaxis.set_ticks(_ticks(axes))
    style.grid(axes)
    style.plain_numbers(axes, "x")
    style.plain_numbers(axes)


def _ticks(axes: Axes) -> list[float]:
    measured = sorted({float(x) for line in axes.lines for x in np.asarray(line.get_xdata(), float) if x > 0})
    apart = min((b - a for a, b in pairwise(measured)), default=0.0)
    if len(measured) <= _MOST_TICKS and apart > 0.08 * max(measured, default=0.0):
        return [0, *measured]
    return [tick for tick in axes.get_xticks() if tick >= 0]


def _bars_plot(levels: Sequence[Level]) -> Plot:
    shown = sorted(levels, key=lambda level: -level.throughput)[:_MOST_BARS]
    what = "; ".join(
        f"{level.name}: {formats.rate(level.throughput)}, p95 {formats.seconds(level.latency.p95_s)}"
        for level in shown
    )
    return Plot(
        "Throughput and latency by level",
        f"Bars of answers a second beside latencies. {what}.",
        1.15 + 0.27 * len(shown),
        lambda figure: _draw_bars(figure, shown),
    )


def _draw_bars(figure: FigureBase, levels: Sequence[Level]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(levels))
    left.barh(places, [level.throughput for level in levels], height=0.62, color=BLUE)
    for place, level in zip(places, levels, strict=True):
        style.beside(left, f"{formats.digits(level.throughput)}", level.throughput, place)
        if level.latency.count:
            times = level.latency
            right.plot((times.p50_s, times.p99_s), (place, place), color=FAINT, linewidth=4, solid_capstyle="round")
            for field, _, colour in _PERCENTILES:
                right.plot(getattr(times, field), place, marker="o", color=colour)
    left.set_yticks(places, [formats.shorten(name, 34) for name in names_of(levels)])
    left.invert_yaxis()
    left.set_xlim(0, 1.15 * (left.dataLim.x1 or 1))
    left.set_title("Throughput (answers/s)")
    right.set_title("Latency (s)")
    right.set_xlim(0, 1.08 * right.dataLim.x1 if right.dataLim.x1 > 0 else 1)
    for axes in (left, right):
        style.grid(axes, "x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    handles = [right.plot([], [], "o", color=colour, label=name)[0] for _, name, colour in _PERCENTILES]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, handletextpad=0.1, columnspacing=0.8)


def parts_of(level: Level) -> list[float] | None:
    """Returns means of the parts of a request's time, in the order of `PARTS`; None where no server told.

    The last part is what remains of the latency that clients saw.
    """
    told = level.server
    if told is None or told.generate_s is None or not level.latency.count:
        return None
    late = max(0.0, level.latency.mean_s - level.service.mean_s) if level.mode == "open" else 0.0
    phases = [told.preprocess_s, told.queue_s, told.generate_s, told.postprocess_s]
    parts = [late, level.send_s, *(phase or 0.0 for phase in phases)]
    return [*parts, max(0.0, level.latency.mean_s - sum(parts))]


def breakdown_plot(levels: Sequence[Level]) -> Plot | None:
    """Where the mean request's time went, a bar a level."""
    told = [(level, parts) for level in levels if (parts := parts_of(level))][:_MOST_BARS]
    if not told:
        return None
    level, parts = told[-1]
    most = max(zip(parts, PARTS, strict=True), key=lambda pair: pair[0])
    return Plot(
        "Where the time goes, mean of a request",
        f"Stacked bars by level. At {level.name} the largest part is {most[1][0]}, {formats.seconds(most[0])} of "
        f"{formats.seconds(level.latency.mean_s)}.",
        1.2 + 0.3 * len(told),
        lambda figure: _draw_breakdown(figure, told),
    )


def _draw_breakdown(figure: FigureBase, told: Sequence[tuple[Level, list[float]]]) -> None:
    axes = figure.subplots()
    for place, (level, parts) in enumerate(told):
        begin = 0.0
        for width, (_, colour) in zip(parts, PARTS, strict=True):
            axes.barh(place, width, left=begin, height=0.66, color=colour, edgecolor=style.PAPER, linewidth=0.6)
            begin += width
        style.beside(axes, f"{formats.seconds(level.latency.mean_s)}", begin, place)
    axes.set_yticks(range(len(told)), [formats.shorten(name, 40) for name in names_of([level for level, _ in told])])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(sum(parts) for _, parts in told))
    axes.set_xlabel("seconds")
    style.grid(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    shown = [(name, colour) for i, (name, colour) in enumerate(PARTS) if any(parts[i] > 0 for _, parts in told)]
    handles = [axes.barh(0, 0, color=colour, label=name) for name, colour in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(shown), handlelength=0.9, columnspacing=1.1)


def timeline_plot(level: Level) -> Plot | None:
    """Planned, sent, answered and failed requests by the second of an open loop."""
    if level.mode != "open" or not level.per_second:
        return None
    failed = sum(row.get("failed", 0) for row in level.per_second)
    return Plot(
        f"By the second: {formats.shorten(level.name)}",
        f"{formats.count(level.planned)} requests planned, {formats.count(level.sent)} sent, "
        f"{formats.count(level.answered)} answered, {formats.count(failed)} failed.",
        2.5,
        lambda figure: draw_rates(figure.subplots(), level),
    )


def draw_rates(axes: Axes, level: Level, xlabel: str = "seconds from the beginning") -> None:
    """Draws an open loop's counts by the second."""
    rows = level.per_second
    xs = [*(row["second"] for row in rows), rows[-1]["second"] + 1]  # the last lasts a second too

    def ys(name: str) -> list[int]:
        return [*(row.get(name, 0) for row in rows), rows[-1].get(name, 0)]

    axes.fill_between(xs, ys("planned"), step="post", color=FAINT, linewidth=0, label="planned")
    if ys("sent") != ys("planned"):
        axes.step(xs, ys("sent"), where="post", color=BROWN, linewidth=1.1, linestyle=":", label="sent")
    axes.step(xs, ys("answered"), where="post", color=BLUE, linewidth=1.3, label="answered")
    if any(ys("failed")):
        axes.bar(xs[:-1], ys("failed")[:-1], width=1.0, align="edge", color=ORANGE, label="failed")
    axes.set_xlim(min(xs), max(xs))
    style.from_zero(axes)
    axes.set_ylabel("requests/s")
    axes.set_xlabel(xlabel)
    style.grid(axes)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2, handlelength=1.2, labelcolor=INK)
