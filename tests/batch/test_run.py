from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from florence2_kserve.batch.identity import Asked
from florence2_kserve.batch.ledger import Ledger, OutputFiles
from florence2_kserve.batch.progress import PlainProgress, Tally
from florence2_kserve.batch.run import Batch, Plan, RunEnded
from florence2_kserve.batch.sources import WHOLE, Picture, Sources
from florence2_kserve.client import AsyncFlorence2Client
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.local import free_port


class Endless(Sources):
    """Pictures without end; counts those that were taken and those that were read."""

    def __init__(self) -> None:
        super().__init__([])
        self.taken = self.read = 0
        self._counting = threading.Lock()

    def __iter__(self) -> Iterator[Picture]:
        while True:
            self.taken += 1
            yield Picture(f"memory://{self.taken}", lambda number=self.taken: self._read(number))

    def count(self, stopped: threading.Event) -> int | None:
        return None

    def _read(self, number: int) -> bytes:
        with self._counting:
            self.read += 1
        return str(number).encode()


def test_pictures_are_taken_and_read_no_further_ahead_than_said(tmp_path):
    sources = Endless()

    async def ask_nobody() -> None:
        plan = Plan(["<CAPTION>"], concurrency=3, give_up_after=1)
        url = f"http://127.0.0.1:{free_port()}"
        files = OutputFiles.of(tmp_path / "out.jsonl", WHOLE)
        asked = Asked("florence2", "", None, {})

        async def meet() -> Asked:
            return asked

        with Ledger(files, asked) as ledger:
            async with AsyncFlorence2Client(url, retries=0) as client:
                await Batch(sources, plan, ledger, client, meet, asked, PlainProgress(print), print).run()

    with pytest.raises(RunEnded, match="answered no question") as ended:
        asyncio.run(ask_nobody())
    assert ended.value.code is ExitCode.UNREACHABLE
    assert sources.taken == sources.read == 6


def test_a_tally_in_words():
    tally = Tally(total=10, known=2, answered=3, copied=1, failed=1, in_flight=2)
    tally.started -= 30
    assert tally.line() == "7/10 pictures (2 known, 1 copied, 1 failed), 2 in flight, 0.1/s, 0:00:30 to go"
    assert Tally().line() == "0 pictures (0 known, 0 copied, 0 failed), 0 in flight, 0.0/s"


def test_plain_progress_keeps_its_pace():
    lines: list[str] = []
    progress = PlainProgress(lines.append, every=0)
    progress.update(Tally())
    slow = PlainProgress(lines.append, every=1000)
    slow.update(Tally())
    assert len(lines) == 1
