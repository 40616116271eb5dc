"""Curves of percentiles, with the rare slow requests as wide as the usual ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from florence2_loadtest import formats
from florence2_loadtest.plots import style
from florence2_loadtest.plots.run import names_of
from florence2_loadtest.plots.style import BLUE, FAINT, GREEN, GREY, Plot
from florence2_loadtest.results import Level, Times

_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
_MOST_CURVES = 10


def percentiles_plot(levels: Sequence[Level]) -> Plot | None:
    """Latency over percentile of each level, as HdrHistogram's users know it."""
    told = [level for level in levels if len(level.latency.curve) > 1]
    if not told:
        return None
    # Of many levels: evenly spread ones, the first and the last among them.
    shown = [told[round(i * (len(told) - 1) / (_MOST_CURVES - 1))] for i in range(_MOST_CURVES)]
    shown = shown if len(told) > _MOST_CURVES else told
    what = "; ".join(
        f"{level.name}: 50 % {formats.seconds(level.latency.p50_s)}, 99 % {formats.seconds(level.latency.p99_s)}, "
        f"99.9 % {formats.seconds(level.latency.p999_s)}"
        for level in shown
    )
    title = "Latency by percentile" + (f", {len(shown)} of {len(told)} levels" if len(shown) < len(told) else "")
    curves = [
        (formats.shorten(name.strip("<>"), 26), level.latency, colour)
        for name, level, colour in zip(names_of(shown), shown, cycle(style.CYCLE), strict=False)
    ]
    return Plot(title, f"Lines of latency over percentile. {what}.", 3.0, lambda figure: _draw(figure, curves))


def lateness_plot(level: Level) -> Plot | None:
    """Of an open loop: latency from the intended start, the service's own time, and how late requests went out."""
    if level.mode != "open" or len(level.latency.curve) < 2:
        return None
    curves = [
        ("latency", level.latency, BLUE),
        ("service time", level.service, GREEN),
        ("slip", level.slip, GREY),
    ]
    return Plot(
        f"Latency, service time and slip: {formats.shorten(level.name)}",
        "; ".join(
            f"{name}: 50 % {formats.seconds(times.p50_s)}, 99 % {formats.seconds(times.p99_s)}"
            for name, times, _ in curves
        )
        + ".",
        2.8,
        lambda figure: _draw(figure, [curve for curve in curves if len(curve[1].curve) > 1]),
    )


def _draw(figure: FigureBase, curves: Sequence[tuple[str, Times, str]]) -> None:
    axes = figure.subplots()
    ends = []
    # No further than one of the requests: beyond that there is nothing to know.
    furthest = max(_place(100.0, times.count) for _, times, _ in curves)
    for index, (name, times, colour) in enumerate(curves):
        points = [(_place(percentile, times.count), seconds) for percentile, seconds in times.curve]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle="-" if index < len(style.CYCLE) else "--")
        ends.append((points[-1][1], name, colour))
        axes.plot(*points[-1], marker="o", markersize=3, color=colour)
    _percent_axis(axes, furthest)
    style.from_zero(axes)
    axes.set_ylabel("seconds")
    style.grid(axes)
    style.label_ends(axes, ends)


def _place(percentile: float, count: int) -> float:
    """1 / (1 - p), bounded by the count: the largest of 1000 requests is no more than their 99.9th percentile."""
    return min(1 / max(1e-9, 1 - percentile / 100), float(max(2, count)))


def _percent_axis(axes: Axes, furthest: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(1, furthest)
    shown = [tick for tick in _TICKS if 1 / (1 - tick / 100) <= furthest * 1.001]
    axes.set_xticks([1 / (1 - tick / 100) for tick in shown], [f"{tick:g} %" for tick in shown])
    axes.minorticks_off()
    for tick in shown:
        axes.axvline(1 / (1 - tick / 100), color=FAINT, linewidth=0.6, zorder=0)
    axes.set_xlabel("share of requests answered within")
