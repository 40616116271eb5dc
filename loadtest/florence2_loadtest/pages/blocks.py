"""What a page of a PDF is made of: words, rows of a table, plots; each knows its height before it is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from florence2_loadtest.pages.document import Headline, Mark, Table
from florence2_loadtest.plots.style import FAINT, INK, MUTED, WIDTH_IN, Plot

PAGE_WIDTH_IN = 7.07
_POINTS = 72
_LINE = 1.32
_BULLET_IN, _LABEL_IN = 0.16, 1.25
_CELL_IN, _ROW_IN = 0.1, 0.05  # room beside and above what stands in a cell
_SIZES = (8.0, 7.5, 7.0, 6.5, 6.0, 5.5)
_KEPT_IN = 5.2  # tables lower than that stay on one page
_FEWEST_ROWS = 3
_MOST_IN = 1.3  # of a word, before it is cut
_TITLE_IN = 1.3  # of a column's title, before it wraps
_LEAST_IN = 0.9  # of a column of words, before the size shrinks
_WASHES: dict[Mark, str] = {"best": "#e3f4ec", "default": "#f0f2f5", "bad": "#fbeae2"}


class Block(Protocol):
    """A part of a page."""

    begins_page: bool
    keeps_with_next: bool
    heading: Block | None  # repeated above it where a page begins with it

    @property
    def height_in(self) -> float:
        """What it takes, in inches."""
        ...

    def draw(self, figure: Figure, left_in: float, top_in: float) -> None:
        """Draws it onto a page, its upper left corner there, counted from the page's."""
        ...


@lru_cache(maxsize=20_000)
def width_of(text: str, size: float, weight: str = "normal") -> float:
    """Returns the width of a line, in inches."""
    width, _, _ = text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size, weight=weight), ismath=False
    )
    return float(width) / _POINTS


def wrap(text: str, room_in: float, size: float, weight: str = "normal") -> list[str]:
    """Returns `text` in lines that fit; a word that doesn't is cut, at ``_``, ``-`` or ``/`` if it can be."""
    lines = [""]
    for word in filter(None, re.split(r"[ \t\r\n]+", text)):  # not at spaces that don't break
        joined = f"{lines[-1]} {word}".strip()
        if width_of(joined, size, weight) <= room_in:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        while width_of(word, size, weight) > room_in and len(word) > 1:
            fits = next(
                n for n in range(len(word) - 1, 0, -1) if n == 1 or width_of(word[:n], size, weight) <= room_in
            )
            fits = max(word.rfind(mark, 0, fits) for mark in "_-/") + 1 or fits
            lines[-1] = word[:fits]
            lines.append("")
            word = word[fits:]
        lines[-1] = word
    return lines


@dataclass(eq=False)
class Words:
    """A paragraph or a heading, with a bullet or a label before it where that is wanted."""

    text: str
    size: float
    weight: str = "normal"
    colour: str = INK
    before_in: float = 0.0
    after_in: float = 0.0
    label: str = ""
    bullet: bool = False
    keeps_with_next: bool = False
    begins_page: bool = False
    heading: Block | None = None
    _lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._lines = wrap(self.text, PAGE_WIDTH_IN - self._indent_in, self.size, self.weight)

    @property
    def _indent_in(self) -> float:
        return _LABEL_IN if self.label else _BULLET_IN if self.bullet else 0.0

    @property
    def height_in(self) -> float:
        """What it takes, in inches."""
        return self.before_in + len(self._lines) * self.size * _LINE / _POINTS + self.after_in

    def draw(self, figure: Figure, left_in: float, top_in: float) -> None:
        """Draws it onto a page."""
        first = top_in + self.before_in
        if before := self.label or ("•" if self.bullet else ""):
            _write(figure, before, left_in, first, self.size, MUTED)
        for index, line in enumerate(self._lines):
            at = first + index * self.size * _LINE / _POINTS
            _write(figure, line, left_in + self._indent_in, at, self.size, self.colour, weight=self.weight)


@dataclass(eq=False)
class Headlines:
    """Figures shown large, side by side."""

    headlines: Sequence[Headline]
    keeps_with_next: bool = False
    begins_page: bool = False
    heading: Block | None = None
    height_in: float = 0.95

    def draw(self, figure: Figure, left_in: float, top_in: float) -> None:
        """Draws it onto a page."""
        each = PAGE_WIDTH_IN / len(self.headlines)
        for index, headline in enumerate(self.headlines):
            left = left_in + index * each
            _fill(figure, left, top_in + 0.08, each - 0.08, 0.76, _WASHES["default"])
            inner = each - 0.24
            _write(figure, _cut(headline.label, inner, 7.5), left + 0.08, top_in + 0.13, 7.5, MUTED)
            _write(figure, _cut(headline.figure, inner, 15), left + 0.08, top_in + 0.3, 15, INK, weight="bold")
            _write(figure, _cut(headline.note, inner, 7), left + 0.08, top_in + 0.64, 7, MUTED)


@dataclass(eq=False)
class Picture:
    """A plot."""

    plot: Plot
    keeps_with_next: bool = False
    begins_page: bool = False
    heading: Block | None = None

    @property
    def height_in(self) -> float:
        """What it takes, in inches."""
        return min(9.0, self.plot.height_in * PAGE_WIDTH_IN / WIDTH_IN)

    def draw(self, figure: Figure, left_in: float, top_in: float) -> None:
        """Does nothing: the page gives a plot a part of its own."""


@dataclass(eq=False)
class Rows:
    """One line of a table, its cells wrapped to their columns."""

    cells: Sequence[Sequence[str]]
    lefts_in: Sequence[float]
    widths_in: Sequence[float]
    size: float
    words: frozenset[int]
    aside: frozenset[int]
    mark: Mark = ""
    is_head: bool = False
    keeps_with_next: bool = False
    begins_page: bool = False
    heading: Block | None = None

    @property
    def height_in(self) -> float:
        """What it takes, in inches."""
        return max(len(lines) for lines in self.cells) * self.size * _LINE / _POINTS + 2 * _ROW_IN

    def draw(self, figure: Figure, left_in: float, top_in: float) -> None:
        """Draws it onto a page."""
        whole = self.lefts_in[-1] + self.widths_in[-1]
        if self.mark:
            _fill(figure, left_in, top_in, whole, self.height_in, _WASHES[self.mark])
        lowest = top_in + self.height_in
        _line(figure, left_in, lowest, whole, MUTED if self.is_head else FAINT)
        for column, lines in enumerate(self.cells):
            right = column not in self.words
            x = left_in + self.lefts_in[column] + (self.widths_in[column] - _CELL_IN / 2 if right else _CELL_IN / 2)
            colour = MUTED if self.is_head or column in self.aside else INK
            # Titles stand at the foot of their row.
            skip = max(len(each) for each in self.cells) - len(lines) if self.is_head else 0
            for index, text in enumerate(lines):
                at = top_in + _ROW_IN + (index + skip) * self.size * _LINE / _POINTS
                slant = "italic" if column in self.aside else "normal"
                _write(figure, text, x, at, self.size, colour, right=right, slant=slant)


def table_blocks(table: Table) -> Iterator[Rows]:
    """Yields a table's titles and then its rows, in the largest size that fits the page."""
    size, widths = next(
        (size, widths) for size in _SIZES if (widths := _widths(table, size)) is not None or size == _SIZES[-1]
    )
    widths = widths or _squeezed(table, size)
    lefts = [sum(widths[:column]) for column in range(len(widths))]

    def rows(cells: Sequence[str], mark: Mark = "", head: Rows | None = None) -> Rows:
        lines = [wrap(text, width - _CELL_IN, size) for text, width in zip(cells, widths, strict=True)]
        is_head = head is None
        return Rows(
            lines, lefts, widths, size, table.text, table.aside, mark, is_head, keeps_with_next=is_head, heading=head
        )

    head = rows(table.columns)
    body = [rows(row.cells, row.mark, head) for row in table.rows]
    together = sum(row.height_in for row in body) < _KEPT_IN
    for index, row in enumerate(body, 1):
        # No page begins or ends with a row or two of a longer table; its note stays with the last.
        near_an_end = index < min(_FEWEST_ROWS, len(body)) or len(body) - _FEWEST_ROWS < index < len(body)
        row.keeps_with_next = (
            near_an_end or (together and index < len(body)) or (index == len(body) and bool(table.note))
        )
    yield from (head, *body)


def _widths(table: Table, size: float) -> list[float] | None:
    """Returns the columns' widths at a size, in inches; None if the page is too narrow for them."""
    least, most = [], []
    for column, title in enumerate(table.columns):
        widest = max(width_of(row.cells[column], size) for row in table.rows)
        word = max((width_of(part, size) for part in title.split(" ")), default=0.0)
        wraps = column in table.text and widest > _LEAST_IN
        parts = {part for row in table.rows for part in row.cells[column].split()} if wraps else set()
        longest = max((width_of(part, size) for part in parts), default=widest)
        least.append(max(min(max(longest, _LEAST_IN), _MOST_IN) if wraps else widest, word) + _CELL_IN + 0.02)
        most.append(max(widest, word, min(_TITLE_IN, width_of(title, size))) + _CELL_IN + 0.02)
    if sum(least) > PAGE_WIDTH_IN:
        return None
    # What is left goes to the columns that would wrap, by what they lack.
    lacking = sum(most) - sum(least)
    given = min(1.0, (PAGE_WIDTH_IN - sum(least)) / lacking) if lacking > 0 else 0.0
    return [a + given * (b - a) for a, b in zip(least, most, strict=True)]


def _squeezed(table: Table, size: float) -> list[float]:
    """Returns widths by need, all of them too narrow."""
    cells = [
        [table.columns[column], *(row.cells[column] for row in table.rows)] for column in range(len(table.columns))
    ]
    words = [max(width_of(word, size) for text in texts for word in [*text.split(), ""]) for texts in cells]
    needs = [min(word + _CELL_IN, 2.0) for word in words]
    return [need * PAGE_WIDTH_IN / sum(needs) for need in needs]


def _write(
    figure: Figure,
    text: str,
    x_in: float,
    top_in: float,
    size: float,
    colour: str,
    *,
    weight: str = "normal",
    right: bool = False,
    slant: str = "normal",
) -> None:
    width, height = figure.get_size_inches()
    # By the baseline, so that words of one line stand level.
    figure.text(
        x_in / width,
        1 - (top_in + 0.95 * size / _POINTS) / height,
        text,
        size=size,
        color=colour,
        weight=weight,
        ha="right" if right else "left",
        va="baseline",
        style=slant,
        in_layout=False,
    )


def _fill(figure: Figure, x_in: float, top_in: float, width_in: float, height_in: float, colour: str) -> None:
    width, height = figure.get_size_inches()
    figure.add_artist(
        Rectangle(
            (x_in / width, 1 - (top_in + height_in) / height),
            width_in / width,
            height_in / height,
            facecolor=colour,
            edgecolor="none",
            zorder=0,
            transform=figure.transFigure,
            in_layout=False,
        )
    )


def _line(figure: Figure, x_in: float, top_in: float, width_in: float, colour: str) -> None:
    width, height = figure.get_size_inches()
    y = 1 - top_in / height
    line = Line2D(
        (x_in / width, (x_in + width_in) / width), (y, y), color=colour, linewidth=0.5, transform=figure.transFigure
    )
    line.set_in_layout(False)
    figure.add_artist(line)


def _cut(text: str, room_in: float, size: float) -> str:
    if width_of(text, size) <= room_in:
        return text
    while text and width_of(text + "…", size) > room_in:
        text = text[:-1]
    return text + "…"
