"""Options and fixtures of the conformance suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .messages import ask
from .pictures import base64_text, png
from .wires import WIRES, GrpcConnection, GrpcRaw, RestConnection, RestJson, Target, Wire

_OPTIONS = {
    "--rest-url": ("FLORENCE2_REST_URL", "REST address of the server under test, e.g. http://127.0.0.1:8080"),
    "--grpc-url": ("FLORENCE2_GRPC_URL", "gRPC host:port of the server under test; without it gRPC is not tested"),
    "--model-name": ("FLORENCE2_MODEL_NAME", "the model's name (florence2)"),
    "--request-timeout": ("FLORENCE2_REQUEST_TIMEOUT", "seconds one call may take (60)"),
}
_HEADERS_VARIABLE = "FLORENCE2_HEADERS"  # several are separated by newlines


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the suite's options."""
    group = parser.getgroup("conformance", "conformance suite")
    for option, (variable, text) in _OPTIONS.items():
        group.addoption(option, default=None, help=f"{text}; or {variable}")
    group.addoption(
        "--header",
        action="append",
        default=None,
        metavar="'NAME: VALUE'",
        help=f"header of every call, e.g. 'Host: florence2.example.com'; may be repeated; or {_HEADERS_VARIABLE}",
    )


def _option(config: pytest.Config, option: str) -> str | None:
    # No ValueError where this file was loaded too late for its options to be known.
    value = config.getoption(option, default=None)
    return value or os.environ.get(_OPTIONS[option][0]) or None


def _headers(config: pytest.Config) -> dict[str, str]:
    lines = config.getoption("--header", default=None) or os.environ.get(_HEADERS_VARIABLE, "").splitlines()
    headers = {}
    for line in lines:
        if line.strip():
            name, colon, value = line.partition(":")
            if not colon:
                raise pytest.UsageError(f"--header needs 'NAME: VALUE', not {line!r}")
            headers[name.strip()] = value.strip()
    return headers


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Target:
    """The server under test: by the options, else as the surrounding project provides it."""
    rest_url = _option(request.config, "--rest-url")
    grpc_url = _option(request.config, "--grpc-url")
    if rest_url is None:
        try:
            provided: Any = request.getfixturevalue("conformance_target")
        except pytest.FixtureLookupError as error:
            if error.argname != "conformance_target":
                raise
            pytest.skip("no server to test: give --rest-url (and --grpc-url) or FLORENCE2_REST_URL")
        rest_url, grpc_url = provided.rest_url, provided.grpc_url
    return Target(
        rest_url=rest_url,
        grpc_url=grpc_url.removeprefix("grpc://") if grpc_url else None,
        model=_option(request.config, "--model-name") or "florence2",
        headers=_headers(request.config),
        timeout=float(_option(request.config, "--request-timeout") or 60),
    )


@pytest.fixture
def rest(server: Target) -> Iterator[RestConnection]:
    """One keep-alive connection of the test's own."""
    with RestConnection(server) as connection:
        yield connection


@pytest.fixture(scope="session")
def grpc_connection(server: Target) -> Iterator[GrpcConnection]:
    """One gRPC channel for all tests."""
    if server.grpc_url is None:
        pytest.skip("no gRPC address: give --grpc-url or FLORENCE2_GRPC_URL")
    connection = GrpcConnection(server)
    yield connection
    connection.close()


@pytest.fixture
def make_wire(request: pytest.FixtureRequest, server: Target) -> Callable[[type[Wire]], Wire]:
    """Makes a wire of the given kind (a gRPC one skips the test where there is no gRPC address)."""

    def make(kind: type[Any]) -> Wire:
        made: Wire = kind(request.getfixturevalue("grpc_connection") if kind.over_grpc() else server)
        return made

    return make


@pytest.fixture(params=WIRES, ids=lambda kind: kind.name)
def wire(request: pytest.FixtureRequest, make_wire: Callable[[type[Wire]], Wire]) -> Iterator[Wire]:
    """Each of the four wires in turn."""
    with make_wire(request.param) as made:
        yield made


@pytest.fixture(params=[RestJson, GrpcRaw], ids=lambda kind: kind.name)
def rest_or_grpc(request: pytest.FixtureRequest, make_wire: Callable[[type[Wire]], Wire]) -> Iterator[Wire]:
    """One wire of each protocol, for what does not depend on how tensors are packed."""
    with make_wire(request.param) as made:
        yield made


@pytest.fixture(params=[kind for kind in WIRES if kind.carries_bytes], ids=lambda kind: kind.name)
def bytes_wire(request: pytest.FixtureRequest, make_wire: Callable[[type[Wire]], Wire]) -> Iterator[Wire]:
    """Each wire over which any bytes may go."""
    with make_wire(request.param) as made:
        yield made


@pytest.fixture(scope="session")
def alone(server: Target) -> Callable[..., Any]:
    """Gives the answer to one row sent alone (scene number, task, text): what every other way in must give too."""
    known: dict[tuple[int, str, str], Any] = {}

    def answer(number: int, task: str, text: str = "") -> Any:
        key = (number, task, text)
        if key not in known:
            with RestJson(server) as wire:
                outcome = wire.infer(ask(base64_text(png(number)), task, text or None))
            (known[key],) = outcome.answers()
        return known[key]

    return answer
