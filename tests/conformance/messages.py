"""A V2 inference request and its outcome, in the four ways the protocol puts them on the wire."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .contract import IMAGE, PARSED, TASK, TEXT

# Bounds what a model may ramble over pictures it was never taught, so that the suite stays quick.
SHORT: Mapping[str, Any] = {"max_new_tokens": 64}
# Room for a label and its box: for tests that look at the form alone.
BRIEF: Mapping[str, Any] = {"max_new_tokens": 12}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input tensor.

    Attributes:
        name: The tensor's name.
        data: Its elements in row-major order: bytes for BYTES, integers for INT32.
        shape: Its shape as declared, which need not fit `data`.
        datatype: ``BYTES`` or ``INT32``.
    """

    name: str
    data: tuple[bytes, ...] | tuple[int, ...]
    shape: tuple[int, ...]
    datatype: str = "BYTES"

    def raw(self) -> bytes:
        """Returns the elements as the binary extension and gRPC's raw contents carry them."""
        return b"".join(
            struct.pack("<I", len(element)) + element if isinstance(element, bytes) else struct.pack("<i", element)
            for element in self.data
        )


@dataclass(frozen=True, slots=True)
class Request:
    """An inference request, not yet encoded.

    Attributes:
        tensors: Its inputs.
        parameters: Its parameters.
        outputs: Outputs asked for by name; none means the default ones.
        id: Its id, None where it has none.
        model: Name of another model than the one under test.
    """

    tensors: tuple[Tensor, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    id: str | None = None
    model: str | None = None

    def is_text(self) -> bool:
        """Whether all its elements are text, so that JSON can carry them."""
        return all(_is_text(element) for tensor in self.tensors for element in tensor.data)

    def json_body(self) -> dict[str, Any]:
        """Returns the request as a V2 JSON object, with the tensors' data in it."""
        return self._object(
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "datatype": tensor.datatype,
                "data": [element.decode() if isinstance(element, bytes) else element for element in tensor.data],
            }
            for tensor in self.tensors
        )

    def json_bytes(self) -> bytes:
        """Returns the request as encoded JSON."""
        return json.dumps(self.json_body()).encode()

    def binary_body(self) -> tuple[bytes, int]:
        """Returns the request with the binary extension: the body, and the length of its JSON part in bytes."""
        blobs = [tensor.raw() for tensor in self.tensors]
        header = self._object(
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "datatype": tensor.datatype,
                "parameters": {"binary_data_size": len(blob)},
            }
            for tensor, blob in zip(self.tensors, blobs, strict=True)
        )
        encoded = json.dumps(header).encode()
        return b"".join((encoded, *blobs)), len(encoded)

    def _object(self, inputs: Any) -> dict[str, Any]:
        body: dict[str, Any] = {"inputs": list(inputs)}
        if self.id is not None:
            body["id"] = self.id
        if self.parameters:
            body["parameters"] = dict(self.parameters)
        if self.outputs:
            body["outputs"] = [{"name": name} for name in self.outputs]
        return body


def ask(
    images: bytes | Sequence[bytes],
    tasks: str | Sequence[str],
    texts: str | Sequence[str] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    parameters: Mapping[str, Any] = SHORT,
    outputs: tuple[str, ...] = (),
    id: str | None = None,
) -> Request:
    """Returns a well-formed request: one row an image and task.

    Args:
        images: One image or several, as base64 text, data URI or a file's bytes.
        tasks: A task prompt for each row.
        texts: A text for each row, empty where there is none; None leaves the tensor out.
        shape: Shape of the task and text tensors, ``(rows, 1)`` where not given; images are ``(images, 1)``
            where this has two dimensions, else ``(images,)``.
        parameters: Request parameters.
        outputs: Outputs asked for by name; none means the default ones.
        id: Request id.
    """
    images, tasks = (images,) if isinstance(images, bytes) else images, _listed(tasks)
    shape = (len(tasks), 1) if shape is None else shape
    image_shape = (len(images), 1) if len(shape) == 2 else (len(images),)
    tensors = [Tensor(IMAGE, tuple(images), image_shape), Tensor(TASK, _encoded(tasks), shape)]
    if texts is not None:
        tensors.append(Tensor(TEXT, _encoded(_listed(texts)), shape))
    return Request(tuple(tensors), parameters, outputs, id)


def _is_text(element: bytes | int) -> bool:
    if isinstance(element, int):
        return True
    try:
        element.decode()
    except UnicodeDecodeError:
        return False
    return True


def _listed(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def _encoded(values: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(value.encode() for value in values)


@dataclass(frozen=True, slots=True)
class Output:
    """An output tensor of BYTES, its elements decoded from UTF-8."""

    datatype: str
    shape: tuple[int, ...]
    data: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back for a request.

    Attributes:
        status: ``ok``, or a name from `wires.py` that REST and gRPC share, or the bare code where it has none.
        message: The error's text, empty where there is none.
        id: The response's id.
        model_name: The response's model name.
        outputs: The response's outputs by name.
        parameters: The response's parameters.
    """

    status: str
    message: str = ""
    id: str = ""
    model_name: str = ""
    outputs: Mapping[str, Output] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def elements(self, name: str) -> tuple[str, ...]:
        """Returns the elements of the output `name`, after asserting that all went well."""
        assert self.status == "ok", f"{self.status}: {self.message}"
        assert name in self.outputs, f"no {name} among the outputs {list(self.outputs)}"
        return self.outputs[name].data

    def answers(self, name: str = PARSED) -> list[Any]:
        """Returns the elements of the output `name`, parsed from JSON, after asserting that all went well."""
        return [json.loads(element, parse_constant=_refuse_constant) for element in self.elements(name)]


def _refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def unpack_bytes_tensor(raw: bytes) -> tuple[bytes, ...]:
    """Returns the elements of a BYTES tensor in binary form (four bytes of length before each)."""
    elements, position = [], 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        assert position + 4 + length <= len(raw), "an element reaches beyond its tensor"
        elements.append(raw[position + 4 : position + 4 + length])
        position += 4 + length
    return tuple(elements)
