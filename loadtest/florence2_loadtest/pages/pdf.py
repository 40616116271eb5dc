"""A report as a PDF: the same summary, tables and plots on A4 pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from florence2_kserve import __version__
from florence2_loadtest import formats
from florence2_loadtest.pages.blocks import PAGE_WIDTH_IN, Block, Headlines, Picture, Words, table_blocks
from florence2_loadtest.pages.document import Document, Part, Table
from florence2_loadtest.plots import style

_HEIGHT_IN, _SHEET_IN = 11.69, 8.27
_TOP_IN, _BOTTOM_IN = 0.65, 0.75
_LEFT_IN = (_SHEET_IN - PAGE_WIDTH_IN) / 2
_ROOM_IN = _HEIGHT_IN - _TOP_IN - _BOTTOM_IN


@dataclass(slots=True)
class Page:
    """Blocks that stand on one page, from above."""

    blocks: list[Block] = field(default_factory=list)

    @property
    def height_in(self) -> float:
        """What they take."""
        return sum(block.height_in for block in self.blocks)


def write_pdf(document: Document, path: Path) -> None:
    """Writes a report as a PDF."""
    information = {
        "Title": document.title,
        "Creator": f"florence2-kserve {__version__}",
        "CreationDate": datetime.now(UTC),
    }
    # The file is finished within the style too: that is when it takes its fonts.
    with mpl.rc_context(style.STYLE), style.any_letters(), PdfPages(path, metadata=information) as pdf:
        for figure in page_figures(document):
            pdf.savefig(figure)


def page_figures(document: Document) -> Iterator[Figure]:
    """Yields each page as a figure of its own."""
    pages = paginate(document)
    for number, page in enumerate(pages, 1):
        with mpl.rc_context(style.STYLE):
            figure = _draw_page(page, f"{formats.shorten(document.title, 80)}  ·  {number} / {len(pages)}")
        yield figure


def paginate(document: Document) -> list[Page]:
    """Lays blocks out on pages; a heading stays with what follows it, a table continues under its columns' titles."""
    pages = [Page()]
    waiting: list[Block] = []
    for block in _blocks(document):
        if block.begins_page and pages[-1].blocks:
            pages.append(Page())
        waiting.append(block)
        if block.keeps_with_next:
            continue
        if pages[-1].height_in + sum(each.height_in for each in waiting) > _ROOM_IN and pages[-1].blocks:
            pages.append(Page())
            head = waiting[0].heading
            waiting = [*([head] if head is not None else []), *waiting]
        pages[-1].blocks += waiting
        waiting = []
    pages[-1].blocks += waiting
    return pages


def _blocks(document: Document) -> Iterator[Block]:
    yield Words(document.title, 17, weight="bold", after_in=0.12)
    if len(document.parts) > 1:
        for part in document.parts:
            yield Words(f"{part.title}: {part.verdict}", 9.5, after_in=0.06, bullet=True)
    for index, part in enumerate(document.parts):
        yield from _part_blocks(part, named=len(document.parts) > 1, begins=index > 0)


def _part_blocks(part: Part, *, named: bool, begins: bool) -> Iterator[Block]:
    if named:
        yield Words(
            part.title, 13.5, weight="bold", before_in=0.12, after_in=0.08, keeps_with_next=True, begins_page=begins
        )
    yield Words(part.verdict, 11, after_in=0.12)
    if part.warnings:
        yield Words("Before you believe the figures", 9, weight="bold", colour=style.ORANGE, keeps_with_next=True)
        for warning in part.warnings:
            yield Words(warning, 9, bullet=True, after_in=0.02)
    if part.headlines:
        yield Headlines(part.headlines)
    yield from (Words(value, 8.5, label=name, after_in=0.03) for name, value in part.facts)
    for section in part.sections:
        yield Words(section.title, 11.5, weight="bold", before_in=0.22, after_in=0.05, keeps_with_next=True)
        if section.text:
            yield Words(section.text, 8.5, colour=style.MUTED, after_in=0.05, keeps_with_next=True)
        for block in section.blocks:
            if block.title != section.title:
                yield Words(block.title, 9, weight="bold", before_in=0.1, after_in=0.03, keeps_with_next=True)
            if isinstance(block, Table):
                yield from table_blocks(block)
                if block.note:
                    yield Words(block.note, 7.5, colour=style.MUTED, before_in=0.04, after_in=0.06)
            else:
                yield Picture(block)


def _draw_page(page: Page, footer: str) -> Figure:
    figure = Figure(
        figsize=(_SHEET_IN, _HEIGHT_IN), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0, hspace=0)
    )
    FigureCanvasAgg(figure)
    heights: Sequence[float] = [block.height_in for block in page.blocks]
    grid = figure.add_gridspec(
        len(heights) + 2,
        3,
        height_ratios=[_TOP_IN, *heights, max(1e-3, _HEIGHT_IN - _TOP_IN - sum(heights))],
        width_ratios=[_LEFT_IN, PAGE_WIDTH_IN, _LEFT_IN],
    )
    top = _TOP_IN
    for index, block in enumerate(page.blocks, 1):
        if isinstance(block, Picture):
            part = figure.add_subfigure(grid[index, 1])
            part.set_facecolor("none")
            block.plot.draw(part)
        else:
            block.draw(figure, _LEFT_IN, top)
        top += block.height_in
    figure.text(
        _LEFT_IN / _SHEET_IN, 0.45 / _HEIGHT_IN, footer, size=7.5, color=style.MUTED, va="center", in_layout=False
    )
    return figure
