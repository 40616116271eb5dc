"""Sending prepared requests, over REST or gRPC; whatever the network or the server does comes back as a status."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from florence2_kserve.client.core import split_url
from florence2_loadtest.results import Target
from florence2_loadtest.workload import Prepared

TIMEOUT, CONNECTION, MALFORMED = "timeout", "connection", "malformed"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class Sent:
    """What became of a request that was sent once.

    Attributes:
        status: As in `florence2_loadtest.results.Record`.
        done_s: When that was known, by the event loop's clock.
        response_bytes: Size of the answer's body.
        send_s: Time to hand the request over to the socket; 0 over gRPC, which doesn't tell.
        receive_s: Time from the answer's first byte to its last; 0 over gRPC.
        component: Who refused it, where that is known.
        retry_after_s: When the server wants to be asked again; None where it didn't say.
        body: The answer's, or what is known of the failure.
    """

    status: str
    done_s: float
    response_bytes: int = 0
    send_s: float = 0.0
    receive_s: float = 0.0
    component: str = ""
    retry_after_s: float | None = None
    body: bytes = b""

    @property
    def is_passing(self) -> bool:
        """Whether the refusal may be over in a moment, so that asking again makes sense."""
        return self.status in _PASSING


_PASSING = frozenset(
    {CONNECTION, "http 429", "http 502", "http 503", "grpc UNAVAILABLE", "grpc RESOURCE_EXHAUSTED", "grpc CANCELLED"}
)


class Transport(Protocol):
    """Connections to a service."""

    async def send(self, prepared: Prepared, timeout_s: float) -> Sent:
        """Sends a request once; raises for nothing that server or network do."""


@asynccontextmanager
async def open_transport(
    target: Target,
    *,
    connections: int,
    headers: Mapping[str, str] | None = None,
    ca_file: Path | None = None,
) -> AsyncIterator[Transport]:
    """Opens connections to `target` by its protocol.

    Args:
        target: The service.
        connections: How many requests may be in flight; further ones wait for a connection.
        headers: Sent with every request; ``Host`` becomes the authority over gRPC.
        ca_file: Certificates to trust beside the system's.

    Raises:
        ValueError: If the URL doesn't fit the protocol.
    """
    scheme, address = split_url(target.url)
    if (scheme == "grpc") is not (target.protocol == "grpc"):
        raise ValueError(f"{target.url} is not asked over {target.protocol}")
    if scheme == "grpc":
        from florence2_loadtest.transport_grpc import GrpcTransport

        grpc_transport = GrpcTransport(
            address, connections=connections, headers=headers or {}, keep_alive=target.keep_alive
        )
        try:
            yield grpc_transport
        finally:
            await grpc_transport.close()
    else:
        from florence2_loadtest.transport_rest import RestTransport

        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None) if scheme == "https" else None
        rest_transport = RestTransport(
            target.url,
            target.model_name,
            connections=connections,
            headers=headers or {},
            keep_alive=target.keep_alive,
            context=context,
        )
        try:
            yield rest_transport
        finally:
            await rest_transport.close()
