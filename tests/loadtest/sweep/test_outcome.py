"""What a sweep says in the end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from florence2_loadtest.results import SweepResult, Trial, read_result
from florence2_loadtest.scenario import Scenario
from florence2_loadtest.slo import parse_slo
from florence2_loadtest.sweep.loop import judge
from florence2_loadtest.sweep.objective import Objective, read_objective
from florence2_loadtest.sweep.outcome import make_result, show, write
from florence2_loadtest.sweep.space import make_space
from florence2_loadtest.trials import verdict
from tests.loadtest.sweep.trials import level

SPACE = make_space({"max_batch_size": "6,12,24"}, "both")
SCENARIO = Scenario(name="night")


def result(
    first: float, six: float, twelve: float, last: float, *, name: str = "throughput", limit: str | None = None
) -> tuple[SweepResult, Objective]:
    objective = read_objective(name, parse_slo(limit) if limit else None)
    settings = [{}, {"max_batch_size": 6}, {"max_batch_size": 12}, {"max_batch_size": 24}, {}]
    scores = [first, six, twelve, None, last]
    trials = []
    for number, (given, score) in enumerate(zip(settings, scores, strict=True)):
        failed = {"state": "failed", "error": "--- predictor\nerror: out of memory"}
        done = {"levels": [level(score or 0, 10 / (score or 1))]}
        trial = Trial.model_validate({"number": number, "settings": given, **(failed if score is None else done)})
        judge(trial, objective)
        trials.append(trial)
    return make_result(trials, SPACE, SCENARIO, "both", objective, limit), objective


def confirmed(made: SweepResult, objective: Objective, again: list[tuple[int, float]]) -> SweepResult:
    """Returns a sweep in which numbered trials were measured again with these scores."""
    trials = list(made.trials)
    for confirms, score in again:
        given = {"number": len(trials), "settings": trials[confirms].settings, "confirms": confirms}
        trials.append(Trial.model_validate({**given, "levels": [level(score, 10 / score)]}))
        judge(trials[-1], objective)
    return make_result(trials, SPACE, SCENARIO, "both", objective, made.constraint)


@pytest.mark.parametrize(
    ("again", "how", "best", "said"),
    [
        ([(0, 10), (2, 28), (2, 30), (0, 11)], {}, 2, "29.0 answers/s, the defaults 10.5 answers/s: 176 % better"),
        ([(0, 10), (2, 10.4), (2, 10.6), (0, 11)], {}, 0, "no better, while figures of one configuration differ by"),
        ([(0, 10), (2, 10.8), (2, 10.8), (0, 10.8)], {}, 0, "3.8 % better, while figures of one configuration differ"),
        ([(0, 10), (2, 28), (2, 30), (0, 11)], {"name": "p95"}, 2, "have p95 0.345 s, the defaults 0.955 s"),
        ([(0, 10), (2, 28), (2, 30), (0, 11)], {"limit": "p95<600ms"}, 2, "the defaults aren't admissible"),
        ([(0, 10), (2, 1), (2, 1), (0, 10)], {"limit": "p95<2s"}, 0, "only the defaults are admissible"),
        ([], {}, 2, "were not measured again, and the best of many is lucky too: no gain is claimed"),
    ],
)
def test_what_is_recommended_and_why(
    again: list[tuple[int, float]], how: dict[str, str], best: int, said: str
) -> None:
    made = confirmed(*result(10, 20, 30, 11, **how), again)  # type: ignore[arg-type]
    assert made.best == best
    assert said in verdict(made)


def test_errors_settings_and_names_are_printed_as_they_are() -> None:
    made, objective = result(10, 20, 30, 11)
    made.name = "[/night]"
    made.trials[3].error = "OSError: no such folder [/models/large]"
    made.trials[2].settings = {"max_batch_size": "[/bold]"}
    text = io.StringIO()
    show(made, objective, Console(file=text, width=120))
    for shown in (
        "[/night]: throughput",
        "[/bold]",
        "3 failed: max_batch_size 24: OSError: no such folder [/models/large]",
    ):
        assert shown in text.getvalue()


def test_what_never_settled_and_what_was_measured_again_is_marked() -> None:
    made, objective = result(10, 20, 30, 11)
    made = confirmed(made, objective, [(0, 10), (2, 28), (2, 30), (0, 11)])
    made.trials[1].levels[0].stable = False
    text = io.StringIO()
    show(made, objective, Console(file=text, width=160))
    rows = {row.split("│")[1].strip(): row for row in text.getvalue().splitlines() if row.startswith("│")}
    assert rows.keys() == {"0", "1", "2", "4"}
    assert "recommended, again 28.0, 30.0" in rows["2"]
    assert "not stable" in rows["1"]
    assert "Not stable, measure for longer (window_s, max_windows): 1" in text.getvalue()


def test_the_table_has_the_best_first_and_says_what_failed() -> None:
    made, objective = result(10, 20, 30, 11)
    text = io.StringIO()
    show(made, objective, Console(file=text, width=120))
    rows = [line for line in text.getvalue().splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["2", "1", "4", "0"]
    assert "recommended" in rows[0]
    assert "3 failed: max_batch_size 24: error: out of memory" in text.getvalue()


def test_files_are_written_and_an_outdated_recommendation_is_taken_away(tmp_path: Path) -> None:
    made, _ = result(10, 20, 30, 11)
    written = write(made, tmp_path)
    assert [path.name for path in written] == ["result.json", "values.yaml"]
    assert read_result(written[0]) == made
    assert "max_batch_size: 12" in written[1].read_text()
    none, objective = result(10, 20, 30, 11, limit="p95<1ms")
    assert none.best is None
    assert [path.name for path in write(none, tmp_path)] == ["result.json"]
    assert not written[1].exists()
    text = io.StringIO()
    show(none, objective, Console(file=text, width=120))
    assert "nothing is recommended" in text.getvalue()
