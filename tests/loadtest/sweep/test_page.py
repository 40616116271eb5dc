"""A sweep's report: what it recommends and why."""

from __future__ import annotations

from florence2_loadtest.pages.sweep import left_out_table, sweep_part, top_table
from florence2_loadtest.results import SweepResult
from tests.loadtest.example_results import sweep_result


def test_a_confirmed_gain_is_told_by_what_was_measured_again() -> None:
    result = sweep_result()
    part = sweep_part(result)
    assert "Measured 2 times more, in turn, the recommended values have throughput" in str(part.verdict)
    assert any(headline.label == "of the default's" for headline in part.headlines)
    assert "measured again" in part.headlines[0].note
    assert any(headline.figure == "25" and headline.label == "configurations" for headline in part.headlines)


def test_what_was_not_measured_again_claims_no_gain() -> None:
    result = _unconfirmed()
    part = sweep_part(result)
    assert "no gain is claimed" in str(part.verdict)
    assert not any(headline.label == "of the default's" for headline in part.headlines)
    assert any("may be chance" in warning for warning in part.warnings)


def test_trials_that_confirm_have_no_place_of_their_own() -> None:
    confirmed, without = top_table(sweep_result()), top_table(_unconfirmed())
    assert confirmed is not None
    assert without is not None
    assert confirmed.rows == without.rows


def test_what_the_generator_limited_is_left_out_for_that_and_what_never_settled_is_named() -> None:
    result = sweep_result()
    trial = result.trials[1]
    trial.admissible = False
    for level in trial.levels:
        level.generator.bottleneck = "it needed a whole processor"
        level.stable = False
    table = left_out_table(result)
    assert table is not None
    (why,) = [row.cells[3] for row in table.rows if row.cells[0] == "1"]
    assert "limited by the load generator: it needed a whole processor" in why
    assert any("never settled" in warning and "1." in warning for warning in sweep_part(result).warnings)


def _unconfirmed() -> SweepResult:
    result = sweep_result()
    result.trials = [trial for trial in result.trials if trial.confirms is None]
    return result
