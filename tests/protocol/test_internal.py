from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
from kserve.protocol.infer_type import InferRequest

from florence2_kserve.errors import BadRequest, BadTensor, Internal, Unavailable
from florence2_kserve.protocol import wire
from florence2_kserve.protocol.internal import (
    GenerateCall,
    GenerateResult,
    read_generate_call,
    write_generate_result,
)
from florence2_kserve.protocol.public import Bounds, GenerationOptions
from florence2_kserve.protocol.tensors import Tensor, bytes_array

BOUNDS = Bounds(max_rows=4, max_num_beams=4, max_new_tokens=100)
SIZE = (4, 6)


def call() -> GenerateCall:
    return GenerateCall(
        pixel_values=np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3),
        image_keys=[b"\x00one", b"two\x00"],
        input_ids=[np.array([0, 5, 2]), np.array([0, 7, 8, 9, 2]), np.array([0, 2])],
        image_index=[0, 1, 0],
        max_new_tokens=[10, 20, 100],
        options=GenerationOptions(num_beams=2, length_penalty=0.5, timeout_ms=900),
    )


def sent(tensors: list[Tensor], parameters: dict[str, Any] | None = None) -> InferRequest:
    message = wire.infer_request("florence2", tensors, request_id="7", parameters=parameters)
    return InferRequest.from_grpc(ModelInferRequest.FromString(message.SerializeToString()))


def test_a_call_survives_the_wire():
    ours = call()
    read = read_generate_call(sent(ours.to_tensors(), ours.to_parameters()), SIZE, BOUNDS)
    assert np.array_equal(read.pixel_values, ours.pixel_values)
    assert [ids.tolist() for ids in read.input_ids] == [ids.tolist() for ids in ours.input_ids]
    assert (read.image_keys, read.image_index, read.max_new_tokens, read.options) == (
        ours.image_keys,
        ours.image_index,
        ours.max_new_tokens,
        ours.options,
    )


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("pixel_values", np.zeros((2, 4, 5, 3), np.uint8), r"pixel_values: expected shape \[2, 4, 6, 3\]"),
        ("pixel_values", np.zeros((2, 4, 6), np.uint8), r"pixel_values: expected shape \[-1, -1, -1, 3\]"),
        ("pixel_values", np.zeros((2, 4, 6, 3), np.float32), "pixel_values: expected datatype UINT8, got FP32"),
        ("image_key", bytes_array([b"a"]), r"image_key: expected shape \[2\], got \[1\]"),
        ("image_index", np.array([0, 2, 0], np.int32), "image_index, row 1: expected 0 to 1, got 2"),
        ("image_index", np.array([-1, 1, 0], np.int32), "image_index, row 0: expected 0 to 1, got -1"),
        ("max_new_tokens", np.array([1, 0, 1], np.int32), "max_new_tokens, row 1: expected 1 or more, got 0"),
        ("attention_mask", np.zeros((3, 5), np.int64), "attention_mask, row 0: expected ones for the prompt"),
        ("attention_mask", np.array([[0, 1, 1, 1, 1]] * 3), "attention_mask, row 0: expected ones for the prompt"),
        ("input_ids", np.zeros((5, 5), np.int64), "input_ids: 5 rows are over this server's bound max_rows=4"),
        ("input_ids", np.zeros((0, 5), np.int64), "holds no image or no row"),
        ("extra", np.zeros(1, np.int32), "extra: unknown input"),
    ],
)
def test_wrong_calls_name_the_tensor_and_the_row(name, data, says):
    tensors = {tensor.name: tensor for tensor in call().to_tensors()} | {name: Tensor(name, data)}
    with pytest.raises(BadRequest, match=says):
        read_generate_call(sent(list(tensors.values())), SIZE, BOUNDS)


def test_more_new_tokens_than_the_bound_are_cut_down_to_it():
    tensors = {tensor.name: tensor for tensor in call().to_tensors()}
    tensors["max_new_tokens"] = Tensor("max_new_tokens", np.array([1, 100, 1024], np.int32))
    assert read_generate_call(sent(list(tensors.values())), SIZE, BOUNDS).max_new_tokens == [1, 100, 100]


def test_a_missing_tensor_is_named():
    with pytest.raises(BadTensor, match="max_new_tokens: required input is missing"):
        read_generate_call(sent(call().to_tensors()[:-1]), SIZE, BOUNDS)


def test_errors_of_rows_survive_the_wire():
    nothing = np.empty(0)
    result = GenerateResult(
        sequences=[nothing, np.array([2, 0, 2]), nothing],
        scores=[0.0, -1.25, 0.0],
        token_logprobs=[nothing, np.array([0, 0, -4], np.float32), nothing],
        finish_reasons=["error", "stop", "error"],
        errors={0: Unavailable("no room für it"), 2: Internal("")},
    )
    response = write_generate_result(sent(call().to_tensors()), result, pad=1).to_grpc()
    message = wire.MESSAGES["ModelInferResponse"].FromString(response.SerializeToString())
    read = GenerateResult.from_tensors(wire.response_tensors(message), wire.response_parameters(message), pad=1)
    assert {row: (type(error), error.details) for row, error in read.errors.items()} == {
        0: (Unavailable, "no room für it"),
        2: (Internal, ""),
    }
    assert read.sequences[1].tolist() == [2, 0, 2]


@pytest.mark.parametrize("options", [GenerationOptions(), GenerationOptions(partial=True, num_beams=1)])
def test_options_survive_the_wire(options):
    """What is left as it is isn't sent: a predictor of an older version wouldn't know it."""
    ours = dataclasses.replace(call(), options=options)
    assert ("partial" in ours.to_parameters()) is options.partial
    assert read_generate_call(sent(ours.to_tensors(), ours.to_parameters()), SIZE, BOUNDS).options == options


def test_a_result_survives_the_wire_with_pads_inside_a_sequence():
    result = GenerateResult(
        sequences=[np.array([2, 0, 1, 7, 2]), np.array([2, 0, 2])],
        scores=[-0.5, -1.25],
        token_logprobs=[np.array([0, 0, -1, -2, -3], np.float32), np.array([0, 0, -4], np.float32)],
        finish_reasons=["length", "stop"],
        timings={"queue_us": 5, "generate_us": 7},
    )
    response = write_generate_result(sent(call().to_tensors()), result, pad=1).to_grpc()
    message = wire.MESSAGES["ModelInferResponse"].FromString(response.SerializeToString())
    read = GenerateResult.from_tensors(wire.response_tensors(message), wire.response_parameters(message), pad=1)
    assert [s.tolist() for s in read.sequences] == [[2, 0, 1, 7, 2], [2, 0, 2]]
    assert [p.tolist() for p in read.token_logprobs] == [[0, 0, -1, -2, -3], [0, 0, -4]]
    assert (read.scores, read.finish_reasons, read.timings) == (result.scores, result.finish_reasons, result.timings)
