"""The generator against a server that does nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from florence2_loadtest.ceiling import ceiling, measure_ceiling


@pytest.mark.slow
@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_every_request_of_the_trivial_server_is_answered(protocol: Any, keep_alive: bool) -> None:
    found = asyncio.run(measure_ceiling(protocol, 20_000, keep_alive, 4, 0.3))
    assert found.size == pytest.approx(20_000, abs=200)
    assert found.throughput > 0
    assert found.cpu_share > 0
    assert 4 / found.throughput == pytest.approx(
        found.latency_s, rel=0.5
    )  # as many as there are clients are in flight


@pytest.mark.parametrize("sizes", ["", "ten", "0", "1000,-1", "99999999999"])
def test_sizes_have_to_be_bytes(sizes: str) -> None:
    app = typer.Typer()
    app.command()(ceiling)
    done = CliRunner().invoke(app, ["--sizes", sizes])
    assert done.exit_code == 2
    assert "1000,100000" in done.stderr
