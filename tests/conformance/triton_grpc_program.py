"""A user's program on ``tritonclient.grpc``, which ``clients.py`` runs in a process of its own.

A process of its own because `tritonclient.grpc` and `kserve` register the same protobuf
names and cannot be imported together. Reads one JSON object a line from standard input and
answers each with one on standard output: first how to reach the server, then calls. Elements
of tensors travel as base64, both ways.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def _input(given: dict[str, Any]) -> Any:
    is_bytes = given["datatype"] == "BYTES"
    elements = [base64.b64decode(element) for element in given["data"]] if is_bytes else given["data"]
    array = np.array(elements, dtype=np.object_ if is_bytes else np.int32).reshape(given["shape"])
    tensor = triton.InferInput(given["name"], given["shape"], given["datatype"])
    tensor.set_data_from_numpy(array)
    return tensor


def _output(result: Any, described: Any) -> dict[str, Any]:
    array = result.as_numpy(described.name)
    return {
        "datatype": described.datatype,
        "shape": array.shape,
        "data": [base64.b64encode(element).decode() for element in array.flat],
    }


class _Program:
    """The calls, each named by the method that answers it."""

    def __init__(self, client: Any, model: str, common: dict[str, Any]) -> None:
        self._client, self._model, self._common = client, model, common

    def health(self) -> dict[str, Any]:
        client, common = self._client, self._common
        return {
            "live": client.is_server_live(**common),
            "ready": client.is_server_ready(**common),
            "model ready": client.is_model_ready(self._model, **common),
            "model": client.get_model_metadata(self._model, as_json=True, **common)["name"],
        }

    def infer(self, model: str, inputs: list[Any], outputs: list[str], **options: Any) -> dict[str, Any]:
        chosen = [triton.InferRequestedOutput(name) for name in outputs]
        try:
            result = self._client.infer(
                model, [_input(given) for given in inputs], outputs=chosen or None, **options, **self._common
            )
        except InferenceServerException as error:
            return {"status": error.status(), "message": error.message()}
        response = result.get_response()
        return {
            "id": response.id,
            "model": response.model_name,
            "outputs": {described.name: _output(result, described) for described in response.outputs},
            "parameters": {
                name: getattr(value, value.WhichOneof("parameter_choice"))
                for name, value in response.parameters.items()
            },
        }


def _main() -> None:
    given = json.loads(sys.stdin.readline())
    common = {"headers": dict(given["metadata"]), "client_timeout": given["timeout"]}
    options = [tuple(option) for option in given["options"]]
    with triton.InferenceServerClient(given["url"], channel_args=options or None) as client:
        program = _Program(client, given["model"], common)
        for line in sys.stdin:
            call = json.loads(line)
            answer = getattr(program, call.pop("call"))(**call)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
