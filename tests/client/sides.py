"""Both clients behind one face, so that each test is written once and runs with either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from florence2_kserve.client import AsyncFlorence2Client, Florence2Client

KINDS = ("blocking", "asyncio")
Open = Callable[..., Any]


class FromBlockingCode:
    """An asyncio client whose methods are called without await; its event loop runs during calls only."""

    def __init__(self, url: str, **settings: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = AsyncFlorence2Client(url, **settings)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if not callable(found):
            return found
        return lambda *positional, **named: self._runner.run(found(*positional, **named))

    def stream(self, *positional: Any, **named: Any) -> Generator[Any, None, None]:
        return self._drawn(self.client.stream(*positional, **named))

    def _drawn(self, outcomes: Any) -> Generator[Any, None, None]:
        async def draw() -> Any:
            return await anext(outcomes)

        try:
            while True:
                try:
                    outcome = self._runner.run(draw())
                except StopAsyncIteration:
                    return
                yield outcome
        finally:
            self._runner.run(outcomes.aclose())

    def end(self) -> None:
        self._runner.run(self.client.close())
        self._runner.close()


@contextmanager
def opened(kind: str, url: str, **settings: Any) -> Iterator[Any]:
    """Opens one of `KINDS` of client."""
    if kind == "blocking":
        with Florence2Client(url, **settings) as client:
            yield client
    else:
        client = FromBlockingCode(url, **settings)
        try:
            yield client
        finally:
            client.end()
