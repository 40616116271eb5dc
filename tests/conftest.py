"""Fixtures that all tests share: the real service on loopback, once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from florence2_kserve.local import LocalService


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that slow tests look at."""
    parser.addoption(
        "--full",
        action="store_true",
        help="slow tests at the sizes of which docs/engine.md gives figures (half an hour), not at CI's",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what is marked ``full`` without that option."""
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="runs with --full"))


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether slow tests run at their full size."""
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture(scope="session")
def service() -> Iterator[LocalService]:
    """``florence2 serve`` on the embedded model and free ports; has rest_url and grpc_url."""
    with LocalService() as running:
        yield running


@pytest.fixture(scope="session")
def conformance_target(service: LocalService) -> LocalService:
    """What the conformance suite runs against where it is given no URL."""
    return service
