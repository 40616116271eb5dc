"""What only REST can get right or wrong: JSON, the binary extension's framing, HTTP's own ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .contract import IMAGE, TASK
from .messages import ask
from .pictures import base64_text, png
from .wires import JSON_LENGTH_HEADER, RestConnection, rest_outcome

Alone = Callable[..., Any]
GOOD = ask(base64_text(png()), "<CAPTION>")


def _json(**changes: Any) -> bytes:
    return json.dumps({**GOOD.json_body(), **changes}).encode()


def _tensor_json(**changes: Any) -> bytes:
    """Returns the good body with its TASK_PROMPT changed; a value of None takes the key out."""
    body = copy.deepcopy(GOOD.json_body())
    tensor = {**body["inputs"][1], **changes}
    body["inputs"][1] = {key: value for key, value in tensor.items() if value is not None}
    return json.dumps(body).encode()


BAD_BODIES = {
    "empty": b"",
    "no JSON": b"this is not JSON",
    "JSON cut short": _json()[:-20],
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "null": b"null",
    "list": b"[]",
    "string": b'"inputs"',
    "number": b"7",
    "empty object": b"{}",
    "inputs null": _json(inputs=None),
    "inputs object": _json(inputs={}),
    "inputs string": _json(inputs="INPUT_IMAGE"),
    "inputs empty": _json(inputs=[]),
    "tensor null": _json(inputs=[None]),
    "tensor string": _json(inputs=["INPUT_IMAGE"]),
    "outputs string": _json(outputs="PARSED_JSON"),
    "output without a name": _json(outputs=[{}]),
    "output string": _json(outputs=["PARSED_JSON"]),
    "parameters list": _json(parameters=["max_new_tokens"]),
    "parameter object": _json(parameters={"max_new_tokens": {"value": 5}}),
    "parameter list": _json(parameters={"num_beams": [1]}),
    "nested beyond reason": b"[" * 100_000,
    "the V1 protocol": json.dumps({"instances": [{"image": "", "task": "<CAPTION>"}]}).encode(),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_a_body_that_is_no_request_is_refused(rest: RestConnection, kind: str) -> None:
    reply = rest.post(BAD_BODIES[kind])
    assert reply.status == 400, reply
    reply.error()
    rest.assert_alive()


BAD_TENSORS = {
    "without datatype": _tensor_json(datatype=None),
    "datatype number": _tensor_json(datatype=8),
    "without shape": _tensor_json(shape=None),
    "shape string": _tensor_json(shape="1,1"),
    "shape of strings": _tensor_json(shape=["1", "1"]),
    "shape of fractions": _tensor_json(shape=[1.5, 1]),
    "shape of booleans": _tensor_json(shape=[True, True]),
    "without data": _tensor_json(data=None),
    "data string": _tensor_json(data="<CAPTION>"),
    "data of numbers": _tensor_json(data=[7]),
    "data of null": _tensor_json(data=[None]),
    "data of objects": _tensor_json(data=[{}]),
    "data nested too deep": _tensor_json(data=[[["<CAPTION>"]]]),
    "parameters string": _tensor_json(parameters="none"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_malformed_tensor_is_refused_by_name(rest: RestConnection, kind: str) -> None:
    reply = rest.post(BAD_TENSORS[kind])
    assert reply.status == 400, reply
    assert TASK in reply.error()
    rest.assert_alive()


BINARY, BINARY_JSON_LENGTH = ask(png(), "<CAPTION>").binary_body()


def _with_size(name: str, size: Any) -> tuple[bytes, str]:
    """Returns a binary request that gives another ``binary_data_size`` for the tensor `name`."""
    head = json.loads(BINARY[:BINARY_JSON_LENGTH])
    for tensor in head["inputs"]:
        if tensor["name"] == name:
            tensor["parameters"]["binary_data_size"] = size
    encoded = json.dumps(head).encode()
    return encoded + BINARY[BINARY_JSON_LENGTH:], str(len(encoded))


def _with_tail(tail: bytes) -> tuple[bytes, str]:
    return BINARY[:BINARY_JSON_LENGTH] + tail, str(BINARY_JSON_LENGTH)


TAIL = BINARY[BINARY_JSON_LENGTH:]
BAD_BINARIES: dict[str, tuple[bytes, str]] = {
    "header no number": (BINARY, "many"),
    "header empty": (BINARY, ""),
    "header negative": (BINARY, "-1"),
    "header beyond the body": (BINARY, str(len(BINARY) + 1)),
    "header inside the JSON": (BINARY, str(BINARY_JSON_LENGTH - 5)),
    "header beyond the JSON": (BINARY, str(BINARY_JSON_LENGTH + 5)),
    "header zero": (BINARY, "0"),
    "no binary part": _with_tail(b""),
    "binary part cut short": _with_tail(TAIL[:-3]),
    "bytes left over": _with_tail(TAIL + b"left over"),
    "size beyond the body": _with_size(TASK, 10**12),
    "size negative": _with_size(IMAGE, -4),
    "size string": _with_size(IMAGE, "all"),
    "size fraction": _with_size(IMAGE, 10.5),
    "size boolean": _with_size(IMAGE, True),
    "sizes that cut an element": _with_size(IMAGE, 100),
    "element beyond its tensor": _with_tail(b"\xff\xff\xff\xff" + TAIL[4:]),
    "elements that do not add up": _with_tail(TAIL[: -len("<CAPTION>") - 4] + b"\x00" * (len("<CAPTION>") + 4)),
}


@pytest.mark.parametrize("kind", BAD_BINARIES)
def test_a_malformed_binary_request_is_refused(rest: RestConnection, kind: str) -> None:
    body, json_length = BAD_BINARIES[kind]
    reply = rest.post(body, {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: json_length})
    assert reply.status == 400, reply
    reply.error()
    rest.assert_alive()


def test_binary_data_without_the_header_is_refused(rest: RestConnection) -> None:
    reply = rest.post(BINARY, {"Content-Type": "application/octet-stream"})
    assert reply.status == 400, reply
    reply.error()
    rest.assert_alive()


def test_one_tensor_may_be_binary_and_another_not(rest: RestConnection, alone: Alone) -> None:
    body = ask(base64_text(png()), "<CAPTION>").json_body()
    image = next(tensor for tensor in body["inputs"] if tensor["name"] == IMAGE)
    blob = len(png()).to_bytes(4, "little") + png()
    del image["data"]
    image["parameters"] = {"binary_data_size": len(blob)}
    head = json.dumps(body).encode()
    reply = rest.post(head + blob, {JSON_LENGTH_HEADER: str(len(head)), "Content-Type": "application/octet-stream"})
    assert rest_outcome(reply).answers() == [alone(0, "<CAPTION>")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json", "Accept": "*/*"},
        {"Content-Type": "application/json", "Expect": "100-continue"},
    ],
    ids=["no type", "with charset", "text", "accept anything", "expect 100-continue"],
)
def test_json_is_read_whatever_its_headers_say(rest: RestConnection, alone: Alone, headers: dict[str, str]) -> None:
    assert rest_outcome(rest.post(_json(), headers)).answers() == [alone(0, "<CAPTION>")]
    rest.assert_alive()


def test_the_binary_header_is_known_in_any_letters(rest: RestConnection, alone: Alone) -> None:
    headers = {JSON_LENGTH_HEADER.lower(): str(BINARY_JSON_LENGTH)}
    assert rest_outcome(rest.post(BINARY, headers)).answers() == [alone(0, "<CAPTION>")]


def test_a_body_sent_in_chunks(rest: RestConnection, alone: Alone) -> None:
    body = _json()

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    assert rest_outcome(rest.post(chunks(), {"Content-Type": "application/json"})).answers() == [alone(0, "<CAPTION>")]
    rest.assert_alive()


def test_unknown_keys_of_the_request_are_passed_over(rest: RestConnection, alone: Alone) -> None:
    """KServe's own client adds ``model_name`` to the body."""
    assert rest_outcome(rest.post(_json(model_name="florence2"))).answers() == [alone(0, "<CAPTION>")]


def test_an_error_is_followed_by_inference_on_the_same_connection(rest: RestConnection, alone: Alone) -> None:
    for body in (b"not JSON", _tensor_json(data=["<DANCE>"]), _json(inputs=[]), _tensor_json(datatype="INT32")):
        assert rest.post(body).status == 400
        assert rest_outcome(rest.post(_json())).answers() == [alone(0, "<CAPTION>")]
