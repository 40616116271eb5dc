"""Choosing outputs, and their binary form over REST."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from .contract import GENERATED, PARSED
from .messages import SHORT, ask, unpack_bytes_tensor
from .pictures import base64_text, png
from .wires import JSON_LENGTH_HEADER, RestConnection, Wire, rest_outcome

Alone = Callable[..., Any]


def test_the_default_output_is_parsed_json_alone(rest_or_grpc: Wire) -> None:
    assert list(rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>")).outputs) == [PARSED]


@pytest.mark.parametrize("names", [(PARSED,), (GENERATED,), (PARSED, GENERATED), (GENERATED, PARSED)], ids=" ".join)
def test_the_outputs_asked_for_come_and_no_others(rest_or_grpc: Wire, names: tuple[str, ...]) -> None:
    images = [base64_text(png(0)), base64_text(png(1))]
    outcome = rest_or_grpc.infer(ask(images, ["<CAPTION>", "<OCR>"], outputs=names))
    assert outcome.status == "ok", f"{outcome.status}: {outcome.message}"
    assert set(outcome.outputs) == set(names)
    for output in outcome.outputs.values():
        assert (output.datatype, output.shape, len(output.data)) == ("BYTES", (2, 1), 2)


def test_the_generated_text_is_what_a_caption_was_read_from(rest_or_grpc: Wire, alone: Alone) -> None:
    outcome = rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>", outputs=(PARSED, GENERATED)))
    assert outcome.answers() == [alone(0, "<CAPTION>")]
    assert alone(0, "<CAPTION>")["<CAPTION>"].strip() in outcome.outputs[GENERATED].data[0]


@pytest.mark.parametrize("names", [("MASKS",), (PARSED, "MASKS")], ids=" ".join)
def test_an_unknown_output_is_refused(rest_or_grpc: Wire, names: tuple[str, ...]) -> None:
    outcome = rest_or_grpc.infer(ask(base64_text(png()), "<CAPTION>", outputs=names))
    assert outcome.status == "invalid", f"{outcome.status}: {outcome.message}"
    assert "MASKS" in outcome.message
    rest_or_grpc.assert_alive()


@pytest.mark.parametrize(
    "choice",
    [
        {"outputs": [{"name": PARSED, "parameters": {"binary_data": True}}]},
        {"parameters": {**SHORT, "binary_data_output": True}},
    ],
    ids=["binary_data", "binary_data_output"],
)
def test_an_output_is_binary_where_the_request_says_so(
    rest: RestConnection, alone: Alone, choice: dict[str, Any]
) -> None:
    images = [base64_text(png(0)), base64_text(png(1))]
    reply = rest.post({**ask(images, ["<CAPTION>", "<OD>"]).json_body(), **choice})
    assert reply.status == 200, reply.body
    json_length = int(reply.headers[JSON_LENGTH_HEADER.lower()])
    (output,) = json.loads(reply.body[:json_length])["outputs"]
    blob = reply.body[json_length:]
    assert "data" not in output
    assert output["parameters"]["binary_data_size"] == len(blob)
    assert [json.loads(element) for element in unpack_bytes_tensor(blob)] == [alone(0, "<CAPTION>"), alone(1, "<OD>")]
    rest.assert_alive()


def test_one_output_may_be_binary_and_another_not(rest: RestConnection) -> None:
    body = ask(base64_text(png()), "<CAPTION>").json_body()
    body["outputs"] = [
        {"name": PARSED, "parameters": {"binary_data": False}},
        {"name": GENERATED, "parameters": {"binary_data": True}},
    ]
    reply = rest.post(body)
    outcome = rest_outcome(reply)
    assert set(outcome.outputs) == {PARSED, GENERATED}
    described = json.loads(reply.body[: int(reply.headers[JSON_LENGTH_HEADER.lower()])])["outputs"]
    assert {output["name"]: "data" in output for output in described} == {PARSED: True, GENERATED: False}


def test_binary_inputs_do_not_make_binary_outputs(rest: RestConnection) -> None:
    body, json_length = ask(png(), "<CAPTION>").binary_body()
    reply = rest.post(body, {JSON_LENGTH_HEADER: str(json_length), "Content-Type": "application/octet-stream"})
    assert JSON_LENGTH_HEADER.lower() not in reply.headers
    assert isinstance(reply.json()["outputs"][0]["data"][0], str)
