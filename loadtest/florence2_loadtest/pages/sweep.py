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
from florence2_loadtest.sweep.confirmation import searched
from florence2_loadtest.trials import (
    best_trial,
    decision_of,
    default_trial,
    gain,
    label,
    ranked,
    representative,
    slo_of,
    unit_of,
    unsettled,
    verdict,
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
        return verdict(result)
    if default is best:
        return f"Recommended: the defaults. {verdict(result)}"
    return f"Recommended: {label(best, result)}. {verdict(result)}"


def _headlines(result: SweepResult) -> list[Headline]:
    best = best_trial(result)
    figures = []
    if best is not None and best.score is not None:
        made = decision_of(result)
        # The figures that decided, rather than the first one, for which it was chosen.
        again = (made.score if best is made.candidate else made.default) if made.repeats else None
        figures.append(
            Headline(
                _figure(again or best.score, result),
                f"{result.objective}, recommended",
                f"trial {best.number}" + (", measured again" if again else ""),
            )
        )
        if made.is_better and made.score and made.default:
            figures.append(Headline(ratio(made.score / made.default), "of the default's", "measured again"))
        if (level := representative(best, result)) is not None and result.direction == "maximize":
            figures.append(Headline(seconds(level.latency.p95_s), "95 % within", level.name))
    failed = _failed(result)
    figures.append(Headline(count(_configurations(result)), "configurations", f"{failed} failed" if failed else ""))
    return figures


def _score(trial: Trial, result: SweepResult) -> str:
    return NOTHING if trial.score is None else _figure(trial.score, result)


def _figure(score: float, result: SweepResult) -> str:
    return f"{digits(score)}/s" if result.direction == "maximize" else seconds(score)


def _doubts(result: SweepResult) -> list[str]:
    said = []
    best, default = best_trial(result), default_trial(result)
    if failed := _failed(result):
        said.append(f"{failed} of {_configurations(result)} configurations failed; see the last table.")
    if default is None:
        said.append("The defaults weren't measured, so that nothing says what tuning gains.")
    elif best is not None and best is not default and not decision_of(result).repeats:
        said.append("The best were not measured again: what looks like a gain may be chance.")
    if numbers := [str(trial.number) for trial in unsettled(result)]:
        said.append(f"Trials that never settled, so that their figures are rough: {', '.join(numbers)}.")
    return said


def _configurations(result: SweepResult) -> int:
    return len({repr(trial.settings) for trial in searched(result.trials)})


def _failed(result: SweepResult) -> int:
    return len({repr(trial.settings) for trial in searched(result.trials) if trial.state == "failed"})


def top_table(result: SweepResult) -> Table | None:
    """The best configurations, and the default beside them."""
    default, best = default_trial(result), ranked(result)[:TOP]
    shown = best if default is None or default in best else [*best, default]
    rows = []
    for place, trial in enumerate(shown, 1):
        level = representative(trial, result)
        mark: Mark = "best" if trial.number == result.best else "default" if trial is default else ""
        rows.append(
            Row(
                [
                    str(place) if trial in best else NOTHING,
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
            why = "; ".join(_faults(trial, result))
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


def _faults(trial: Trial, result: SweepResult) -> list[str]:
    limit = slo_of(result)
    answered = [level for level in trial.levels if level.answered]
    slow = [level for level in answered if limit is not None and not limit.is_met(level.latency)]
    lost = sum(level.failed + level.unsent for level in trial.levels)
    limited = [level.generator.bottleneck for level in trial.levels if level.generator.bottleneck is not None]
    faults = [f"missed {result.constraint} (95 % within {seconds(slow[0].latency.p95_s)})"] if slow else []
    faults += [f"{count(lost)} not answered"] if lost else []
    faults += [f"limited by the load generator: {limited[0]}"] if limited else []
    return faults


def _last_line(error: str | None) -> str:
    lines = (error or "nothing was said").strip().splitlines()
    return formats.shorten(lines[-1] if lines else "nothing was said", 160)
