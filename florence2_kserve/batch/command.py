"""The flags of ``florence2 batch``, and what becomes of them."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from florence2_kserve.batch.sources import WHOLE, Shard, SourceError, Sources, check_named
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
from florence2_kserve.tasks import TaskInput, find_task
from florence2_kserve.urls import check_url

if TYPE_CHECKING:
    from florence2_kserve.batch.identity import Asked
    from florence2_kserve.batch.ledger import Ledger, OutputFiles
    from florence2_kserve.batch.progress import Tally
    from florence2_kserve.batch.run import Plan
    from florence2_kserve.client import AsyncFlorence2Client

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"  # set by Kubernetes in the pods of an Indexed Job
_ANSWER_PARAMETERS = ("max_new_tokens", "num_beams", "length_penalty")
_REQUEST_S = 600.0  # as long as the server may take, where no timeout_ms is given
_SPARE_S = 10.0
_CLIENT_RETRIES = 2  # the run itself tries again, and knows whether others are answered meanwhile
_OWN_FILES, _FILES_A_REQUEST = 64, 3  # a picture being asked about, one being read, and a connection
_REACH_PAUSE_S, _LEAST_REACH_S = 1.0, 1.0


def batch(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE…",
            help="A folder, a glob, an fsspec address (s3://…) of a file, folder or glob, a Parquet file with "
            "--column, or @LIST with one of these a line.",
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(help="FILE.jsonl, FILE.parquet, or a folder; a run on what is there goes on where it ended."),
    ] = "answers.jsonl",
    task: Annotated[
        list[str] | None, typer.Option(help="Task prompt; may be repeated.", show_default="<CAPTION>")
    ] = None,
    text: Text = None,
    list_file: Annotated[list[Path] | None, typer.Option("--list", help="A list of sources, as @LIST.")] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Column of Parquet files that holds pictures: bytes, {bytes, path} or addresses."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds each picture's text or region.")] = None,
    url: Url = None,
    model: Model = "embedded",
    model_name: ModelName = MODEL_NAME,
    model_revision: Annotated[
        str | None,
        typer.Option(help="What tells this model from others of the same name; answers of another aren't its own."),
    ] = None,
    num_beams: NumBeams = None,
    max_new_tokens: MaxNewTokens = None,
    length_penalty: LengthPenalty = None,
    timeout_ms: TimeoutMs = None,
    header: Headers = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 8,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help=f"Only part I (from 0) of N; auto/N takes I from {INDEX_VARIABLE}, as in an Indexed Job.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Pictures to ask about, or to copy answers for, at most.", min=1)
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what was refused before.")] = False,
    rehash: Annotated[
        bool, typer.Option("--rehash", help="Read every file again, also those that look unchanged.")
    ] = False,
    give_up_after: Annotated[
        float, typer.Option(help="Seconds without any answer after which the service counts as gone.", min=0)
    ] = 60,
    grace: Annotated[float, typer.Option(help="Seconds for what is in flight, after a signal.", min=0)] = 30,
) -> None:
    """Ask about many pictures; killed or ended, the same command goes on where it was."""
    from florence2_kserve.batch.journal import JournalError
    from florence2_kserve.batch.ledger import OutputFiles
    from florence2_kserve.batch.parquet import check_installed
    from florence2_kserve.batch.run import Plan, RunEnded
    from florence2_kserve.client import ClientError
    from florence2_kserve.local import LocalService

    check_url(url)
    names = [*(sources or ()), *(f"@{path}" for path in list_file or ())]
    if not names:
        raise typer.BadParameter("name a folder, a glob, an address or a list", param_hint="SOURCE")
    parameters = given(
        max_new_tokens=max_new_tokens, num_beams=num_beams, length_penalty=length_penalty, timeout_ms=timeout_ms
    )
    plan = Plan(
        **_tasks(task or ["<CAPTION>"], text, text_column),
        text=text,
        parameters=parameters,
        concurrency=_fitting(concurrency),
        limit=limit,
        give_up_after=give_up_after,
        grace=grace,
    )
    part = read_shard(shard, os.environ)
    files = OutputFiles.of(Path(output), part)
    try:
        if "://" in output:
            raise SourceError("the output has to be a file here: it is locked and appended to, which stores can't do")
        if output == "-":
            raise SourceError("the output has to be a file: a rerun reads it, which standard output doesn't allow")
        check_named(names)
        pictures = Sources(names, column, text_column, part, _say)
        if files.table is not None:
            check_installed()
    except SourceError as error:
        raise typer.BadParameter(str(error)) from None
    headers = read_headers(header)

    is_blocked = False
    try:
        with ExitStack() as stack:
            if url is None:
                service = stack.enter_context(LocalService(model=model, model_name=model_name))
                url = service.rest_url
            run = _Run(url, model_name, model_revision, headers, plan, files, retry_failed, rehash)
            try:
                code = asyncio.run(run.run(pictures))
            finally:
                is_blocked = run.is_blocked
    except RunEnded as error:
        _say(f"error: {error}")
        code = error.code
    except (JournalError, SourceError, ClientError, OSError, RuntimeError, ValueError) as error:
        _say(f"error: {error}")
        code = ExitCode.FAILED
    if is_blocked:
        # Python would wait for the thread that waits for a source.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


class _Run:
    """From an address to a finished output; `is_blocked` afterwards as `Batch.is_blocked`."""

    def __init__(
        self,
        url: str,
        model_name: str,
        revision: str | None,
        headers: dict[str, str],
        plan: Plan,
        files: OutputFiles,
        retry_failed: bool,
        rehash: bool,
    ) -> None:
        self._url, self._model_name, self._revision, self._headers = url, model_name, revision, headers
        self._plan, self._files, self._retry_failed, self._rehash = plan, files, retry_failed, rehash
        self.is_blocked = False

    async def run(self, sources: Sources) -> ExitCode:
        from florence2_kserve.batch.ledger import Ledger
        from florence2_kserve.batch.progress import make_progress
        from florence2_kserve.batch.run import Batch
        from florence2_kserve.client import AsyncFlorence2Client

        timeout_ms = self._plan.parameters.get("timeout_ms")
        async with AsyncFlorence2Client(
            self._url,
            model_name=self._model_name,
            headers=self._headers,
            retries=_CLIENT_RETRIES,
            timeout=_REQUEST_S if timeout_ms is None else timeout_ms / 1000 + _SPARE_S,
        ) as client:
            asked = await self._meet_first(client)
            with Ledger(self._files, asked, retry_failed=self._retry_failed, rehash=self._rehash) as ledger:
                if ledger.found:
                    _say(f"{self._files.journal} holds {ledger.found} answers; going on behind them")

                async def meet() -> Asked:
                    return await self._meet(client, max(self._plan.give_up_after, _LEAST_REACH_S))

                running = Batch(sources, self._plan, ledger, client, meet, asked, make_progress(_say), _say)
                try:
                    return await running.run()
                finally:
                    self.is_blocked = running.is_blocked
                    if self._files.table is not None:
                        self._write_table(ledger)
                    typer.echo(self._summary(running.tally, sources))

    async def _meet_first(self, client: AsyncFlorence2Client) -> Asked:
        """Asks the service who it is, as soon as it answers."""
        from florence2_kserve.batch.run import RunEnded
        from florence2_kserve.client import ClientError, DeadlineError, UnavailableError

        end = time.monotonic() + self._plan.give_up_after
        while True:
            try:
                return await self._meet(client, max(end - time.monotonic(), _LEAST_REACH_S))
            except (DeadlineError, UnavailableError) as error:
                if time.monotonic() >= end:
                    raise RunEnded(f"{self._url} can't be reached: {error}", ExitCode.UNREACHABLE) from None
                await asyncio.sleep(_REACH_PAUSE_S)
            except ClientError as error:
                raise RunEnded(f"{self._url} refuses: {error}", ExitCode.FAILED) from None

    async def _meet(self, client: AsyncFlorence2Client, seconds: float) -> Asked:
        from florence2_kserve.batch.identity import Asked
        from florence2_kserve.client import DeadlineError

        try:
            async with asyncio.timeout(seconds):
                metadata = await client.metadata()
        except TimeoutError:
            raise DeadlineError(f"it didn't say within {seconds:.0f} s which model it has") from None
        checkpoint = metadata.get("properties") or {}
        return Asked(
            str(metadata.get("name", self._model_name)),
            str(metadata.get("platform", "")),
            self._revision or "@".join(filter(None, map(checkpoint.get, ("model", "revision")))) or None,
            {name: self._plan.parameters[name] for name in _ANSWER_PARAMETERS if name in self._plan.parameters},
        )

    def _write_table(self, ledger: Ledger) -> None:
        from florence2_kserve.batch.ledger import FIELDS
        from florence2_kserve.batch.parquet import write_table

        assert self._files.table is not None
        write_table(ledger.records(), self._files.table, FIELDS)

    def _summary(self, tally: Tally, sources: Sources) -> str:
        parts = [
            f"{tally.answered} pictures answered",
            f"{tally.known} known before",
            f"{tally.copied} copied from the same bytes",
            f"{tally.failed} failed" + (f" (see {self._files.failures})" if tally.failed else ""),
        ]
        if sources.skipped:
            parts.append(f"{sources.skipped} files skipped that aren't pictures by their suffix")
        if sources.unlisted:
            parts.append(f"{sources.unlisted} folders skipped that can't be listed")
        return (
            f"{', '.join(parts)}; {tally.seconds:.1f} s, {tally.rate:.1f} pictures/s; "
            f"{self._files.table or self._files.journal}"
        )


def read_shard(word: str | None, environment: Mapping[str, str]) -> Shard:
    """Reads ``I/N`` or ``auto/N``.

    Args:
        word: As given; None is all of it.
        environment: Where ``auto`` finds its part.

    Raises:
        typer.BadParameter: If it is neither, or I isn't below N.
    """
    if word is None:
        return WHOLE
    index, slash, count = word.partition("/")
    if index == "auto":
        index = environment.get(INDEX_VARIABLE, "")
        if not index:
            raise typer.BadParameter(
                f"auto takes its part from {INDEX_VARIABLE}, which isn't set", param_hint="--shard"
            )
    if not slash or not (index.isdecimal() and count.isdecimal()) or int(index) >= int(count):
        raise typer.BadParameter(
            f"has to be I/N with I from 0 to N-1, or auto/N, not {word!r} (I is {index!r})", param_hint="--shard"
        )
    return Shard(int(index), int(count))


def _tasks(names: list[str], text: str | None, text_column: str | None) -> dict[str, Any]:
    try:
        tasks = list({task.name: task for task in map(find_task, names)}.values())
    except KeyError as error:
        raise typer.BadParameter(error.args[0], param_hint="--task") from None
    takes_text = frozenset(task.name for task in tasks if task.takes is not TaskInput.NONE)
    has_text = text is not None or text_column is not None
    if takes_text and not has_text:
        raise typer.BadParameter(f"{min(takes_text)} needs --text or --text-column", param_hint="--task")
    if has_text and not takes_text:
        raise typer.BadParameter(f"none of {', '.join(task.name for task in tasks)} takes a text", param_hint="--text")
    return {"tasks": [task.name for task in tasks], "takes_text": takes_text}


def _fitting(concurrency: int) -> int:
    """Returns how many requests this process has file descriptors for, `concurrency` at most."""
    needed = _OWN_FILES + _FILES_A_REQUEST * concurrency
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return concurrency
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with suppress(OSError, ValueError):  # systems may have bounds of their own below an unlimited one
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    fitting = max(1, (soft - _OWN_FILES) // _FILES_A_REQUEST)
    if fitting < concurrency:
        _say(f"--concurrency {concurrency} needs more files than `ulimit -n` of {soft} allows; taking {fitting}")
    return min(concurrency, fitting)


def _say(line: str) -> None:
    typer.echo(line, err=True)
