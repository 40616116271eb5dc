"""How the load generator itself fares: whether its figures are the server's, or its own."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from florence2_loadtest.results import Generator

_TICK_S = 0.02
# One thread does all the work. At four fifths of a processor, what is due waits four times as long as handling it
# takes (ρ/(1-ρ) of a queue with one server): beyond that, more load shows the generator's own queue.
MOST_CPU_SHARE = 0.8
# Lateness of the generator is part of the latencies that it reports. One of a hundred may be off by a tenth of the
# median, which is what windows may differ by; and below ten milliseconds it is the operating system's, whose epoll
# counts in whole ones.
MOST_LATE_SHARE, MOST_LATE_S = 0.1, 0.010
# Collections of many objects stop the loop for tens of milliseconds; most of our objects need none.
_COLLECT_AFTER = (50_000, 50, 1000)


class Watch:
    """Watches this process and its running event loop from now until `stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lags: list[float] = []
        self._began = self._loop.time()
        self._cpu, self._thread_cpu = time.process_time(), time.thread_time()
        self._due = self._began + _TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)

    def stop(
        self, latencies: Sequence[float], slips: Sequence[float] = (), own_slips: Sequence[float] = ()
    ) -> Generator:
        """Ends watching, and judges.

        Args:
            latencies: Of the answers that came meanwhile, in seconds.
            slips: How late requests were sent, in seconds.
            own_slips: The same, with 0 for those that were late as too many others weren't answered.
        """
        self._timer.cancel()
        self._note_lags()
        seconds = max(1e-9, self._loop.time() - self._began)
        thread_share = (time.thread_time() - self._thread_cpu) / seconds
        lag = percentile(self._lags, 99)
        return Generator(
            cpu_share=(time.process_time() - self._cpu) / seconds,
            loop_lag_p99_s=lag,
            slip_p99_s=percentile(slips, 99),
            bottleneck=find_bottleneck(thread_share, lag, percentile(own_slips, 99), percentile(latencies, 50)),
        )

    def _tick(self) -> None:
        self._note_lags()
        self._timer = self._loop.call_at(self._due, self._tick)

    def _note_lags(self) -> None:
        # Each tick that was missed counts: as one, a stall of a second would vanish among those in time.
        now = self._loop.time()
        while self._due <= now:
            self._lags.append(now - self._due)
            self._due += _TICK_S


def find_bottleneck(cpu_share: float, lag_p99_s: float, slip_p99_s: float, latency_p50_s: float) -> str | None:
    """Returns in words why the generator set the figures, or None where it didn't.

    Args:
        cpu_share: Of one processor, of the event loop's thread.
        lag_p99_s: How late the event loop ran what was due.
        slip_p99_s: How late requests were sent, but for those that had to wait until others were answered: that is the
            service's doing.
        latency_p50_s: What they are late in comparison with; 0 where nothing was answered.
    """
    bound = max(MOST_LATE_S, MOST_LATE_SHARE * latency_p50_s)
    reasons = []
    if cpu_share > MOST_CPU_SHARE:
        reasons.append(f"its event loop used {cpu_share:.0%} of a processor, more than {MOST_CPU_SHARE:.0%}")
    if lag_p99_s > bound:
        reasons.append(
            f"its event loop ran up to {lag_p99_s * 1000:.0f} ms late (p99; {bound * 1000:.0f} are tolerable): "
            "it had too little of the processor"
        )
    if slip_p99_s > bound and not reasons:
        reasons.append(f"requests were sent up to {slip_p99_s * 1000:.0f} ms late (p99)")
    return "; ".join(reasons) or None


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile, 0 of nothing."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Spares the event loop most of the garbage collector's pauses: what is there now is never looked at again."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
