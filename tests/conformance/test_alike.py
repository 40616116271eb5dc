"""Both protocols and all clients behave alike: one table of cases, each sent on every way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .table import CASES, Case, explain, open_ways, send
from .wires import Target, Wire


@pytest.fixture(scope="module")
def ways(server: Target) -> Iterator[list[Wire]]:
    """All ways to the server, open."""
    with open_ways(server) as opened:
        yield opened


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_answered_alike_on_every_way(ways: list[Wire], case: Case) -> None:
    sent = send(case, ways)
    assert any(one.outcome for one in sent)
    assert not any(one.differences for one in sent), f"{case.name}\n{explain(sent)}"
    for way in ways:
        way.assert_alive()
