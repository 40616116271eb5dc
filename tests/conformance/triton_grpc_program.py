"""A user's program on ``tritonclient.grpc``, run by ``test_clients.py`` in a process of its own.

A process of its own because `tritonclient.grpc` and `kserve` register the same protobuf
names and cannot be imported together. Reads one JSON object from standard input and writes
one to standard output.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def _input(name: str, values: list[bytes]) -> Any:
    array = np.array(values, dtype=np.object_).reshape(len(values), 1)
    tensor = triton.InferInput(name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def _main() -> None:
    given = json.load(sys.stdin)
    model, timeout = given["model"], given["timeout"]
    common = {"headers": dict(given["metadata"]), "client_timeout": timeout}
    options = [tuple(option) for option in given["options"]]
    with triton.InferenceServerClient(given["url"], channel_args=options or None) as client:

        def infer(image: bytes, task: str, **extra: Any) -> Any:
            inputs = [_input("INPUT_IMAGE", [image]), _input("TASK_PROMPT", [task.encode()])]
            return client.infer(model, inputs, parameters=given["parameters"], **common, **extra)

        def answer(image: bytes) -> Any:
            return json.loads(infer(image, given["task"]).as_numpy("PARSED_JSON")[0, 0])

        picture = base64.b64decode(given["picture"])
        outputs = [triton.InferRequestedOutput("GENERATED_TEXT")]
        chosen = infer(picture, given["task"], outputs=outputs, request_id="r-1").get_response()
        report: dict[str, Any] = {
            "live": client.is_server_live(**common),
            "ready": client.is_server_ready(**common),
            "model ready": client.is_model_ready(model, **common),
            "metadata": client.get_model_metadata(model, as_json=True, **common)["name"],
            "raw": answer(picture),
            "base64": answer(base64.b64encode(picture)),
            "chosen outputs": [output.name for output in chosen.outputs],
            "id": chosen.id,
        }
        try:
            infer(picture, "<DANCE>")
        except InferenceServerException as error:
            report["refusal"] = [error.status(), error.message()]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    _main()
