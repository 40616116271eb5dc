"""Fixtures of the clients' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest

from florence2_kserve.local import LocalService
from tests.client.servers import SERVERS, Behaviour
from tests.client.sides import KINDS, opened


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which client: the blocking one or asyncio's."""
    return str(request.param)


@pytest.fixture(params=SERVERS)
def protocol(request: pytest.FixtureRequest) -> str:
    """Over what it asks: rest or grpc."""
    return str(request.param)


@pytest.fixture
def open_client(kind: str) -> Callable[..., AbstractContextManager[Any]]:
    """Opens a client of that kind on a URL."""
    return partial(opened, kind)


@pytest.fixture
def url(protocol: str, service: LocalService) -> str:
    """The running service's URL of that protocol."""
    return service.rest_url if protocol == "rest" else f"grpc://{service.grpc_url}"


@pytest.fixture
def client(open_client: Callable[..., AbstractContextManager[Any]], url: str) -> Iterator[Any]:
    """A client of that kind of the running service."""
    with open_client(url) as client:
        yield client


@pytest.fixture
def behaviour() -> Behaviour:
    """What the small server does."""
    return Behaviour()


@pytest.fixture
def small_server(protocol: str, behaviour: Behaviour) -> Iterator[str]:
    """A server of that protocol that does as `behaviour` says; its URL."""
    with SERVERS[protocol](behaviour) as url:
        yield url
