"""REST: calls as HTTP requests, and the two ways to send them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import httpx
import orjson

from florence2_kserve.client.core import Array, Call, Query, Question, is_loopback
from florence2_kserve.client.errors import (
    ClientError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
    read_retry_after,
    reading_an_answer,
)
from florence2_kserve.protocol.rest import JSON_LENGTH_HEADER, encode_request
from florence2_kserve.protocol.tensors import from_values, unpack

_BY_STATUS: Mapping[int, type[ClientError]] = MappingProxyType(
    {
        400: InvalidRequestError,
        413: InvalidRequestError,
        404: NotFoundError,
        429: OverloadedError,
        502: UnavailableError,
        503: UnavailableError,
        504: DeadlineError,
    }
)


@dataclass(frozen=True, slots=True)
class _Exchange:
    method: str
    path: str
    read: Callable[[httpx.Response], Any]
    content: bytes | None = None
    headers: Mapping[str, str] | None = None


class _Rest:
    """What both transports do alike."""

    def __init__(self, url: str, model_name: str, headers: Mapping[str, str]) -> None:
        self._model = f"/v2/models/{model_name}"
        self._options: dict[str, Any] = {
            "base_url": url.rstrip("/"),
            "headers": headers,
            "trust_env": not is_loopback(httpx.URL(url).host),
            # As many connections as calls are made at once, all kept: callers bound their calls by themselves.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        }

    def _exchange(self, call: Call) -> _Exchange:
        match call:
            case Question():
                body, headers = encode_request(
                    call.inputs, request_id=uuid4().hex, parameters=call.parameters, outputs=list(call.outputs)
                )
                return _Exchange("POST", f"{self._model}/infer", _outputs, body, headers)
            case Query.READY:
                return _Exchange("GET", f"{self._model}/ready", _yes)
            case Query.LIVE:
                return _Exchange("GET", "/v2/health/live", _yes)
            case Query.METADATA:
                return _Exchange("GET", self._model, _metadata)


class RestTransport(_Rest):
    """Sends calls over blocking HTTP.

    Args:
        url: The service's.
        model_name: Model's name in the path.
        headers: Sent with every call.
    """

    def __init__(self, url: str, model_name: str, headers: Mapping[str, str]) -> None:
        super().__init__(url, model_name, headers)
        self._http = httpx.Client(**self._options)

    def send(self, call: Call, timeout: float) -> Any:
        """Sends `call` once and returns what came back.

        Raises:
            ClientError: One of its kinds.
        """
        exchange = self._exchange(call)
        try:
            response = self._http.request(
                exchange.method, exchange.path, content=exchange.content, headers=exchange.headers, timeout=timeout
            )
        except httpx.HTTPError as error:
            raise _failure(error, timeout) from None
        return _result(exchange, response)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()


class AsyncRestTransport(_Rest):
    """Sends calls over asyncio's HTTP; as `RestTransport`."""

    def __init__(self, url: str, model_name: str, headers: Mapping[str, str]) -> None:
        super().__init__(url, model_name, headers)
        self._http = httpx.AsyncClient(**self._options)

    async def send(self, call: Call, timeout: float) -> Any:
        """As `RestTransport.send`."""
        exchange = self._exchange(call)
        try:
            async with asyncio.timeout(timeout):  # httpx's own is for each part of an answer
                response = await self._http.request(
                    exchange.method, exchange.path, content=exchange.content, headers=exchange.headers, timeout=timeout
                )
        except TimeoutError:
            raise _too_late(timeout) from None
        except httpx.HTTPError as error:
            raise _failure(error, timeout) from None
        return _result(exchange, response)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()


def _failure(error: httpx.HTTPError, timeout: float) -> ClientError:
    """Returns what it means that no answer came."""
    match error:
        case httpx.TimeoutException():
            return _too_late(timeout)
        case httpx.LocalProtocolError() | httpx.UnsupportedProtocol():
            return InvalidRequestError(f"the request can't be sent: {error}")
        case httpx.TransportError():
            return UnavailableError(f"connection failed: {error}")
        case _:
            return ServerError(f"the server's answer can't be read: {error}")


def _too_late(timeout: float) -> ClientError:
    return DeadlineError(f"no answer within {timeout:.1f} s")


def _result(exchange: _Exchange, response: httpx.Response) -> Any:
    if not response.is_success:
        raise _refusal(response)
    with reading_an_answer():
        return exchange.read(response)


def _refusal(response: httpx.Response) -> ClientError:
    try:
        message = str(response.json().get("error") or response.text)
    except (ValueError, AttributeError):
        message = response.text
    message = message or f"HTTP {response.status_code} without a word, perhaps of a proxy"
    kind = _BY_STATUS.get(response.status_code, ServerError)
    return kind(message, response.status_code, read_retry_after(response.headers.get("Retry-After")))


def _outputs(response: httpx.Response) -> dict[str, Array]:
    body = response.content
    offset = int(response.headers.get(JSON_LENGTH_HEADER, len(body)))
    arrays = {}
    for output in orjson.loads(body[:offset])["outputs"]:
        name, datatype, shape = output["name"], output["datatype"], output["shape"]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            arrays[name] = from_values(name, datatype, shape, output["data"])
        else:
            arrays[name] = unpack(name, datatype, shape, body[offset : offset + size])
            offset += size
    return arrays


def _yes(response: httpx.Response) -> bool:
    return True


def _metadata(response: httpx.Response) -> dict[str, Any]:
    return dict(response.json())
