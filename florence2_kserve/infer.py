"""``florence2 infer``: a few questions about one picture, and ``florence2 tasks``: what can be asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from florence2_kserve.batch.lines import answer_fields
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.options import (
    MODEL_NAME,
    Headers,
    LengthPenalty,
    MaxNewTokens,
    Model,
    ModelName,
    NumBeams,
    Text,
    TimeoutMs,
    Url,
    given,
    read_headers,
)
from florence2_kserve.tasks import TASKS, TaskInput, find_task
from florence2_kserve.urls import check_url

if TYPE_CHECKING:
    from florence2_kserve.client import Answer


class OutputFormat(StrEnum):
    """How answers are printed."""

    JSON = "json"
    TABLE = "table"


def infer(
    image: Annotated[str, typer.Argument(help="A picture: a path, an fsspec address (s3://…), or - for stdin.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task prompt, with or without angle brackets; may be repeated.", show_default="<CAPTION>"),
    ] = None,
    text: Text = None,
    url: Url = None,
    model: Model = "embedded",
    num_beams: NumBeams = None,
    max_new_tokens: MaxNewTokens = None,
    length_penalty: LengthPenalty = None,
    timeout_ms: TimeoutMs = None,
    output_format: Annotated[
        OutputFormat, typer.Option(help="One JSON object in a line, or a table of what was found.")
    ] = OutputFormat.JSON,
    scores: Annotated[
        bool, typer.Option("--scores", help="Print how sure the model is, and why it stopped, too.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the answers onto the picture, into this PNG or PDF.")] = None,
    model_name: ModelName = MODEL_NAME,
    header: Headers = None,
) -> None:
    """Answer questions about one picture and print the JSON."""
    from florence2_kserve.batch.sources import SourceError, read_one
    from florence2_kserve.client import ClientError, Florence2Client, UnavailableError

    check_url(url)
    headers = read_headers(header)
    parameters = given(
        num_beams=num_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty, timeout_ms=timeout_ms
    )
    tasks = task or ["<CAPTION>"]
    if text is not None and not any(map(_takes_text, tasks)):
        raise typer.BadParameter(f"none of {', '.join(tasks)} takes a text", param_hint="--text")
    try:
        data = read_one(image)
    except (OSError, SourceError) as error:
        raise typer.BadParameter(str(error), param_hint="IMAGE") from None
    texts = [text if _takes_text(name) else None for name in tasks]
    try:
        with (
            _address(url, model, model_name) as address,
            Florence2Client(address, model_name=model_name, headers=headers) as client,
        ):
            if len(tasks) == 1 and output_format is OutputFormat.JSON and not scores and plot is None:
                # As the service gives it, also for a task that isn't known here.
                typer.echo(json.dumps(client.infer(data, tasks[0], text, **parameters), ensure_ascii=False))
                return
            answers = client.ask_tasks(data, tasks, texts, **parameters)
        _print(answers, output_format, scores)
        if plot is not None:
            _plot(answers, data, plot)
    except (ClientError, RuntimeError, ImportError, ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        is_gone = isinstance(error, UnavailableError)
        raise typer.Exit(ExitCode.UNREACHABLE if is_gone else ExitCode.FAILED) from None


def tasks(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Print the tasks: prompt, what each takes beside the picture, and what kind of answer it gives."""
    if as_json:
        rows = [
            {
                "task": task.name,
                "takes": task.takes.value,
                "answer": task.answer.value,
                "template": task.template,
                "max_new_tokens": task.max_new_tokens,
            }
            for task in TASKS.values()
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    _show_table(
        ("task", "takes", "answer"),
        [(task.name, task.takes.value, task.answer.value.replace("_", " ")) for task in TASKS.values()],
    )


@contextmanager
def _address(url: str | None, model: str, model_name: str) -> Iterator[str]:
    from florence2_kserve.local import LocalService

    if url is not None:
        yield url
    else:
        with LocalService(model=model, model_name=model_name) as service:
            yield service.rest_url


def _takes_text(name: str) -> bool:
    try:
        return find_task(name).takes is not TaskInput.NONE
    except KeyError:
        return True  # the service says what is wrong with it


def _print(answers: Sequence[Answer], output_format: OutputFormat, scores: bool) -> None:
    if output_format is OutputFormat.TABLE:
        heads = ("task", "what", "where", *(("score",) if scores else ()))
        _show_table(heads, [row if scores else row[:3] for answer in answers for row in _rows(answer)])
    else:
        values = {answer.task: answer_fields(answer) if scores else answer.value for answer in answers}
        typer.echo(json.dumps(values, ensure_ascii=False))


def _rows(answer: Answer) -> list[tuple[str, ...]]:
    from florence2_kserve.client import Caption
    from florence2_kserve.client.results import Places

    if isinstance(answer, Caption):
        return [(answer.task, answer.text, "", _number(answer.score))]
    assert isinstance(answer, Places)
    return [
        (answer.task, item.label, ", ".join(f"{value:g}" for value in item.box), _number(item.score))
        for item in answer
    ] or [(answer.task, "(nothing)", "", "")]


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def _show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: drawn on a terminal, plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text as RichText

        table = Table(*heads)
        for row in rows:
            table.add_row(*map(RichText, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _plot(answers: Sequence[Answer], data: bytes, path: Path) -> None:
    """Draws each answer onto a picture of its own; several are numbered: ``out.png``, ``out-2.png``, …"""
    for number, answer in enumerate(answers, 1):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        figure = answer.plot(data).get_figure(root=True)
        assert figure is not None
        figure.savefig(target)
