"""Sending prepared requests over gRPC."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from florence2_kserve.client.core import is_loopback
from florence2_kserve.client.errors import read_retry_after
from florence2_kserve.protocol import wire
from florence2_loadtest.blame import PREDICTOR, blame_words
from florence2_loadtest.results import OK
from florence2_loadtest.transport import CONNECTION, MALFORMED, MAX_MESSAGE_BYTES, TIMEOUT, Sent
from florence2_loadtest.workload import Prepared

# Requests share connections, as gRPC means it; over one alone they would all go to one pod, and wait for each other.
_MOST_CHANNELS = 8
# What gRPC itself says of connections, with statuses that servers send as well.
_OF_CONNECTIONS = (
    "failed to connect",
    "connection refused",
    "connection reset",
    "connection timed out",
    "socket closed",
    "endpoint closing",
    "broken pipe",
    "recvmsg",
    "goaway",
    "rst_stream",
    "stream removed",
    "dns resolution failed",
)
_METHOD = wire.SERVICE + "ModelInfer"


class GrpcTransport:
    """Channels to a service.

    Args:
        address: ``host:port``.
        connections: How many requests may be in flight; they share at most eight channels.
        headers: Metadata of every call; ``Host`` becomes the authority.
        keep_alive: Whether channels are kept, or made for each request.
    """

    def __init__(self, address: str, *, connections: int, headers: Mapping[str, str], keep_alive: bool) -> None:
        lower = {name.lower(): value for name, value in headers.items()}
        host = lower.pop("host", None)
        self._address, self._metadata = address, tuple(lower.items())
        self._options: list[tuple[str, Any]] = [
            *wire.LASTING_CHANNEL,
            ("grpc.use_local_subchannel_pool", 1),  # else channels to one address share a connection
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            *((("grpc.default_authority", host),) if host else ()),
            *((("grpc.enable_http_proxy", 0),) if is_loopback(address.rpartition(":")[0].strip("[]")) else ()),
        ]
        self._room = asyncio.Semaphore(connections)
        self._clock = asyncio.get_running_loop().time
        self._channels = [self._connect() for _ in range(min(connections, _MOST_CHANNELS))] if keep_alive else []
        self._calls = itertools.cycle([_rpc(channel) for channel in self._channels])

    async def send(self, prepared: Prepared, timeout_s: float) -> Sent:
        """As `Transport.send`."""
        async with self._room:
            if self._channels:
                return await self._call(next(self._calls), prepared, timeout_s)
            channel = self._connect()
            try:
                return await self._call(_rpc(channel), prepared, timeout_s)
            finally:
                await channel.close()

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels:
            await channel.close()

    def _connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self._address, options=self._options)

    async def _call(self, rpc: Any, prepared: Prepared, timeout_s: float) -> Sent:
        began = self._clock()
        try:
            answer: bytes = await rpc(prepared.body, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            done = self._clock()
            return _failure(error, done, is_late=done - began >= 0.99 * timeout_s)
        done = self._clock()
        return Sent(OK if _has_outputs(answer) else MALFORMED, done, len(answer), body=answer)


def _rpc(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(_METHOD)  # without serialisers: bytes go and come as they are


def _failure(error: grpc.aio.AioRpcError, done: float, is_late: bool) -> Sent:
    code, details = error.code(), error.details() or ""
    body, component = details.encode(), blame_words(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and is_late:
        return Sent(TIMEOUT, done, body=body)
    # A transformer that has lost its predictor quotes gRPC.
    if component != PREDICTOR and any(words in details.lower() for words in _OF_CONNECTIONS):
        return Sent(CONNECTION, done, body=body)
    retry_after = dict(error.trailing_metadata() or ()).get("retry-after")
    return Sent(
        f"grpc {code.name}",
        done,
        component=component,
        retry_after_s=read_retry_after(str(retry_after) if retry_after is not None else None),
        body=body,
    )


def _has_outputs(answer: bytes) -> bool:
    """Whether a message is a ModelInferResponse with something in it."""
    try:
        message = wire.MESSAGES["ModelInferResponse"].FromString(answer)
    except DecodeError:
        return False
    return bool(message.outputs) and bool(
        any(message.raw_output_contents) or any(len(o.contents.bytes_contents) for o in message.outputs)
    )
