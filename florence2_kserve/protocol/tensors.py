"""V2 tensors as numpy arrays: data types, raw bytes, and the SDK's InferInput and InferOutput."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from florence2_kserve.errors import BadTensor

if TYPE_CHECKING:
    from kserve.protocol.infer_type import InferInput, InferOutput, InferRequest

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
_DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}


_MOST_AXES, _LONGEST_AXIS = 8, 2**31


@dataclass(slots=True)
class Tensor:
    """A named V2 tensor.

    Attributes:
        name: Tensor's name.
        data: Its values in its shape; for BYTES an object array of ``bytes``.
    """

    name: str
    data: np.ndarray[Any, Any]

    @property
    def datatype(self) -> str:
        """V2 name of the data type, e.g. ``UINT8``."""
        return _DATATYPE_OF[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        """Shape as V2 wants it, a list of Python ints."""
        return [int(n) for n in self.data.shape]


def check_datatype(name: str, datatype: str) -> None:
    """Checks that V2 has such a data type.

    Raises:
        BadTensor: If it hasn't.
    """
    if datatype not in DATATYPES:
        raise BadTensor(name, f"unknown datatype {datatype!r}; known: {', '.join(DATATYPES)}")


def bytes_array(values: Sequence[bytes]) -> np.ndarray[Any, Any]:
    """Returns a BYTES array [N]; numpy itself would strip trailing zero bytes."""
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array


def pack(array: np.ndarray[Any, Any]) -> bytes:
    """Returns the raw little-endian bytes of `array`; BYTES elements are each preceded by their length."""
    if array.dtype != np.object_:
        return np.ascontiguousarray(array).tobytes()
    return b"".join(part for value in array.flat for part in (struct.pack("<I", len(value)), value))


def unpack(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> np.ndarray[Any, Any]:
    """Reads raw bytes into an array of `shape`; numbers are read without a copy, and read-only.

    Raises:
        BadTensor: If the bytes don't hold exactly the elements that `shape` promises.
    """
    count = math.prod(shape)
    if datatype != "BYTES":
        dtype = DATATYPES[datatype]
        if len(raw) != count * dtype.itemsize:
            raise BadTensor(
                name, f"shape {list(shape)} of {datatype} takes {count * dtype.itemsize} bytes, got {len(raw)}"
            )
        return np.frombuffer(raw, dtype=dtype).reshape(shape)
    values: list[bytes] = []
    view, offset = memoryview(raw), 0
    while offset < len(view):
        if offset + 4 > len(view):
            raise BadTensor(name, "raw BYTES data ends inside a length", row=len(values))
        (length,) = struct.unpack_from("<I", view, offset)
        offset += 4
        if offset + length > len(view):
            raise BadTensor(
                name, f"says {length} bytes, but {len(view) - offset} are left in the raw data", row=len(values)
            )
        values.append(bytes(view[offset : offset + length]))
        offset += length
    return _shaped(name, shape, values)


def from_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Reads a list of values, as JSON or typed gRPC contents carry them, flat or nested, into an array of `shape`.

    Raises:
        BadTensor: If values are of another type or number than `datatype` and `shape` say.
    """
    flat = _flatten(name, values, shape)
    if datatype == "BYTES":
        return _shaped(name, shape, [_to_bytes(name, row, value) for row, value in enumerate(flat)])
    dtype = DATATYPES[datatype]
    for row, value in enumerate(flat):
        if isinstance(value, bool) is not (datatype == "BOOL") or not isinstance(value, (bool, int, float)):
            raise BadTensor(name, f"expected {datatype}, got {type(value).__name__}", row=row)
    try:
        array = np.array(flat, dtype=dtype)
    except (OverflowError, ValueError, TypeError) as error:
        raise BadTensor(name, f"values don't fit {datatype}: {error}") from None
    if dtype.kind in "iu" and any(value != int(value) for value in flat if isinstance(value, float)):
        raise BadTensor(name, f"values don't fit {datatype}: a fraction was given")
    if array.size != math.prod(shape):
        raise BadTensor(name, f"shape {list(shape)} takes {math.prod(shape)} values, got {array.size}")
    return array.reshape(shape)


def from_infer_input(tensor: InferInput) -> Tensor:
    """Reads one of the SDK's inputs.

    Raises:
        BadTensor: On an unknown data type, a bad shape, or data that don't fit them.
    """
    name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
    check_datatype(name, datatype)
    if len(shape) > _MOST_AXES or any(
        isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < _LONGEST_AXIS for n in shape
    ):
        raise BadTensor(
            name, f"shape has to hold at most {_MOST_AXES} whole numbers from 0 on; it is {str(list(shape))[:100]}"
        )
    raw = tensor._raw_data  # the SDK has no public way to the bytes as sent
    if raw is not None:
        return Tensor(name, unpack(name, datatype, shape, raw))
    if isinstance(tensor.data, np.ndarray):
        return Tensor(name, tensor.data.reshape(shape))
    return Tensor(name, from_values(name, datatype, shape, tensor.data or []))


def named_inputs(request: InferRequest, known: Collection[str], required: Collection[str]) -> dict[str, InferInput]:
    """Returns the request's inputs by name.

    Raises:
        BadTensor: If one is unknown, given twice, or required and missing.
    """
    inputs: dict[str, InferInput] = {}
    for infer_input in request.inputs:
        if infer_input.name not in known:
            raise BadTensor(infer_input.name, f"unknown input; expected {', '.join(known)}")
        if infer_input.name in inputs:
            raise BadTensor(infer_input.name, "given twice")
        inputs[infer_input.name] = infer_input
    for name in required:
        if name not in inputs:
            raise BadTensor(name, "required input is missing")
    return inputs


def to_infer_output(tensor: Tensor) -> InferOutput:
    """Returns the SDK's output for `tensor`; it holds an array, which the SDK or our codec encodes as asked."""
    from kserve.protocol.infer_type import InferOutput

    return InferOutput(name=tensor.name, shape=tensor.shape, datatype=tensor.datatype, data=tensor.data)


def _shaped(name: str, shape: Sequence[int], values: list[bytes]) -> np.ndarray[Any, Any]:
    if len(values) != math.prod(shape):
        raise BadTensor(name, f"shape {list(shape)} takes {math.prod(shape)} elements, got {len(values)}")
    return bytes_array(values).reshape(shape)


def _flatten(name: str, values: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """Returns the leaves of `values`, which are flat or nested just as `shape` says."""
    if not any(isinstance(value, list) for value in values):
        return list(values)
    level: list[Any] = [values]
    for size in shape:
        if any(not isinstance(value, Sequence) or isinstance(value, str) or len(value) != size for value in level):
            break
        level = [inner for value in level for inner in value]
    else:
        if not any(isinstance(value, list) for value in level):
            return level
    raise BadTensor(name, f"data are nested in another way than shape {list(shape)} says")


def _to_bytes(name: str, row: int, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise BadTensor(name, f"expected BYTES (a string in JSON), got {type(value).__name__}", row=row)
