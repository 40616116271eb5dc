"""Fixtures that all tests share: the real service on loopback, once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from florence2_kserve.local import LocalService


@pytest.fixture(scope="session")
def service() -> Iterator[LocalService]:
    """``florence2 serve`` on the embedded model and free ports; has rest_url and grpc_url."""
    with LocalService() as running:
        yield running


@pytest.fixture(scope="session")
def conformance_target(service: LocalService) -> LocalService:
    """What the conformance suite runs against where it is given no URL."""
    return service
