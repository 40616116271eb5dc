"""What may be expected of a scaling test, and what is said where it isn't met."""

from __future__ import annotations

from typing import Any

import pytest

from florence2_loadtest.cluster.expectations import (
    COMPONENT_NUMBERS,
    NUMBERS,
    parse_expectation,
    parse_replicas,
    problems,
)

FINDINGS: dict[str, Any] = {
    "first_answer_s": 11.6,
    "sent_share": 0.9985,
    "failures": 0,
    "back_s": None,
    "predictor": {"most_ready": 2.0, "surplus_share": 0.4},
}


@pytest.mark.parametrize(
    "met",
    [
        "first_answer<60s", "first_answer_s<60", "first_answer < 0.2min", "first_answer>11500ms", "failures==0",
        "failures<=0", "sent_share>=99.8%", "predictor.most_ready>=2", "predictor.surplus_share<50%",
    ],
)  # fmt: skip
def test_met_ones_are_no_problem(met: str) -> None:
    assert problems([parse_expectation(met)], FINDINGS) == []


@pytest.mark.parametrize(
    ("unmet", "said"),
    [
        ("first_answer<10s", "first_answer<10s: it is 11.6"),
        ("sent_share>=0.999", "sent_share>=0.999: it is 0.9985"),
        ("predictor.most_ready>2", "predictor.most_ready>2: it is 2"),
        ("back<180s", "back<180s: it wasn't seen"),
        ("transformer.most_ready>=1", "transformer.most_ready>=1: it wasn't seen"),
    ],
)
def test_unmet_ones_say_what_it_is(unmet: str, said: str) -> None:
    assert problems([parse_expectation("failures==0"), parse_expectation(unmet)], FINDINGS) == [said]


@pytest.mark.parametrize(
    "wrong",
    ["", "first_answer", "first_answer<fast", "first_answer<60x", "first_answer=60", "<60s", "first_answer<60s<80s"],
)
def test_other_forms_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="looks like first_answer<60s"):
        parse_expectation(wrong)


@pytest.mark.parametrize(
    "wrong", ["speed<1", "steps<1", "first_answer_parts<1", "predictor.target<1", "explainer.back<1"]
)
def test_names_of_no_number_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"is no finding that is a number; those are .*COMPONENT\.back_s"):
        parse_expectation(wrong)


def test_replicas_are_those_that_are_ready_at_a_time() -> None:
    assert problems([parse_replicas("predictor>=2")], FINDINGS) == []
    assert problems([parse_replicas("predictor >= 3")], FINDINGS) == ["predictor >= 3: it is 2"]
    for wrong in ("predictor", "explainer>=1", "predictor>=2s", "predictor.most_ready>=2"):
        with pytest.raises(ValueError, match="look like predictor>=2"):
            parse_replicas(wrong)


def test_every_name_can_be_asked_for() -> None:
    assert {parse_expectation(f"{name}<1").path for name in NUMBERS} == {(name,) for name in NUMBERS}
    assert {parse_expectation(f"predictor.{name}<1").path[1] for name in COMPONENT_NUMBERS} == set(COMPONENT_NUMBERS)
