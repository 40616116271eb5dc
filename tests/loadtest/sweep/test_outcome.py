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
from florence2_loadtest.sweep.outcome import describe_noise, fingerprint, make_result, show, write
from florence2_loadtest.sweep.space import make_space
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


@pytest.mark.parametrize(
    ("scores", "how", "said"),
    [
        ((10, 20, 30, 11), {}, "differ by 10 %; the recommended values are 173 % better than the better of the two."),
        ((10, 9, 10.5, 11), {}, "differ by 10 %; as far as that tells, the recommended values are no better."),
        ((10, 9, 8, 11), {}, "differ by 10 %: smaller differences mean nothing."),
        ((10, 20, 30, 11), {"name": "p95"}, "173 % better"),
        ((10, 20, 30, 11), {"limit": "p95<600ms"}, "differ by 10 %, and aren't admissible."),
    ],
)
def test_the_gain_is_told_beside_the_noise(
    scores: tuple[float, float, float, float], how: dict[str, str], said: str
) -> None:
    made, _ = result(*scores, **how)  # type: ignore[arg-type]
    assert said in (describe_noise(made) or "")


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


def test_a_fingerprint_has_what_trials_depend_on_and_not_what_they_are_judged_by() -> None:
    base = fingerprint(SPACE, SCENARIO, "both", {})
    others = [
        fingerprint(make_space({"max_batch_size": "6,12"}, "both"), SCENARIO, "both", {}),
        fingerprint(SPACE, SCENARIO.model_copy(update={"seed": 1}), "both", {}),
        fingerprint(SPACE, SCENARIO, "predictor", {}),
        fingerprint(SPACE, SCENARIO, "both", {"dtype": "bfloat16"}),
        fingerprint(SPACE, SCENARIO, "both", {}, answer_tokens=3),
    ]
    assert all(other != base for other in others)
    assert {"version", "host"} <= base.keys()
    assert not {"objective", "constraint", "trials"} & base.keys()
