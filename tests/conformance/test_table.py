"""The committed comparison of the ways holds the cases and ways of today."""

from __future__ import annotations

from pathlib import Path

from .clients import CLIENTS
from .table import CASES
from .wires import WIRES

COMMITTED = Path(__file__).parents[2] / "docs" / "measured" / "protocols.md"


def test_the_committed_table_has_todays_cases_and_ways() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in COMMITTED.read_text().splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == ["case", *(kind.name for kind in (*WIRES, *CLIENTS))]
    assert [row[0] for row in rows[1:]] == [case.name for case in CASES]
    assert not [row for row in rows if "≠" in "".join(row)]
