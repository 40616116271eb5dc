"""Request parameters: numbers and numbers as text, their bounds, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from .contract import TASKS, Form, Takes, TaskContract, assert_answer
from .messages import BRIEF, SHORT, Request, ask
from .pictures import RED_CIRCLE_BINS, SIZE, base64_text, png
from .wires import RestConnection, Wire, rest_outcome

Alone = Callable[..., Any]
TASK = next(task for task in TASKS if task.prompt == "<MORE_DETAILED_CAPTION>")


def _numbers(message: str) -> set[str]:
    return set(re.findall(r"-?\d+(?:\.\d+)?", message))


def _request(**parameters: Any) -> Request:
    return ask(base64_text(png()), TASK.prompt, parameters={**BRIEF, **parameters})


@pytest.mark.parametrize("value", [1, 4, "4"], ids=repr)
def test_max_new_tokens_bounds_the_answer(rest_or_grpc: Wire, value: int | str) -> None:
    (answer,) = rest_or_grpc.infer(_request(max_new_tokens=value)).answers()
    assert_answer(TASK, answer, SIZE)
    assert len(answer[TASK.prompt].split()) <= int(value)  # a token gives no more than one word


@pytest.mark.parametrize("task", [task for task in TASKS if task.form is not Form.TEXT], ids=lambda task: task.prompt)
def test_an_answer_cut_short_keeps_its_form(rest: RestConnection, task: TaskContract) -> None:
    text = {Takes.NOTHING: None, Takes.TEXT: "red circle", Takes.REGION: RED_CIRCLE_BINS}[task.takes]
    request = ask(base64_text(png()), task.prompt, text, parameters={"max_new_tokens": 7})
    (answer,) = rest_outcome(rest.post(request.json_body())).answers()
    assert_answer(task, answer, SIZE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 1),
        ("num_beams", "1"),
        ("num_beams", 2),
        ("length_penalty", 0.5),
        ("length_penalty", "0.5"),
        ("length_penalty", 1),
        ("timeout_ms", 60_000),
        ("timeout_ms", "60000"),
    ],
    ids=repr,
)
def test_a_number_is_taken_as_number_or_text(rest_or_grpc: Wire, name: str, value: Any) -> None:
    (answer,) = rest_or_grpc.infer(_request(**{name: value})).answers()
    assert_answer(TASK, answer, SIZE)


@pytest.mark.parametrize(("name", "value"), [("num_beams", 1), ("max_new_tokens", 5)])
def test_a_number_means_the_same_as_text(rest_or_grpc: Wire, name: str, value: int) -> None:
    as_number = rest_or_grpc.infer(_request(**{name: value}))
    as_text = rest_or_grpc.infer(_request(**{name: str(value)}))
    assert as_number.answers() == as_text.answers()


def test_the_default_length_penalty_is_one(rest_or_grpc: Wire, alone: Alone) -> None:
    assert rest_or_grpc.infer(_request(length_penalty=1, **SHORT)).answers() == [alone(0, TASK.prompt)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 0),
        ("num_beams", -1),
        ("num_beams", 100_000),
        ("num_beams", "100000"),
        ("num_beams", "three"),
        ("num_beams", ""),
        ("num_beams", "1.5"),
        ("num_beams", True),
        ("num_beams", "nan"),
        ("num_beams", "true"),
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("max_new_tokens", 10_000_000),
        ("max_new_tokens", "many"),
        ("max_new_tokens", True),
        ("max_new_tokens", False),
        ("max_new_tokens", "inf"),
        ("max_new_tokens", "2.5"),
        ("max_new_tokens", 2.5),
        ("length_penalty", "long"),
        ("length_penalty", "nan"),
        ("length_penalty", "inf"),
        ("length_penalty", True),
        ("timeout_ms", -5),
        ("timeout_ms", "soon"),
        ("timeout_ms", True),
        ("timeout_ms", "0.5"),
        ("timeout_ms", "nan"),
    ],
    ids=repr,
)
def test_a_value_out_of_bounds_or_of_another_kind_is_refused(rest_or_grpc: Wire, name: str, value: Any) -> None:
    outcome = rest_or_grpc.infer(_request(**{name: value}))
    assert outcome.status == "invalid", f"{outcome.status}: {outcome.message}"
    assert name in outcome.message
    rest_or_grpc.assert_alive()


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("num_beams", 0, "1"),
        ("max_new_tokens", 0, "1"),
        ("length_penalty", 11, "10"),
        ("length_penalty", -11, "-10"),
        ("length_penalty", "10.5", "10"),
        ("timeout_ms", 0, "1"),
        ("timeout_ms", 86_400_001, "86400000"),
    ],
    ids=repr,
)
def test_a_refusal_names_the_bound(rest_or_grpc: Wire, name: str, value: Any, bound: str) -> None:
    outcome = rest_or_grpc.infer(_request(**{name: value}))
    assert outcome.status == "invalid", f"{outcome.status}: {outcome.message}"
    assert _numbers(outcome.message) >= {str(value), bound}, outcome.message


@pytest.mark.parametrize("name", ["num_beams", "max_new_tokens"])
def test_the_servers_own_bound_is_the_one_that_it_names(rest_or_grpc: Wire, name: str) -> None:
    """What the bound is differs between servers: the message tells it, and just it is allowed."""
    beyond = 1_000_000
    (bound,) = _numbers(rest_or_grpc.infer(_request(**{name: beyond})).message) - {str(beyond)}
    assert rest_or_grpc.infer(_request(**{name: int(bound)})).status == "ok"
    outcome = rest_or_grpc.infer(_request(**{name: int(bound) + 1}))
    assert outcome.status == "invalid", f"{outcome.status}: {outcome.message}"
    assert bound in _numbers(outcome.message)


@pytest.mark.parametrize(
    ("name", "value"), [("length_penalty", 10), ("length_penalty", -10), ("timeout_ms", 86_400_000)]
)
def test_a_bound_itself_is_allowed(rest_or_grpc: Wire, name: str, value: int) -> None:
    assert rest_or_grpc.infer(_request(**{name: value})).status == "ok"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_in_json_is_refused(rest: RestConnection, value: str) -> None:
    body = (
        _request(length_penalty=0).json_bytes().replace(b'"length_penalty": 0', b'"length_penalty": ' + value.encode())
    )
    assert value.encode() in body
    reply = rest.post(body)
    assert reply.status == 400, reply
    reply.error()
    rest.assert_alive()


def test_priority_is_refused_until_it_exists(rest_or_grpc: Wire) -> None:
    outcome = rest_or_grpc.infer(_request(priority=1))
    assert outcome.status == "invalid", f"{outcome.status}: {outcome.message}"
    assert "priority" in outcome.message
    rest_or_grpc.assert_alive()


def test_a_deadline_that_cannot_be_kept_ends_the_request(rest_or_grpc: Wire) -> None:
    outcome = rest_or_grpc.infer(_request(timeout_ms=1))
    assert outcome.status == "deadline", f"{outcome.status}: {outcome.message}"
    rest_or_grpc.assert_alive()
