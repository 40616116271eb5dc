"""How many times the baseline's throughput the others have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import FigureBase

from florence2_loadtest import formats
from florence2_loadtest.plots import style
from florence2_loadtest.plots.style import BLUE, INK, MUTED, ORANGE, Plot

GOAL = 3.0  # times a baseline's throughput, of a mixed load


def ratios_plot(ratios: Mapping[str, Mapping[str, float]], baseline: str) -> Plot | None:
    """Bars of ratios by run and level, with lines at 1 and at the goal."""
    bars = [
        (level if len(ratios) == 1 else f"{run}: {level}", value)
        for run, levels in ratios.items()
        for level, value in levels.items()
    ]
    if not bars:
        return None
    return Plot(
        f"Throughput ÷ {baseline}'s",
        "Bars: " + ", ".join(f"{name} {formats.ratio(value)}" for name, value in bars) + ".",
        0.9 + 0.27 * len(bars),
        lambda figure: _draw(figure, bars, baseline),
    )


def _draw(figure: FigureBase, bars: Sequence[tuple[str, float]], baseline: str) -> None:
    axes = figure.subplots()
    places = range(len(bars))
    axes.barh(
        places, [value for _, value in bars], height=0.62, color=[BLUE if value >= 1 else ORANGE for _, value in bars]
    )
    for place, (_, value) in zip(places, bars, strict=True):
        style.beside(axes, f"{formats.ratio(value)}", value, place)
    axes.set_yticks(places, [formats.shorten(name, 40) for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(GOAL, *(value for _, value in bars)))
    for at, label in ((1.0, f"as {formats.shorten(baseline, 16)}"), (GOAL, f"goal, {GOAL:g}×")):
        axes.axvline(at, color=INK if at == 1 else MUTED, linewidth=1.0, linestyle="-" if at == 1 else (0, (4, 2)))
        axes.annotate(
            label,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            size=style.SMALL_PT,
            color=MUTED,
        )
    axes.set_xlabel(f"times the throughput of {formats.shorten(baseline, 24)}")
    style.grid(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
