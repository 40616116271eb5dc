"""The clients that people use, as further ways to send a `Request`: KServe's, Triton's and this project's own."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, ClassVar

import grpc
import httpx
import kserve
import numpy as np
import tritonclient.http as triton
from kserve.protocol.infer_type import RequestedOutput, to_http_parameters
from tritonclient.utils import InferenceServerException

from florence2_kserve.client import ClientError, Florence2Client

from .contract import IMAGE, PARSED, TASK, TEXT
from .messages import Outcome, Output, Request, Tensor
from .wires import Target, Wire, grpc_refusal, read_output, rest_refusal


class ClientWire(Wire):
    """A client of the server at `target`."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def health(self) -> dict[str, Any]:
        """Returns what the client says of ``live``, ``ready`` and ``model ready``, and the name of the ``model``."""

    def assert_alive(self) -> None:
        assert self.health()["live"]


class _TensorClient(ClientWire):
    """A client that takes tensors as arrays."""

    def cannot_send(self, request: Request) -> str:
        if not all(_is_whole(tensor) for tensor in request.tensors):
            return "its arrays have the shape that they say"
        return super().cannot_send(request)


def _is_whole(tensor: Tensor) -> bool:
    return math.prod(tensor.shape) == len(tensor.data) and tensor.datatype in ("BYTES", "INT32")


def _array(tensor: Tensor) -> Any:
    array = np.array(tensor.data, dtype=np.object_ if tensor.datatype == "BYTES" else np.int32)
    return array.reshape(tensor.shape)


def _encoded(elements: Iterable[Any]) -> list[bytes]:
    return [element.encode() if isinstance(element, str) else element for element in elements]


class _KServe(_TensorClient):
    """KServe's clients are asynchronous: each has a loop of its own."""

    binary: ClassVar[bool]

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._runner = asyncio.Runner()
        self._client = self._run(self._connect())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    @abstractmethod
    async def _connect(self) -> Any:
        """Makes the client, which belongs to the loop that it is made in."""

    def _request(self, request: Request) -> Any:
        inputs = []
        for tensor in request.tensors:
            made = kserve.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
            made.set_data_from_numpy(_array(tensor), binary_data=self.binary)
            inputs.append(made)
        return kserve.InferRequest(
            request.model or self.target.model,
            inputs,
            request_id=request.id,
            parameters=dict(request.parameters),
            request_outputs=[RequestedOutput(name) for name in request.outputs],
        )

    def close(self) -> None:
        self._run(self._client.close())
        self._runner.close()


def _kserve_outcome(response: Any) -> Outcome:
    return Outcome(
        "ok",
        "",
        response.id,
        response.model_name,
        {
            output.name: read_output(output.datatype, output.shape, _encoded(output.as_numpy().flat))
            for output in response.outputs
        },
        to_http_parameters(response.parameters or {}),
    )


class _KServeRest(_KServe):
    async def _connect(self) -> Any:
        return kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=self.target.timeout))

    def infer(self, request: Request) -> Outcome:
        made, headers = self._request(request), dict(self.target.headers)
        try:
            response = self._run(self._client.infer(self.target.rest_url, made, made.model_name, headers))
        except httpx.HTTPStatusError as error:
            return rest_refusal(error.response.status_code, error.response.json()["error"])
        return _kserve_outcome(response)

    def health(self) -> dict[str, Any]:
        client, url, headers = self._client, self.target.rest_url, dict(self.target.headers)
        return {
            "live": self._run(client.is_server_live(url, headers)),
            "ready": self._run(client.is_server_ready(url, headers)),
            "model ready": self._run(client.is_model_ready(url, self.target.model, headers)),
            "model": self.target.model,
        }


class KServeRestJson(_KServeRest):
    """KServe's REST client with JSON."""

    name, binary, carries_bytes = "kserve-rest-json", False, False


class KServeRestBinary(_KServeRest):
    """KServe's REST client with the binary extension."""

    name, binary = "kserve-rest-binary", True


class _KServeGrpc(_KServe):
    no_fractions = "it refuses parameters that are fractions; they go as strings"

    async def _connect(self) -> Any:
        options = [("grpc.max_send_message_length", -1), *self.target.grpc_options()]
        return kserve.InferenceGRPCClient(self.target.grpc_url, channel_args=options, timeout=self.target.timeout)

    def infer(self, request: Request) -> Outcome:
        made = self._request(request)
        try:
            response = self._run(self._client.infer(made, headers=self.target.grpc_metadata()))
        except grpc.RpcError as error:
            return grpc_refusal(error.code().name, error.details())
        return _kserve_outcome(response)

    def health(self) -> dict[str, Any]:
        client, headers = self._client, self.target.grpc_metadata()
        return {
            "live": self._run(client.is_server_live(headers=headers)),
            "ready": self._run(client.is_server_ready(headers=headers)),
            "model ready": self._run(client.is_model_ready(self.target.model, headers=headers)),
            "model": self.target.model,
        }


class KServeGrpcTyped(_KServeGrpc):
    """KServe's gRPC client with lists of strings, which it sends as typed contents."""

    name, binary, carries_bytes = "kserve-grpc-typed", False, False


class KServeGrpcRaw(_KServeGrpc):
    """KServe's gRPC client with arrays, which it sends as raw contents."""

    name, binary = "kserve-grpc-raw", True


def triton_http_client(target: Target) -> Any:
    """Returns Triton's REST client of the server at `target`."""
    scheme, _, address = target.rest_url.rstrip("/").partition("://")
    return triton.InferenceServerClient(
        address, ssl=scheme == "https", connection_timeout=target.timeout, network_timeout=target.timeout
    )


class _TritonHttp(_TensorClient):
    binary: ClassVar[bool]

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._client = triton_http_client(target)

    def infer(self, request: Request) -> Outcome:
        inputs = []
        for tensor in request.tensors:
            made = triton.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
            made.set_data_from_numpy(_array(tensor), binary_data=self.binary)
            inputs.append(made)
        outputs = [triton.InferRequestedOutput(name, binary_data=self.binary) for name in request.outputs]
        try:
            result = self._client.infer(
                request.model or self.target.model,
                inputs,
                outputs=outputs,
                request_id=request.id or "",
                headers=dict(self.target.headers),
                parameters=dict(request.parameters),
            )
        except InferenceServerException as error:
            return rest_refusal(int(error.status()), error.message())
        response = result.get_response()
        read = {
            output["name"]: read_output(
                output["datatype"], output["shape"], _encoded(result.as_numpy(output["name"]).flat)
            )
            for output in response["outputs"]
        }
        return Outcome("ok", "", response["id"], response["model_name"], read, response.get("parameters") or {})

    def health(self) -> dict[str, Any]:
        client, headers = self._client, dict(self.target.headers)
        return {
            "live": client.is_server_live(headers=headers),
            "ready": client.is_server_ready(headers=headers),
            "model ready": client.is_model_ready(self.target.model, headers=headers),
            "model": client.get_model_metadata(self.target.model, headers=headers)["name"],
        }

    def close(self) -> None:
        self._client.close()


class TritonHttpJson(_TritonHttp):
    """Triton's REST client with JSON; where no outputs are named it asks for binary ones by itself."""

    name, binary, carries_bytes = "triton-http-json", False, False


class TritonHttpBinary(_TritonHttp):
    """Triton's REST client with the binary extension, both ways."""

    name, binary = "triton-http-binary", True


class TritonGrpc(_TensorClient):
    """Triton's gRPC client, in a process of its own (`triton_grpc_program.py`)."""

    name = "triton-grpc"
    no_fractions = "it sends fractions in a field that KServe's protobuf lacks; they go as strings"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("triton_grpc_program.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._write(
            {
                "url": target.grpc_url,
                "model": target.model,
                "timeout": target.timeout,
                "metadata": target.grpc_metadata(),
                "options": target.grpc_options(),
            }
        )

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def _call(self, call: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdout
        self._write({"call": call, **arguments})
        line = self._process.stdout.readline()
        assert line, f"the program ended with code {self._process.wait()}; its own words are on standard error"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def health(self) -> dict[str, Any]:
        return self._call("health")

    def infer(self, request: Request) -> Outcome:
        answer = self._call(
            "infer",
            model=request.model or self.target.model,
            inputs=[_json_tensor(tensor) for tensor in request.tensors],
            outputs=request.outputs,
            request_id=request.id or "",
            parameters=dict(request.parameters),
        )
        if "status" in answer:
            return grpc_refusal(answer["status"].removeprefix("StatusCode."), answer["message"])
        outputs = {
            name: read_output(given["datatype"], given["shape"], map(base64.b64decode, given["data"]))
            for name, given in answer["outputs"].items()
        }
        return Outcome("ok", "", answer["id"], answer["model"], outputs, answer["parameters"])

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=self.target.timeout)
        self._process.stdout.close()


def _json_tensor(tensor: Tensor) -> dict[str, Any]:
    data = [base64.b64encode(element).decode() if isinstance(element, bytes) else element for element in tensor.data]
    return {"name": tensor.name, "shape": tensor.shape, "datatype": tensor.datatype, "data": data}


class _Own(ClientWire):
    """This project's client: it takes pictures and prompts, and gives answers."""

    shows_tensors = False

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._client = self._connect(target.model)

    @abstractmethod
    def _address(self) -> str:
        """Returns the address as the client takes it."""

    def _connect(self, model: str) -> Florence2Client:
        target, headers = self.target, dict(self.target.headers)
        return Florence2Client(self._address(), model_name=model, timeout=target.timeout, retries=0, headers=headers)

    def cannot_send(self, request: Request) -> str:
        tensors = {tensor.name: tensor for tensor in request.tensors}
        if not set(tensors) <= {IMAGE, TASK, TEXT} or not {IMAGE, TASK} <= set(tensors):
            return "it names the tensors itself"
        if any(tensor.datatype != "BYTES" for tensor in request.tensors):
            return "it chooses the datatypes itself"
        tasks = len(tensors[TASK].data)
        if any(len(tensor.data) != tasks for tensor in request.tensors if tensor.name != IMAGE):
            return "it sends a text with each task"
        images = len(tensors[IMAGE].data)
        if images not in (1, tasks):
            return "it sends one task with each image, or several with one image"
        if images < tasks and request.parameters.get("partial"):
            return "of several tasks with one image it raises a bad row's error"
        if request.outputs:
            return "it chooses the outputs itself"
        if request.id is not None:
            return "it makes the ids itself"
        return super().cannot_send(request)

    def infer(self, request: Request) -> Outcome:
        if request.model:
            with self._connect(request.model) as other:
                return self._ask(other, request)
        return self._ask(self._client, request)

    def _ask(self, client: Florence2Client, request: Request) -> Outcome:
        data: dict[str, Any] = {tensor.name: tensor.data for tensor in request.tensors}
        texts = [text.decode() for text in data[TEXT]] if TEXT in data else None
        tasks = [task.decode() for task in data[TASK]]
        images, parameters = data[IMAGE], request.parameters
        try:
            if len(images) == len(tasks):
                answers = client.infer_batch(images, tasks, texts, **parameters)
            else:
                answers = [answer.raw for answer in client.ask_tasks(images[0], tasks, texts, **parameters)]
        except ClientError as error:
            if isinstance(error.status, int):
                return rest_refusal(error.status, error.message)
            return grpc_refusal(str(error.status), error.message)
        elements = tuple(json.dumps(answer) for answer in answers)
        return Outcome("ok", outputs={PARSED: Output("BYTES", (len(elements),), elements)})

    def health(self) -> dict[str, Any]:
        ready = self._client.is_ready()
        return {
            "live": self._client.is_live(),
            "ready": ready,
            "model ready": ready,
            "model": self._client.metadata()["name"],
        }

    def close(self) -> None:
        self._client.close()


class OwnRest(_Own):
    """This project's client over REST."""

    name = "client-rest"

    def _address(self) -> str:
        return self.target.rest_url


class OwnGrpc(_Own):
    """This project's client over gRPC."""

    name = "client-grpc"

    def _address(self) -> str:
        return f"grpc://{self.target.grpc_url}"


CLIENTS: tuple[type[ClientWire], ...] = (
    KServeRestJson,
    KServeRestBinary,
    KServeGrpcTyped,
    KServeGrpcRaw,
    TritonHttpJson,
    TritonHttpBinary,
    TritonGrpc,
    OwnRest,
    OwnGrpc,
)
