"""Sending one request, and again where that may help."""

from __future__ import annotations

import asyncio
import random

from florence2_loadtest.results import Record
from florence2_loadtest.transport import Transport
from florence2_loadtest.workload import Prepared

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0


class Sender:
    """Sends requests and notes what became of them; times count from its making.

    Args:
        transport: What sends.
        timeout_s: For one request, its retries included.
        retries: How often a request is sent again that was refused for the moment, or got no answer.
    """

    def __init__(self, transport: Transport, timeout_s: float, retries: int) -> None:
        self._transport, self._timeout_s, self._retries = transport, timeout_s, retries
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()

    def begin(self) -> None:
        """Has times count from now."""
        self._began = self._clock()

    def now(self) -> float:
        """Returns the seconds since the beginning."""
        return self._clock() - self._began

    async def send(self, prepared: Prepared, record: Record) -> None:
        """Sends `prepared` and completes `record`."""
        record.sent_s = self.now()
        end = self._clock() + self._timeout_s
        while True:
            record.attempts += 1
            sent = await self._transport.send(prepared, max(0.001, end - self._clock()))
            if not sent.is_passing or record.attempts > self._retries:
                break
            pause = pause_before_retry(record.attempts, sent.retry_after_s)
            if self._clock() + pause >= end:
                break
            await asyncio.sleep(pause)
        record.done_s = sent.done_s - self._began
        record.status, record.component = sent.status, sent.component
        record.response_bytes, record.send_s, record.receive_s = sent.response_bytes, sent.send_s, sent.receive_s


def pause_before_retry(attempts: int, retry_after_s: float | None) -> float:
    """Returns how long to wait after so many attempts: at least what the server said, and not as all others do."""
    pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 30))
    return max(pause, retry_after_s or 0.0) * random.uniform(1.0, 1.5)
