"""What a report consists of, before it becomes HTML or PDF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from florence2_loadtest.plots.style import Plot

Mark = Literal["", "best", "default", "bad"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        cells: Text of each column; the first names the row.
        mark: What it is shown as.
    """

    cells: Sequence[str]
    mark: Mark = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in rows.

    Attributes:
        title: Says what it shows.
        columns: Their titles, units included.
        rows: At least one.
        text: Columns that hold words, by their place; all others hold numbers.
        aside: Columns that are shown fainter: figures of another machine.
        note: Small print.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    text: frozenset[int] = frozenset({0})
    aside: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Headline:
    """One figure that is shown large."""

    figure: str
    label: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Table | Plot]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """All of one result.

    Attributes:
        title: Names it.
        facts: What was tested: names and values.
        verdict: In one sentence.
        headlines: A few figures.
        warnings: What to know before believing them.
        sections: The details.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    verdict: str
    headlines: Sequence[Headline]
    warnings: Sequence[str]
    sections: Sequence[Section]


@dataclass(frozen=True, slots=True)
class Document:
    """A report of one result or several."""

    title: str
    parts: Sequence[Part] = field(default_factory=list)


def section(title: str, *blocks: Table | Plot | None, text: str = "") -> list[Section]:
    """Returns a section of those blocks that there are, or none."""
    kept = [block for block in blocks if block is not None]
    return [Section(title, kept, text)] if kept else []
