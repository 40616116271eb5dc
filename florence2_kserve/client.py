"""A client for the service, over REST or gRPC; it needs neither torch nor kserve.

with Florence2Client("http://localhost:8080") as client:
    client.infer("street.jpg", "<CAPTION>")  # {'<CAPTION>': 'A street at night.'}
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import grpc
import httpx
import numpy as np

from florence2_kserve.protocol import wire
from florence2_kserve.protocol.public import (
    INPUT_IMAGE,
    PARSED_JSON,
    TASK_PROMPT,
    TEXT_PROMPT,
)
from florence2_kserve.protocol.rest import JSON_LENGTH_HEADER, encode_request
from florence2_kserve.protocol.tensors import Tensor, bytes_array, from_values, unpack
from florence2_kserve.tasks import find_task

Image = bytes | str | Path
_FIRST_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 10.0


class ClientError(Exception):
    """The service refused or couldn't answer.

    Attributes:
        message: The server's message.
        status: HTTP status or name of the gRPC status; None where no answer came.
    """

    def __init__(self, message: str, status: int | str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.retry_after_s = message, status, retry_after_s


class InvalidRequestError(ClientError):
    """The request is wrong (400, 413); sending it again won't help."""


class NotFoundError(ClientError):
    """No such model (404)."""


class OverloadedError(ClientError):
    """The server's queue is full (429)."""


class UnavailableError(ClientError):
    """The server is loading, draining or can't be reached (503, a proxy's 502, connection refused or reset)."""


class DeadlineError(ClientError):
    """No answer in time (504, or the client's own timeout)."""


class ServerError(ClientError):
    """A fault of the server (500 and others)."""


_BY_HTTP_STATUS = {
    400: InvalidRequestError,
    413: InvalidRequestError,
    404: NotFoundError,
    429: OverloadedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineError,
}
_BY_GRPC_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}


class Florence2Client:
    """Asks a Florence-2 service.

    Requests that meet a full queue, an unready server or a reset connection are sent again,
    with growing jittered pauses, as often as `retries` says and while `timeout` lasts; they
    change nothing on the server, so that sending twice is safe.

    Args:
        url: ``http://host:port`` for REST, ``grpc://host:port`` for gRPC without TLS.
        model_name: Name of the model in the URL.
        timeout: Seconds for one call, its retries included.
        retries: How often a call is repeated.
        headers: Sent with every call, e.g. authorization; ``Host`` names a service behind an ingress whose address
            `url` holds, and is the ``:authority`` over gRPC.
        max_message_bytes: Largest gRPC message.

    Attributes:
        timeout: As given; may be changed.
        retries: As given; may be changed.
        retries_made: How often calls of this client were repeated until now.
    """

    def __init__(
        self,
        url: str = "http://localhost:8080",
        *,
        model_name: str = "florence2",
        timeout: float = 120.0,
        retries: int = 5,
        headers: dict[str, str] | None = None,
        max_message_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        scheme, separator, target = url.partition("://")
        if not separator or scheme not in ("http", "https", "grpc"):
            raise ValueError(f"url has to start with http://, https:// or grpc://, got {url!r}")
        self.model_name, self.timeout, self.retries = model_name, timeout, retries
        self.retries_made = 0
        self._counting = threading.Lock()
        self._transport: _Rest | _Grpc = (
            _Grpc(target, model_name, headers or {}, max_message_bytes)
            if scheme == "grpc"
            else _Rest(url.rstrip("/"), model_name, headers or {})
        )

    def infer(self, image: Image, task: str, text: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Asks one question about one image.

        Args:
            image: Path of an image file, or its encoded bytes (JPEG, PNG, …).
            task: Task prompt, with or without angle brackets: ``"<CAPTION>"``, ``"od"``.
            text: Text or region, for the tasks that take one.
            **parameters: Request parameters: max_new_tokens, num_beams, length_penalty, timeout_ms.

        Returns:
            The answer keyed by the task prompt, e.g. ``{"<OD>": {"bboxes": [[…]], "labels": […]}}``.

        Raises:
            ClientError: One of its kinds; `message` holds what the server said.
        """
        return self.infer_batch([image], [task], None if text is None else [text], **parameters)[0]

    def infer_batch(
        self,
        images: Sequence[Image],
        tasks: Sequence[str],
        texts: Sequence[str | None] | None = None,
        **parameters: Any,
    ) -> list[dict[str, Any]]:
        """Asks one question about each of several images in one request.

        Args:
            images: B images.
            tasks: B task prompts.
            texts: B texts or regions, None or "" where the task takes none.
            **parameters: As for `infer`.

        Returns:
            B answers.

        Raises:
            ValueError: If the lengths differ.
            ClientError: One of its kinds; one bad row fails the request, and its message names the row.
        """
        if len(tasks) != len(images) or (texts is not None and len(texts) != len(images)):
            raise ValueError(f"{len(images)} images, {len(tasks)} tasks and {len(texts or [])} texts don't match")
        inputs = {
            INPUT_IMAGE: bytes_array([_read(image) for image in images]),
            TASK_PROMPT: bytes_array([_task_name(task).encode() for task in tasks]),
        }
        if texts is not None and any(texts):
            inputs[TEXT_PROMPT] = bytes_array([(text or "").encode() for text in texts])
        outputs = self._call(lambda timeout: self._transport.infer(inputs, parameters, timeout))
        return [json.loads(answer) for answer in outputs[PARSED_JSON].flat]

    def is_ready(self) -> bool:
        """Whether the service says that the model is ready."""
        try:
            return self._transport.is_ready(min(self.timeout, 10.0))
        except ClientError:
            return False

    def is_live(self) -> bool:
        """Whether the service's process answers."""
        try:
            return self._transport.is_live(min(self.timeout, 10.0))
        except ClientError:
            return False

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Waits until the model is ready.

        Raises:
            UnavailableError: If it isn't after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                if self._transport.is_ready(min(max(end - time.monotonic(), 1.0), 10.0)):
                    return
                reason = "it says that it isn't"
            except ClientError as error:
                reason = str(error)
            if time.monotonic() >= end:
                raise UnavailableError(f"the model isn't ready after {timeout:g} s: {reason}")
            time.sleep(0.2)

    def metadata(self) -> dict[str, Any]:
        """Returns the model's V2 metadata: its name, platform, inputs and outputs."""
        return self._call(self._transport.metadata)

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, send: Callable[[float], Any]) -> Any:
        end = time.monotonic() + self.timeout
        for attempt in range(self.retries + 1):
            try:
                return send(max(0.001, end - time.monotonic()))
            except (OverloadedError, UnavailableError) as error:
                pause = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.5)
                pause = max(pause, error.retry_after_s or 0.0)
                if attempt == self.retries or time.monotonic() + pause >= end:
                    raise
                with self._counting:
                    self.retries_made += 1
                time.sleep(pause)
        raise AssertionError("unreachable")


class _Rest:
    def __init__(self, url: str, model_name: str, headers: dict[str, str]) -> None:
        self._model = f"/v2/models/{model_name}"
        self._http = httpx.Client(base_url=url, headers=headers, trust_env=not _is_local(httpx.URL(url).host))

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any], timeout: float
    ) -> dict[str, np.ndarray[Any, Any]]:
        body, headers = encode_request(inputs, request_id=uuid4().hex, parameters=parameters, outputs=[PARSED_JSON])
        response = self._send("POST", f"{self._model}/infer", timeout, content=body, headers=headers)
        length = int(response.headers.get(JSON_LENGTH_HEADER, len(response.content)))
        content = json.loads(response.content[:length])
        arrays, offset = {}, length
        for output in content["outputs"]:
            name, datatype, shape = output["name"], output["datatype"], output["shape"]
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                arrays[name] = from_values(name, datatype, shape, output["data"])
            else:
                arrays[name] = unpack(name, datatype, shape, response.content[offset : offset + size])
                offset += size
        return arrays

    def is_ready(self, timeout: float) -> bool:
        self._send("GET", f"{self._model}/ready", timeout)
        return True

    def is_live(self, timeout: float) -> bool:
        self._send("GET", "/v2/health/live", timeout)
        return True

    def metadata(self, timeout: float) -> dict[str, Any]:
        return dict(self._send("GET", self._model, timeout).json())

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, path: str, timeout: float, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, timeout=timeout, **kwargs)
        except httpx.TimeoutException:
            raise DeadlineError(f"no answer within {timeout:.1f} s") from None
        except httpx.TransportError as error:
            raise UnavailableError(f"connection failed: {error}") from None
        if response.is_success:
            return response
        try:
            message = str(response.json().get("error") or response.text)
        except (ValueError, AttributeError):
            message = response.text
        message = message or f"HTTP {response.status_code} without a word, perhaps of a proxy"
        retry_after = response.headers.get("Retry-After", "")
        raise _BY_HTTP_STATUS.get(response.status_code, ServerError)(
            message, response.status_code, float(retry_after) if retry_after.isdigit() else None
        )


class _Grpc:
    def __init__(self, target: str, model_name: str, headers: dict[str, str], max_message_bytes: int) -> None:
        self._model_name = model_name
        lower = {key.lower(): value for key, value in headers.items()}
        options: list[tuple[str, Any]] = [
            *wire.LASTING_CHANNEL,
            *((f"grpc.max_{way}_message_length", max_message_bytes) for way in ("send", "receive")),
        ]
        if host := lower.pop("host", None):
            options.append(("grpc.default_authority", host))
        self._metadata = tuple(lower.items())
        if _is_local(target.rpartition(":")[0].strip("[]")):
            options.append(("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(target, options=options)

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any], timeout: float
    ) -> dict[str, np.ndarray[Any, Any]]:
        message = wire.infer_request(
            self._model_name,
            [Tensor(name, array) for name, array in inputs.items()],
            request_id=uuid4().hex,
            parameters=parameters,
            outputs=[PARSED_JSON],
        )
        answer = self._send("ModelInfer", message, timeout)
        return {name: tensor.data for name, tensor in wire.response_tensors(answer).items()}

    def is_ready(self, timeout: float) -> bool:
        message = wire.MESSAGES["ModelReadyRequest"](name=self._model_name)
        return bool(self._send("ModelReady", message, timeout).ready)

    def is_live(self, timeout: float) -> bool:
        return bool(self._send("ServerLive", wire.MESSAGES["ServerLiveRequest"](), timeout).live)

    def metadata(self, timeout: float) -> dict[str, Any]:
        answer = self._send("ModelMetadata", wire.MESSAGES["ModelMetadataRequest"](name=self._model_name), timeout)
        return {
            "name": answer.name,
            "platform": answer.platform,
            **{
                side: [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in getattr(answer, side)]
                for side in ("inputs", "outputs")
            },
        }

    def close(self) -> None:
        self._channel.close()

    def _send(self, method: str, message: Any, timeout: float) -> Any:
        try:
            return wire.rpc(self._channel, method)(message, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            code = error.code()
            details = error.details() or f"{code.name} without a word, perhaps of a proxy"
            lost = wire.is_unanswered(code, details)
            raise (UnavailableError if lost else _BY_GRPC_STATUS.get(code, ServerError))(details, code.name) from None


def _is_local(host: str) -> bool:
    # A proxy of the environment can't reach this machine's own loopback address.
    return host in ("localhost", "127.0.0.1", "::1")


def _read(image: Image) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _task_name(task: str) -> str:
    try:
        return find_task(task).name
    except KeyError:
        return task  # the server may know tasks that this client doesn't
