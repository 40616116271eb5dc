"""Levels and ledgers for tests of the sweep."""

from __future__ import annotations

from collections.abc import Iterable

from florence2_loadtest.results import Level, Times, Trial


def level(
    throughput: float = 10.0, p95_s: float = 1.0, *, concurrency: int = 4, answered: int = 100, failed: int = 0
) -> Level:
    """Returns a level of a closed loop."""
    latency = Times(count=answered, mean_s=p95_s / 2, p50_s=p95_s / 2, p95_s=p95_s, p99_s=2 * p95_s, max_s=3 * p95_s)
    return Level(
        name=f"concurrency {concurrency}",
        mode="closed",
        concurrency=concurrency,
        answered=answered,
        failed=failed,
        throughput=throughput,
        latency=latency,
    )


class Memory:
    """A ledger that keeps trials in memory, as the checkpoint keeps them on disk."""

    def __init__(self, trials: Iterable[Trial] = ()) -> None:
        self.trials = [Trial.model_validate_json(trial.model_dump_json()) for trial in trials]

    def add(self, trial: Trial) -> None:
        """Notes a trial."""
        self.trials.append(trial)
