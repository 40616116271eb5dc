"""Plots of a sweep: which settings did best, what each of them does, and what the best cost in latency."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from florence2_loadtest import formats
from florence2_loadtest.plots import style
from florence2_loadtest.plots.run import load_of
from florence2_loadtest.plots.style import BLUE, GREEN, GREY, INK, MUTED, ORANGE, SKY, Plot
from florence2_loadtest.results import Level, SweepResult, Trial
from florence2_loadtest.sweep.confirmation import searched
from florence2_loadtest.trials import (
    default_trial,
    label,
    ranked,
    representative,
    setting_of,
    slo_of,
    unit_of,
    varied_settings,
)

TOP = 10
_ACROSS = 3  # panels side by side
_MOST_ABREAST = 5  # points of one value
_MOST_COLUMNS = 6  # settings beside the bars


def top_plot(result: SweepResult) -> Plot | None:
    """The objective of the best configurations and of the default."""
    shown = ranked(result)[:TOP]
    default = default_trial(result)
    if default is not None and default.score is not None and default not in shown:
        shown.append(default)
    if not shown:
        return None
    return Plot(
        f"The best by {result.objective}",
        "Bars: " + "; ".join(f"{label(t, result)}: {formats.digits(t.score)}" for t in shown) + ".",
        1.3 + 0.25 * len(shown),
        lambda figure: _draw_top(figure, result, shown, default),
    )


def _draw_top(figure: FigureBase, result: SweepResult, shown: Sequence[Trial], default: Trial | None) -> None:
    names = varied_settings(result)[:_MOST_COLUMNS]
    left, axes = figure.subplots(
        1, 2, sharey=True, width_ratios=[0.72 * max(1, len(names)), max(2.0, 6.4 - 0.72 * len(names))]
    )
    for place, trial in enumerate(shown):
        score = trial.score or 0.0
        colour = GREEN if trial.number == result.best else GREY if trial is default else BLUE
        axes.barh(place, score, height=0.62, color=colour)
        words = (("recommended", trial.number == result.best), ("default", trial is default))
        word = ", ".join(word for word, holds in words if holds)
        style.beside(axes, f"{formats.digits(score)}  {word}".rstrip(), score, place)
    axes.set_xlim(0, 1.25 * max(trial.score or 0.0 for trial in shown) or 1)
    axes.set_xlabel(f"{result.objective} ({unit_of(result)})")
    style.grid(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelleft=False)
    _write_settings(left, names, shown)
    left.set_ylim(len(shown) - 0.5, -0.5)


def _write_settings(axes: Axes, names: Sequence[str], shown: Sequence[Trial]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, max(1, len(names)))
    for column, name in enumerate(names):
        axes.text(column + 0.5, -0.65, name.replace("_", "\n"), size=style.SMALL_PT, color=MUTED, ha="center")
        for place, trial in enumerate(shown):
            value = _value(setting_of(trial, name))
            axes.text(column + 0.5, place, formats.shorten(value, 12), ha="center", va="center")


def effects_plot(result: SweepResult) -> Plot | None:
    """The objective by each parameter's value, whatever the others were."""
    scored = [trial for trial in searched(result.trials) if trial.score is not None]
    values = {name: _values(name, result, scored) for name in result.space}
    varied = {name: found for name, found in values.items() if len(found) > 1}
    if not varied:
        return None
    rows = -(-len(varied) // _ACROSS)
    what = "; ".join(
        f"{name}: " + ", ".join(f"{value} {formats.digits(fmean(_scores(scored, name, value)))}" for value in found)
        for name, found in varied.items()
    )
    return Plot(
        f"Mean {result.objective} by setting",
        f"A panel a setting, points for trials and a line through their means. Means: {what}.",
        0.3 + 2.1 * rows,
        lambda figure: _draw_effects(figure, result, varied, scored),
    )


def _values(name: str, result: SweepResult, scored: Sequence[Trial]) -> list[Any]:
    return [value for value in result.space[name] if _scores(scored, name, value)]


def _scores(trials: Sequence[Trial], name: str, value: Any) -> list[float]:
    return [t.score for t in trials if t.score is not None and name in t.settings and t.settings[name] == value]


def _draw_effects(
    figure: FigureBase, result: SweepResult, varied: dict[str, list[Any]], scored: Sequence[Trial]
) -> None:
    across = min(_ACROSS, len(varied))
    rows = -(-len(varied) // across)
    panels = figure.subplots(rows, across, sharey=True, squeeze=False)
    for axes in panels.flat[len(varied) :]:
        axes.set_visible(False)
    for axes, (name, values) in zip(panels.flat, varied.items(), strict=False):
        for place, value in enumerate(values):
            scores = _scores(scored, name, value)
            # Side by side as far as they would cover each other.
            abreast = min(_MOST_ABREAST, len(scores))
            offsets = [0.12 * (index % abreast - (abreast - 1) / 2) for index in range(len(scores))]
            axes.scatter([place + o for o in offsets], scores, s=9, color=SKY, alpha=0.75, linewidths=0)
        means = [fmean(_scores(scored, name, value)) for value in values]
        axes.plot(range(len(values)), means, color=BLUE, marker="o")
        axes.set_xticks(range(len(values)), [formats.shorten(_value(value), 14) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_title(formats.shorten(name, 32))
        style.grid(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel(f"{formats.shorten(result.objective, 22)} ({unit_of(result)})")


def _value(value: Any) -> str:
    return "unset" if value is None else str(value)


def trade_plot(result: SweepResult) -> Plot | None:
    """Throughput against latency of every trial, and those that no other beats in both."""
    points = [
        (trial, level) for trial in searched(result.trials) if (level := representative(trial, result)) is not None
    ]
    if not points:
        return None
    admissible = sum(trial.admissible is not False for trial, _ in points)
    return Plot(
        "Throughput against latency",
        f"A point for each of {len(points)} configurations, {admissible} of them admissible; a line joins those that "
        "no other beats in both.",
        3.2,
        lambda figure: _draw_trade(figure, result, points),
    )


def _draw_trade(figure: FigureBase, result: SweepResult, points: Sequence[tuple[Trial, Level]]) -> None:
    axes = figure.subplots()
    limit = slo_of(result)
    name = limit.statistic if limit else "p95"
    field = f"{name.replace('.', '')}_s"
    places = [(getattr(level.latency, field), level.throughput) for _, level in points]
    fit = [place for place, (trial, _) in zip(places, points, strict=True) if trial.admissible is not False]
    unfit = [place for place, (trial, _) in zip(places, points, strict=True) if trial.admissible is False]
    if fit:
        axes.plot(*zip(*frontier(fit), strict=True), color=MUTED, linewidth=0.9, label="unbeaten in both")
        axes.scatter([x for x, _ in fit], [y for _, y in fit], s=20, color=BLUE, linewidths=0, label="admissible")
    if unfit:
        axes.scatter(
            [x for x, _ in unfit],
            [y for _, y in unfit],
            s=22,
            marker="x",
            color=ORANGE,
            linewidths=1.1,
            label="inadmissible",
        )
    default = default_trial(result)
    for place, (trial, _) in zip(places, points, strict=True):
        best = trial.number == result.best
        if best or trial is default:
            colour = GREEN if best else INK
            axes.scatter(*place, s=60, facecolor="none", edgecolor=colour, linewidths=1.4)
            word = "recommended" if best else "default"
            axes.annotate(word, place, xytext=(7, 7 if best else -13), textcoords="offset points", color=colour)
    axes.margins(0.08, 0.14)
    if limit and axes.get_xlim()[0] < limit.limit_s < axes.get_xlim()[1]:
        axes.axvline(limit.limit_s, color=ORANGE, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.set_xlabel(f"latency, {name} (s)" + (f"; limit {result.constraint}" if limit else ""))
    axes.set_ylabel("throughput (answers/s)")
    style.grid(axes, "both")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2, handlelength=1.2, labelcolor=INK)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns (latency, throughput) of those than which none is both faster and as quick, by latency."""
    edge: list[tuple[float, float]] = []
    for latency, throughput in sorted(points, key=lambda point: (point[0], -point[1])):
        if not edge or throughput > edge[-1][1]:
            edge.append((latency, throughput))
    return edge


def concurrency_plot(result: SweepResult) -> Plot | None:
    """Throughput and latency against concurrency of the three best configurations and the default."""
    shown = ranked(result)[:3]
    default = default_trial(result)
    if default is not None and default.levels and default not in shown:
        shown.append(default)
    shown = [trial for trial in shown if trial.levels]
    if not shown or max(len({load_of(level) for level in trial.levels}) for trial in shown) < 2:
        return None
    names = [label(trial, result) for trial in shown]
    return Plot(
        "The best against concurrency",
        "Lines of throughput and latency over concurrency for " + "; ".join(names) + ".",
        3.1 + 0.2 * len(shown),
        lambda figure: _draw_concurrency(figure, shown, names),
    )


def _draw_concurrency(figure: FigureBase, shown: Sequence[Trial], names: Sequence[str]) -> None:
    left, right = figure.subplots(1, 2)
    for trial, name, colour, marker in zip(shown, names, cycle(style.CYCLE), cycle("os^D"), strict=False):
        levels = sorted(trial.levels, key=load_of)
        xs = [load_of(level) for level in levels]
        for axes, ys in (
            (left, [level.throughput for level in levels]),
            (right, [level.latency.p95_s for level in levels]),
        ):
            axes.plot(xs, ys, marker=marker, color=colour, label=formats.shorten(name, 90), alpha=0.9)
    for axes, title in ((left, "Throughput (answers/s)"), (right, "Latency, 95 % (s)")):
        axes.set_title(title)
        axes.set_xlabel("concurrency")
        axes.set_xlim(left=0)
        style.from_zero(axes)
        style.grid(axes)
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower left", ncols=1)
