"""Reports: what they say, that nothing in them is taken for markup, and that they need nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from florence2_loadtest.pages.document import Document, Table
from florence2_loadtest.pages.html import render_html
from florence2_loadtest.pages.pdf import page_figures, paginate
from florence2_loadtest.pages.run import task_table
from florence2_loadtest.reference import REPLACED
from florence2_loadtest.report import part_of, report, write_report
from florence2_loadtest.results import (
    AutoscaleResult,
    Generator,
    Level,
    PeersResult,
    Result,
    RunResult,
    ServerSide,
    SweepResult,
    write_result,
)
from tests.loadtest.example_results import (
    closed_level,
    nine_tasks_result,
    open_result,
    peers_result,
    run_result,
    sweep_result,
    target,
)
from tests.loadtest.example_scaling import autoscale_result

EXAMPLES = (run_result, nine_tasks_result, open_result, sweep_result, autoscale_result, peers_result)
HOSTILE = "<script>alert('x')</script> & \"quoted\" $\\alpha$ \x07"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and gathers what a page has."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Returns the attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        """All words."""
        return " ".join(" ".join(self.words).split())


def tables_of(result: Result) -> list[Table]:
    """Returns the tables of a result's report."""
    return [b for section in part_of(result).sections for b in section.blocks if isinstance(b, Table)]


def told(result: Result) -> str:
    """Returns what a result's report says before its plots."""
    part = part_of(result)
    return "\n".join([part.verdict, *part.warnings, *(f"{name}: {value}" for name, value in part.facts)])


@pytest.fixture(scope="module")
def page() -> Page:
    """The page of a run."""
    return Page(render_html(Document("Mixed load", [part_of(run_result())])))


def test_a_page_needs_nothing_else(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "image"}
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href"}
    ]
    assert addresses
    assert all(str(address).startswith("#") for address in addresses)
    styles = [str(value) for _, attributes in page.tags for name, value in attributes.items() if name == "style"]
    assert not any(re.search(r"url\((?!#)|@import|https?:", text) for text in styles)


def test_what_a_plot_refers_to_is_its_own(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    referred = {str(attributes["href"])[1:] for attributes in page.all("use")}
    referred |= {
        found
        for _, attributes in page.tags
        for value in attributes.values()
        for found in re.findall(r"url\(#([^)]+)\)", value or "")
    }
    assert referred
    assert referred <= set(ids)


def test_a_page_can_be_read_without_eyes(page: Page) -> None:
    plots = page.all("svg")
    assert len(plots) == 3
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 40 for plot in plots)
    assert all(header["scope"] in {"col", "row"} for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html") == [{"lang": "en"}]


def test_a_page_says_what_was_tested_and_how_it_went(page: Page) -> None:
    best = max(run_result().levels, key=lambda level: level.throughput)
    for words in (
        "florence-community/Florence-2-large-ft",
        "0123abcd",
        "max_batch_size 36",
        "concurrency 12:60:12",
        f"{best.throughput:.1f}/s at concurrency 60",
        "10 of 15 SLOs were missed",
        "another machine",
    ):
        assert words in page.text


def test_colours_follow_light_and_dark(page: Page) -> None:
    styles = " ".join(str(attributes.get("style")) for _, attributes in page.tags)
    assert "var(--blue)" in styles
    assert not re.search(r"#[0-9a-f]{6}", styles)


def test_the_task_table_has_the_replaced_deployments_figures_marked() -> None:
    table = task_table(nine_tasks_result().levels)
    assert table is not None
    assert list(table.columns[:4]) == ["Task", "Concurrency", "Throughput", "Latency"]
    assert all("another machine" in table.columns[place] for place in table.aside)
    rows = {row.cells[0]: row.cells for row in table.rows}
    assert list(rows) == list(REPLACED)
    assert rows["<OD>"][1] == "36"
    assert rows["<OD>"][4:] == ["5.8", "6.13"]


def test_a_task_that_the_replaced_deployment_lacked_has_no_reference() -> None:
    table = task_table([closed_level(36, tasks=("<REGION_TO_OCR>",))])
    assert table is not None
    assert table.rows[0].cells[4:] == ["–", "–"]


def test_the_toys_figures_come_with_a_warning() -> None:
    assert "say nothing of Florence-2's speed" in told(run_result(target=target(model="embedded")))
    assert "Florence-2's speed" not in told(run_result())


def test_what_makes_figures_doubtful_is_said_first() -> None:
    levels = [
        closed_level(12, generator=Generator(bottleneck="the event loop ran 40 ms late")),
        closed_level(24, stable=False),
        closed_level(36, failed=7, statuses={"ok": 600, "http 503": 7}),
        Level(name="concurrency 48", mode="closed", concurrency=48),
    ]
    said = told(run_result(levels=levels))
    assert "not the server, set the figures of concurrency 12: the event loop ran 40 ms late" in said
    assert "Not stable within its windows: concurrency 24" in said
    assert "7 of 630 requests failed (http 503), at concurrency 36" in said
    assert "Nothing was answered at concurrency 48" in said


def test_an_open_loops_verdict_counts_from_the_intended_start() -> None:
    level = open_result().levels[0]
    assert f"within {level.latency.p95_s:.2f} s of the moment they were meant to be sent" in told(open_result())
    assert "the service's own time" in told(open_result())


def test_a_sweep_names_the_best_the_default_and_what_was_left_out_and_why() -> None:
    best, out = tables_of(sweep_result())
    marks = [row.mark for row in best.rows]
    assert (marks.count("best"), marks.count("default")) == (1, 1)
    assert best.rows[-1].cells[3] == "1.0×"
    reasons = " ".join(row.cells[3] for row in out.rows)
    assert "CUDA out of memory" in reasons
    assert "missed p95<6s" in reasons
    assert "2 of 25 configurations failed" in told(sweep_result())


def test_a_scaling_test_shows_findings_problems_and_pods() -> None:
    findings, components, steps, statuses, pods, _ = tables_of(autoscale_result())
    assert ["first answer, from zero", "13.2 s"] in [row.cells for row in findings.rows]
    assert ["surplus", "21 %", "21 %"] in [row.cells for row in components.rows]
    assert ["predictor", "40", "1", "4", "2.00 s", "21.0 s"] in [row.cells for row in steps.rows]
    assert ["http 503", "ingress", "6"] in [row.cells for row in statuses.rows]
    assert [row.mark for row in pods.rows].count("bad") == 1
    assert "6 requests failed after retries, 0 expected" in told(autoscale_result())


def test_peers_are_divided_by_the_baseline() -> None:
    ours, theirs = (peers_result().runs[name].levels[0].throughput for name in ("florence2", "triton"))
    (table,) = tables_of(peers_result())
    assert table.rows[0].cells[4] == f"{ours / theirs:.1f}×"
    assert "mixed" in told(peers_result())


def test_a_ratio_to_nothing_is_none() -> None:
    result = peers_result()
    result.runs["triton"].levels[0] = Level(name=result.runs["triton"].levels[0].name, mode="closed", concurrency=36)
    assert tables_of(result)[0].rows[0].cells[4] == "–"
    assert "No ratio for" in told(result)


EMPTY: list[Result] = [
    RunResult(name="empty", target=target()),
    RunResult(name="silent", target=target(), levels=[Level(name="none", mode="closed", concurrency=1, failed=2)]),
    RunResult(name="late", target=target(), levels=[Level(name="none", mode="open", rate=1.0, planned=3, unsent=3)]),
    RunResult(name="mute", target=target(), levels=[closed_level(4, server=ServerSide(), windows=[], tasks=())]),
    SweepResult(name="empty", target="both", objective="p95", direction="minimize"),
    AutoscaleResult(name="empty", target=target(), deployment_mode="Standard", level=Level(name="none", mode="open")),
    PeersResult(name="empty", baseline="triton"),
]


@pytest.mark.parametrize("result", EMPTY, ids=lambda result: f"{result.kind}-{result.name}")
def test_a_result_of_nothing_is_a_report_too(result: Result) -> None:
    page = Page(render_html(Document("Nothing", [part_of(result)])))
    assert part_of(result).verdict in page.text
    assert paginate(Document("Nothing", [part_of(result)]))


def test_hostile_words_stay_words() -> None:
    level = closed_level(4, tasks=(HOSTILE,), name=HOSTILE, generator=Generator(bottleneck=HOSTILE), server=None)
    result = run_result(name=HOSTILE, levels=[level], target=target(note=HOSTILE, settings={HOSTILE: HOSTILE}))
    page = Page(render_html(Document(HOSTILE, [part_of(result)])))
    assert not page.all("script")
    assert "\x07" not in page.text
    assert "<script>alert('x')</script>" in page.text


@pytest.mark.slow
def test_a_pdf_has_the_pages_that_were_laid_out(tmp_path: Path) -> None:
    results = [run_result(levels=[closed_level(12, server=None)])]
    write_report(results, pdf=tmp_path / "report.pdf", title="One level")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    document = Document("One level", [part_of(result) for result in results])
    assert len(re.findall(rb"/Type /Page\b", content)) == len(paginate(document))
    assert b"(One level)" in content


def test_a_pdfs_pages_say_what_the_page_says() -> None:
    document = Document("Two", [part_of(run_result(levels=[])), part_of(run_result(name="second", levels=[]))])
    figures = list(page_figures(document))
    assert len(figures) == 2
    words = [" ".join(text.get_text() for text in figure.texts) for figure in figures]
    assert "Nothing was measured." in words[0]
    assert words[1].startswith("second")
    assert "Two  ·  2 / 2" in words[1]


def test_no_page_is_fuller_than_a_sheet() -> None:
    pages = paginate(Document("Long", [part_of(sweep_result())]))
    assert len(pages) > 1
    assert all(0 < page.height_in <= 10.3 for page in pages)


def test_a_long_table_goes_on_under_its_columns_titles() -> None:
    level = closed_level(4, tasks=("<OD>",), server=None)
    levels = [level.model_copy(update={"name": f"concurrency {n}", "concurrency": n}) for n in range(1, 70)]
    pages = paginate(Document("Long", [part_of(run_result(levels=levels))]))
    heads = [page.blocks[0] for page in pages[1:] if getattr(page.blocks[0], "is_head", False)]
    assert heads


def invoke(*arguments: str) -> Any:
    """Runs the command as the command line does."""
    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, arguments)


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    write_result(run_result(levels=[]), tmp_path / "run.json")
    run = invoke(str(tmp_path / "run.json"), "--html", str(tmp_path / "out" / "report.html"), "--title", "A < B")
    assert run.exit_code == 0, run.output
    assert "A &lt; B" in (tmp_path / "out" / "report.html").read_text()


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"kind": "holiday"}')
    for name, why in (("other.json", "not a result"), ("missing.json", "no such file")):
        run = invoke(str(tmp_path / name), "--html", str(tmp_path / "report.html"))
        assert run.exit_code == 1
        assert f"{name}: " in run.output
        assert why in run.output
        assert not (tmp_path / "report.html").exists()


def test_where_to_has_to_be_said(tmp_path: Path) -> None:
    write_result(run_result(levels=[]), tmp_path / "run.json")
    assert invoke(str(tmp_path / "run.json")).exit_code == 2


@pytest.mark.slow
def test_every_kind_becomes_a_page_and_a_pdf(tmp_path: Path) -> None:
    hostile = run_result(name=HOSTILE, levels=[closed_level(4, tasks=(HOSTILE,), name=HOSTILE)])
    results = [make() for make in EXAMPLES] + [hostile]
    write_report(results, html=tmp_path / "all.html", pdf=tmp_path / "all.pdf", title="All")
    page = Page((tmp_path / "all.html").read_text())
    assert len(page.all("article")) == len(results)
    assert not page.all("script")
    for result in results[:-1]:
        assert part_of(result).verdict in page.text
    document = Document("All", [part_of(result) for result in results])
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "all.pdf").read_bytes())) == len(paginate(document))
