"""The report of a sweep."""

from __future__ import annotations

from typing import Any

from florence2_kserve.settings import Settings
from florence2_loadtest import formats
from florence2_loadtest.formats import NOTHING, count, digits, ratio, seconds
from florence2_loadtest.pages.common import facts_of, warnings_of
from florence2_loadtest.pages.document import Headline, Mark, Part, Row, Table, section
from florence2_loadtest.plots.sweep import TOP, concurrency_plot, effects_plot, top_plot, trade_plot
from florence2_loadtest.results import SweepResult, Trial
from florence2_loadtest.trials import (
    best_trial,
    default_trial,
    gain,
    label,
    noise_of,
    ranked,
    representative,
    unit_of,
)

_MOST_ROWS = 40


def sweep_part(result: SweepResult) -> Part:
    """Returns the report of a sweep."""
    judged = [level for trial in ranked(result)[:TOP] if (level := representative(trial, result)) is not None]
    return Part(
        title=result.name,
        facts=[
            ("Tuned", {"both": "transformer and predictor"}.get(result.target, result.target)),
            (
                "Objective",
                f"{'highest' if result.direction == 'maximize' else 'lowest'} {result.objective}"
                + _constraint(result),
            ),
            ("Searched", formats.settings({name: _choices(values) for name, values in result.space.items()})),
            *([("Held fixed", formats.settings(fixed))] if (fixed := _fixed(result)) else []),
            *facts_of(result, None),
        ],
        verdict=_verdict(result),
        headlines=_headlines(result),
        warnings=[*warnings_of(judged, [_model(result)]), *_doubts(result)],
        sections=[
            *section("Best configurations", top_table(result), top_plot(result)),
            *section("The best against concurrency", concurrency_plot(result)),
            *section(
                "What each setting does", effects_plot(result), text="Means over whatever the others were set to."
            ),
            *section("Throughput against latency", trade_plot(result)),
            *section("Left out", left_out_table(result)),
        ],
    )


def _constraint(result: SweepResult) -> str:
    return f" with {result.constraint}" if result.constraint else ""


def _choices(values: list[Any]) -> str:
    return "[" + ", ".join("unset" if value is None else str(value) for value in values) + "]"


def _fixed(result: SweepResult) -> dict[str, Any]:
    default = default_trial(result)
    return dict(default.settings) if default else {}


def _model(result: SweepResult) -> str | None:
    return str(_fixed(result).get("model", Settings.model_fields["model"].default))


def _verdict(result: SweepResult) -> str:
    best, default = best_trial(result), default_trial(result)
    if best is None or best.score is None:
        return f"None of {len(result.trials)} trials can be recommended."
    said = f"Recommended: {label(best, result)}, with {result.objective} {digits(best.score)} {unit_of(result)}"
    if default is best:
        return f"The defaults are the best of {len(result.trials)} trials, with {result.objective} " + (
            f"{digits(best.score)} {unit_of(result)}."
        )
    if (times := gain(best, default)) is not None:
        said += f", {ratio(times)} the default's"
    return said + "."


def _headlines(result: SweepResult) -> list[Headline]:
    best, default = best_trial(result), default_trial(result)
    figures = []
    if best is not None and best.score is not None:
        figures.append(Headline(_score(best, result), f"{result.objective}, best", f"trial {best.number}"))
        if (times := gain(best, default)) is not None:
            figures.append(Headline(ratio(times), "of the default's", _score(default, result) if default else ""))
        if (level := representative(best, result)) is not None and result.direction == "maximize":
            figures.append(Headline(seconds(level.latency.p95_s), "95 % within", level.name))
    failed = sum(trial.state == "failed" for trial in result.trials)
    figures.append(Headline(count(len(result.trials)), "configurations", f"{failed} failed" if failed else ""))
    return figures


def _score(trial: Trial, result: SweepResult) -> str:
    if trial.score is None:
        return NOTHING
    return f"{digits(trial.score)}/s" if result.direction == "maximize" else seconds(trial.score)


def _doubts(result: SweepResult) -> list[str]:
    said = []
    best, default, differs = best_trial(result), default_trial(result), noise_of(result)
    if failed := sum(trial.state == "failed" for trial in result.trials):
        said.append(f"{failed} of {len(result.trials)} configurations failed; see the last table.")
    if default is None:
        said.append("The defaults weren't measured, so that nothing says what tuning gains.")
    if differs is not None:
        times = gain(best, default) if best is not None and best is not default else None
        said.append(
            f"The defaults, measured first and last, differ by {digits(100 * differs, 2)} %"
            + (": the best gains no more over them." if times and abs(times - 1) <= differs else ".")
        )
    return said


def top_table(result: SweepResult) -> Table | None:
    """The best configurations, and the default beside them."""
    default, shown = default_trial(result), ranked(result)[:TOP]
    if default is not None and default not in shown:
        shown.append(default)
    rows = []
    for place, trial in enumerate(shown, 1):
        level = representative(trial, result)
        mark: Mark = "best" if trial.number == result.best else "default" if trial is default else ""
        rows.append(
            Row(
                [
                    str(place) if trial in ranked(result)[:TOP] else NOTHING,
                    label(trial, result) + {"best": " (recommended)", "default": " (default)"}.get(mark, ""),
                    digits(trial.score),
                    ratio(gain(trial, default)),
                    digits(level.throughput) if level else NOTHING,
                    seconds(level.latency.p50_s) if level else NOTHING,
                    seconds(level.latency.p95_s) if level else NOTHING,
                    level.name.replace(" ", "\N{NO-BREAK SPACE}") if level else NOTHING,
                ],
                mark,
            )
        )
    if not rows:
        return None
    columns = [
        "Place",
        "Configuration",
        f"{result.objective}, {unit_of(result)}",
        "÷\N{NO-BREAK SPACE}default",
        "Answers/s",
    ]
    return Table("Best configurations", [*columns, "50 %", "95 %", "Measured at"], rows, text=frozenset({0, 1, 7}))


def left_out_table(result: SweepResult) -> Table | None:
    """Configurations that failed or missed the constraint, and why."""
    rows = []
    for trial in result.trials:
        if trial.state == "failed":
            why = "failed: " + _last_line(trial.error)
        elif trial.admissible is False:
            level = representative(trial, result)
            why = "missed " + (result.constraint or "the constraint")
            why += f" (95 % within {seconds(level.latency.p95_s)})" if level else ""
            why += (
                f", {count(level.failed + level.unsent)} not answered" if level and level.failed + level.unsent else ""
            )
        else:
            continue
        rows.append(Row([str(trial.number), label(trial, result), _score(trial, result), why]))
    if not rows:
        return None
    return Table(
        "Failed or not admissible",
        ["Trial", "Configuration", "Score", "Why"],
        rows[:_MOST_ROWS],
        text=frozenset({0, 1, 3}),
        note=f"{len(rows) - _MOST_ROWS} more aren't shown." if len(rows) > _MOST_ROWS else "",
    )


def _last_line(error: str | None) -> str:
    lines = (error or "nothing was said").strip().splitlines()
    return formats.shorten(lines[-1] if lines else "nothing was said", 160)
