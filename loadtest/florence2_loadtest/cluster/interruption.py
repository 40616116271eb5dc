"""What happens to a run that a signal ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from florence2_kserve.exit_codes import SIGNAL_CODES, ExitCode
from florence2_loadtest.results import AutoscaleResult, Record


class Interrupted(Exception):
    """A run was ended by a signal.

    Attributes:
        code: How the command ends.
        outcome: What there was by then; None before the load.
    """

    def __init__(self, code: ExitCode, outcome: tuple[AutoscaleResult, list[Record]] | None = None) -> None:
        super().__init__(code.name)
        self.code, self.outcome = code, outcome


class Signals:
    """Has the first signal cancel the task that waits; a second one ends at once.

    Attributes:
        code: How the command is to end; None while there was no signal.
    """

    def __init__(self) -> None:
        self.code: ExitCode | None = None

    @contextmanager
    def cancel(self, task: asyncio.Task[object]) -> Iterator[None]:
        """Cancels `task` where a signal comes before the ``with`` statement's end."""
        loop = asyncio.get_running_loop()

        def stop(code: ExitCode) -> None:
            self.code = code
            task.cancel()
            self._forget(loop)

        for number, code in SIGNAL_CODES.items():
            loop.add_signal_handler(number, stop, code)
        try:
            yield
        finally:
            self._forget(loop)

    @staticmethod
    def _forget(loop: asyncio.AbstractEventLoop) -> None:
        for number in SIGNAL_CODES:
            loop.remove_signal_handler(number)
