from __future__ import annotations

import numpy as np
import pytest

from florence2_kserve.errors import BadTensor
from florence2_kserve.protocol.tensors import (
    DATATYPES,
    Tensor,
    bytes_array,
    from_infer_input,
    from_values,
    pack,
    unpack,
)


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_numbers_survive_packing(datatype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(DATATYPES[datatype])
    read = unpack("x", datatype, [2, 3], pack(array))
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)


def test_bytes_survive_packing_with_zeros_and_empty_elements():
    array = bytes_array([b"\0a\0", b"", b"\xff\xfe" * 300, b"text"]).reshape(2, 2)
    read = unpack("x", "BYTES", [2, 2], pack(array))
    assert read.tolist() == array.tolist()


def test_packing_equals_the_sdk():
    from kserve.protocol.infer_type import InferInput

    array = bytes_array([b"one", b"", b"\x00\x01"])
    theirs = InferInput("x", [3], "BYTES")
    theirs.set_data_from_numpy(array)
    assert pack(array) == theirs._raw_data
    assert from_infer_input(theirs).data.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "says"),
    [
        ("INT32", [2], b"1234567", r"takes 8 bytes, got 7"),
        ("BYTES", [1], b"\x01\x00", r"x, row 0: raw BYTES data ends inside a length"),
        ("BYTES", [2], b"\x01\x00\x00\x00a\x05\x00\x00\x00b", r"x, row 1: says 5 bytes, but 1 are left"),
        ("BYTES", [2], b"\x01\x00\x00\x00a", r"takes 2 elements, got 1"),
    ],
)
def test_raw_data_that_do_not_fit_are_refused(datatype, shape, raw, says):
    with pytest.raises(BadTensor, match=says):
        unpack("x", datatype, shape, raw)


@pytest.mark.parametrize(
    ("datatype", "values", "says"),
    [
        ("BYTES", ["a", 3], r"row 1: expected BYTES \(a string in JSON\), got int"),
        ("INT32", [1, "2"], r"row 1: expected INT32, got str"),
        ("INT32", [1, True], r"row 1: expected INT32, got bool"),
        ("BOOL", [True, 1], r"row 1: expected BOOL, got int"),
        ("UINT8", [1, 256], r"don't fit UINT8"),
        ("INT32", [1, 1.5], r"a fraction was given"),
        ("INT32", [1, 2, 3], r"takes 2 values, got 3"),
        ("BYTES", ["a"], r"takes 2 elements, got 1"),
    ],
)
def test_values_that_do_not_fit_are_refused(datatype, values, says):
    with pytest.raises(BadTensor, match=says):
        from_values("x", datatype, [2], values)


def test_nested_values_are_read_in_row_major_order():
    assert from_values("x", "INT64", [2, 2], [[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert from_values("x", "BYTES", [2, 1], [["a"], ["b"]]).tolist() == [[b"a"], [b"b"]]


@pytest.mark.parametrize(("shape", "values"), [([1, 1], [[["a"]]]), ([2, 1], [["a", "b"]]), ([2], [["a"], "b"])])
def test_values_nested_unlike_the_shape_are_refused(shape, values):
    with pytest.raises(BadTensor, match="nested in another way"):
        from_values("x", "BYTES", shape, values)


def test_a_tensor_knows_its_v2_type_and_shape():
    tensor = Tensor("x", np.zeros((2, 3), dtype=np.uint8))
    assert (tensor.datatype, tensor.shape) == ("UINT8", [2, 3])
