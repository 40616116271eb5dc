from __future__ import annotations

import json

import numpy as np
import orjson
import pytest
from kserve.protocol.infer_type import InferOutput, InferResponse

from florence2_kserve.errors import BadRequest
from florence2_kserve.protocol.rest import JSON_LENGTH_HEADER, decode_request, encode_request, encode_response
from florence2_kserve.protocol.tensors import bytes_array, from_infer_input

TENSOR = {"name": "INPUT_IMAGE", "shape": [1, 1], "datatype": "BYTES", "data": ["abc"]}


def decode(content, tail=b"", **headers):
    body = content if isinstance(content, bytes) else orjson.dumps(content)
    return decode_request(body + tail, {key.lower(): value for key, value in headers.items()}, "florence2")


def test_json_tensors_are_read():
    request = decode({"id": "7", "inputs": [TENSOR], "parameters": {"num_beams": 1}, "outputs": [{"name": "SCORES"}]})
    assert (request.id, request.model_name, request.parameters) == ("7", "florence2", {"num_beams": 1})
    assert [output.name for output in request.request_outputs] == ["SCORES"]
    assert from_infer_input(request.inputs[0]).data.tolist() == [[b"abc"]]


def test_our_own_binary_requests_are_read_back():
    images = bytes_array([b"\xff\xd8\xff\x00", b"\x89PNG"])
    body, headers = encode_request(
        {"INPUT_IMAGE": images, "TASK_PROMPT": bytes_array([b"<OD>", b"<OCR>"])},
        request_id="7",
        parameters={"num_beams": 2},
        outputs=["PARSED_JSON"],
    )
    request = decode_request(body, {key.lower(): value for key, value in headers.items()}, "florence2")
    assert from_infer_input(request.inputs[0]).data.tolist() == images.tolist()
    assert from_infer_input(request.inputs[1]).data.tolist() == [b"<OD>", b"<OCR>"]
    assert request.parameters == {"num_beams": 2}


def test_a_request_without_id_gets_one():
    assert decode({"inputs": [TENSOR]}).id


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "has to be a JSON object, got list"),
        ({}, "'inputs' has to be a list of JSON objects and is missing"),
        ({"inputs": {}}, "'inputs' has to be a list"),
        ({"inputs": [1]}, "'inputs' has to be a list of JSON objects"),
        ({"inputs": [{}]}, r"inputs\[0\]: 'name' is missing"),
        ({"inputs": [{"name": "A"}]}, "A: 'datatype' is missing"),
        ({"inputs": [{"name": "A", "datatype": "BYTES"}]}, "A: 'shape' is missing"),
        ({"inputs": [{"name": "A", "datatype": "BYTES", "shape": [1]}]}, "A: 'data' is missing"),
        ({"inputs": [{"name": "A", "datatype": "BYTES", "shape": [1], "data": "x"}]}, "A: 'data' has to be a list"),
        ({"inputs": [{"name": "A", "datatype": "TEXT", "shape": [1], "data": []}]}, "A: unknown datatype 'TEXT'"),
        ({"inputs": [TENSOR], "id": 7}, "id has to be a string, got int"),
        ({"inputs": [TENSOR], "parameters": []}, None),  # an empty list is as good as none
        ({"inputs": [TENSOR], "parameters": [1]}, "parameters have to be a JSON object, got list"),
        ({"inputs": [TENSOR], "outputs": ["X"]}, "'outputs' has to be a list of JSON objects"),
        ({"inputs": [TENSOR | {"parameters": {"binary_data_size": 3}}]}, "both data and binary_data_size"),
    ],
)
def test_wrong_bodies_are_refused_with_the_reason(content, says):
    if says is None:
        decode(content)
        return
    with pytest.raises(BadRequest, match=says):
        decode(content)


@pytest.mark.parametrize(
    ("size", "tail", "says"),
    [
        (9, b"abc", "binary_data_size is 9, but the body has 3 bytes left"),
        (2, b"abc", "1 bytes of the body belong to no tensor"),
        (-1, b"abc", "has to be a whole number, got -1"),
        (True, b"abc", "has to be a whole number, got True"),
    ],
)
def test_wrong_binary_sizes_are_refused(size, tail, says):
    entry = {"name": "A", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}
    content = orjson.dumps({"inputs": [entry]})
    with pytest.raises(BadRequest, match=says):
        decode(content, tail, **{JSON_LENGTH_HEADER: str(len(content))})


@pytest.mark.parametrize("length", ["x", "-1", "99999", "1.5", "²"])
def test_a_wrong_json_length_is_refused(length):
    with pytest.raises(BadRequest, match=JSON_LENGTH_HEADER):
        decode({"inputs": [TENSOR]}, **{JSON_LENGTH_HEADER: length})


def answer():
    text = InferOutput("PARSED_JSON", [2], "BYTES", bytes_array([b'{"a": "\xc3\xa9"}', b"{}"]))
    scores = InferOutput("SCORES", [2], "FP32", np.array([-0.5, -1], dtype=np.float32))
    return InferResponse("7", "florence2", [text, scores], parameters={"queue_us": 3})


def test_answers_are_json_unless_asked_otherwise():
    body, headers = encode_response(answer(), decode({"inputs": [TENSOR]}))
    content = json.loads(body)
    assert headers == {"Content-Type": "application/json"}
    assert content["outputs"][0] == {
        "name": "PARSED_JSON",
        "datatype": "BYTES",
        "shape": [2],
        "data": ['{"a": "é"}', "{}"],
    }
    assert content["outputs"][1]["data"] == [-0.5, -1.0]
    assert content["parameters"] == {"queue_us": 3}


@pytest.mark.parametrize("whole", [True, False])
def test_answers_are_binary_where_asked(whole):
    asked = (
        {"parameters": {"binary_data_output": True}}
        if whole
        else {"outputs": [{"name": "SCORES", "parameters": {"binary_data": True}}]}
    )
    body, headers = encode_response(answer(), decode({"inputs": [TENSOR], **asked}))
    content = json.loads(body[: int(headers[JSON_LENGTH_HEADER])])
    assert ("data" in content["outputs"][0]) is not whole
    assert content["outputs"][1]["parameters"] == {"binary_data_size": 8}
    assert body.endswith(np.array([-0.5, -1], dtype=np.float32).tobytes())
