"""V2 over REST: request bodies to the SDK's InferRequest and InferResponse to bodies.

The SDK's own codec decodes binary BYTES as UTF-8 (raw image bytes fail there), boxes
numeric tensors value by value and answers malformed JSON with 422; hence this one. The
wire format is the Open Inference Protocol with its binary tensor data extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import orjson

from florence2_kserve.errors import BadRequest, BadTensor
from florence2_kserve.protocol.tensors import check_datatype, pack

if TYPE_CHECKING:
    from kserve.protocol.infer_type import InferRequest, InferResponse

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"


def decode_request(body: bytes, headers: Mapping[str, str], model_name: str) -> InferRequest:
    """Decodes a V2 request body.

    Args:
        body: JSON, followed by the raw bytes of its binary tensors where there are any.
        headers: Request headers, names in lower case.
        model_name: Name in the URL.

    Raises:
        BadRequest: If the body isn't a V2 request; where one tensor is wrong, its name is in the message.
    """
    from kserve.protocol.infer_type import InferInput, InferRequest, RequestedOutput

    json_length = _json_length(headers, len(body))
    try:
        content = orjson.loads(memoryview(body)[:json_length])
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"request body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadRequest(f"request body has to be a JSON object, got {type(content).__name__}")
    inputs, offset = [], json_length
    for index, entry in enumerate(_list_of_objects(content, "inputs", required=True)):
        name = _field(entry, "name", str, f"inputs[{index}]")
        datatype = _field(entry, "datatype", str, name)
        shape = _field(entry, "shape", list, name)
        parameters = entry.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise BadTensor(name, "parameters have to be a JSON object")
        tensor = InferInput(name, shape, datatype, parameters=parameters)
        check_datatype(name, datatype.upper())
        size = parameters.get("binary_data_size")
        if size is not None and "data" in entry:
            raise BadTensor(name, "has both data and binary_data_size")
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise BadTensor(name, f"binary_data_size has to be a whole number, got {size!r}")
            if offset + size > len(body):
                raise BadTensor(name, f"binary_data_size is {size}, but the body has {len(body) - offset} bytes left")
            tensor._raw_data = memoryview(body)[offset : offset + size]
            offset += size
        else:
            tensor.data = _field(entry, "data", list, name)
        inputs.append(tensor)
    if offset != len(body):
        raise BadRequest(f"{len(body) - offset} bytes of the body belong to no tensor")
    outputs = [
        RequestedOutput(_field(entry, "name", str, f"outputs[{index}]"), entry.get("parameters") or {})
        for index, entry in enumerate(_list_of_objects(content, "outputs"))
    ]
    request_id, parameters = content.get("id"), content.get("parameters") or {}
    if request_id is not None and not isinstance(request_id, str):
        raise BadRequest(f"id has to be a string, got {type(request_id).__name__}")
    if not isinstance(parameters, dict):
        raise BadRequest(f"parameters have to be a JSON object, got {type(parameters).__name__}")
    return InferRequest(
        model_name=model_name,
        infer_inputs=inputs,
        request_id=request_id or uuid4().hex,
        parameters=parameters,
        request_outputs=outputs or None,
    )


def encode_response(response: InferResponse, request: InferRequest) -> tuple[bytes, dict[str, str]]:
    """Encodes an answer as `request` asked for it: each output in JSON, or raw behind it.

    Returns:
        The body, and the headers that describe it.
    """
    all_binary = bool((request.parameters or {}).get("binary_data_output", False))
    binary_of = {
        output.name: bool((output.parameters or {}).get("binary_data", all_binary))
        for output in request.request_outputs or []
    }
    outputs, raw = [], []
    for output in response.outputs:
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if binary_of.get(output.name, all_binary):
            raw.append(pack(output.data))
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            entry["data"] = _json_values(output.data)
        outputs.append(entry)
    content: dict[str, Any] = {"id": response.id, "model_name": response.model_name, "outputs": outputs}
    if response.parameters:
        content["parameters"] = response.parameters
    body = orjson.dumps(content)
    if not raw:
        return body, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(body))}
    return b"".join([body, *raw]), headers


def encode_request(
    inputs: Mapping[str, np.ndarray[Any, Any]], *, request_id: str, parameters: Mapping[str, Any], outputs: list[str]
) -> tuple[bytes, dict[str, str]]:
    """Encodes a request whose tensors all travel raw, as our client sends them.

    Returns:
        The body, and the headers that describe it.
    """
    raw = [pack(array) for array in inputs.values()]
    content = {
        "id": request_id,
        "parameters": dict(parameters),
        "inputs": [
            {
                "name": name,
                "datatype": "BYTES",
                "shape": [int(n) for n in array.shape],
                "parameters": {"binary_data_size": len(data)},
            }
            for (name, array), data in zip(inputs.items(), raw, strict=True)
        ],
        "outputs": [{"name": name} for name in outputs],
    }
    body = orjson.dumps(content)
    headers = {"Content-Type": "application/octet-stream", JSON_LENGTH_HEADER: str(len(body))}
    return b"".join([body, *raw]), headers


def _json_values(array: np.ndarray[Any, Any]) -> list[Any]:
    if array.dtype == np.object_:
        return [value.decode("utf-8", errors="replace") for value in array.flat]
    return array.reshape(-1).tolist()


def _json_length(headers: Mapping[str, str], body_length: int) -> int:
    text = headers.get(JSON_LENGTH_HEADER.lower())
    if text is None:
        return body_length
    if not text.isascii() or not text.isdigit() or int(text) > body_length:
        raise BadRequest(
            f"{JSON_LENGTH_HEADER} {text!r} has to be a whole number up to the body's {body_length} bytes"
        )
    return int(text)


def _list_of_objects(content: dict[str, Any], key: str, *, required: bool = False) -> list[dict[str, Any]]:
    value = content.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise BadRequest(f"{key!r} has to be a list of JSON objects" + (" and is missing" if value is None else ""))
    return value


def _field(entry: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind):
        expected = {"str": "a string", "list": "a list"}[kind.__name__]
        raise BadTensor(where, f"{key!r} is missing" if value is None else f"{key!r} has to be {expected}")
    return value
