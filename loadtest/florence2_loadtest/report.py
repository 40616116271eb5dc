"""``florence2 loadtest report``: results as a page to read and as a PDF to hand on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from florence2_kserve.exit_codes import ExitCode
from florence2_loadtest.results import Result, read_result

_TITLES = {"run": "Load test", "sweep": "Sweep", "autoscale": "Scaling test", "peers": "Comparison of services"}


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json…", help="What load tests wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained HTML file.")] = None,
    pdf: Annotated[Path | None, typer.Option(help="Write a PDF.")] = None,
    title: Annotated[str | None, typer.Option(help="The report's title.")] = None,
) -> None:
    """Turn results into a report: a summary, then tables and plots."""
    if html is None and pdf is None:
        raise typer.BadParameter("say where to: --html FILE, --pdf FILE, or both")
    try:
        read = [read_result(path) for path in results]
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    for path in write_report(read, html=html, pdf=pdf, title=title):
        typer.echo(f"wrote {path}")


def write_report(
    results: Sequence[Result], *, html: Path | None = None, pdf: Path | None = None, title: str | None = None
) -> list[Path]:
    """Writes results as HTML, as PDF, or as both; returns what was written.

    Args:
        results: In the order in which they are to appear.
        html: Where to.
        pdf: Where to.
        title: None for one made of the results' names.
    """
    from florence2_loadtest.pages.document import Document
    from florence2_loadtest.pages.html import render_html
    from florence2_loadtest.pages.pdf import write_pdf

    document = Document(title or _title_of(results), [part_of(result) for result in results])
    for path in (html, pdf):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if html is not None:
        html.write_text(render_html(document), encoding="utf-8")
    if pdf is not None:
        write_pdf(document, pdf)
    return [path for path in (html, pdf) if path is not None]


def part_of(result: Result) -> Any:
    """Returns a result's part of a report: a ``Part``."""
    from florence2_loadtest.pages.autoscale import autoscale_part
    from florence2_loadtest.pages.peers import peers_part
    from florence2_loadtest.pages.run import run_part
    from florence2_loadtest.pages.sweep import sweep_part

    makers: dict[str, Callable[[Any], Any]] = {
        "run": run_part,
        "sweep": sweep_part,
        "autoscale": autoscale_part,
        "peers": peers_part,
    }
    return makers[result.kind](result)


def _title_of(results: Sequence[Result]) -> str:
    if len(results) == 1:
        return f"{_TITLES[results[0].kind]}: {results[0].name}"
    return f"Load tests: {', '.join(result.name for result in results)}"
