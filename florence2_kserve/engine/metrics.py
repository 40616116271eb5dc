"""What an engine counts and measures, cheap enough for every decode step.

One thread writes each of them at a time; any thread may read, without a lock, and sees every
value whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial

# Upper bounds of buckets. Steps and encoders last from under a millisecond on a GPU to seconds on a CPU;
# requests as long as their deadline allows.
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Counter:
    """A whole number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, n: int = 1) -> None:
        """Adds `n`, 0 or more."""
        self.value += n


class Gauge:
    """A number as it is now."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        """Replaces the number."""
        self.value = value


class Histogram:
    """How often values fell into fixed buckets.

    Args:
        bounds: Upper bounds of the buckets, ascending; a bound belongs to the bucket that it ends.

    Attributes:
        bounds: As given; the last bucket, which has no bound, isn't among them.
        sum: Sum of all observed values.
    """

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.sum: float = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Counts one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """Number of observed values."""
        return sum(self._counts)

    @property
    def buckets(self) -> list[int]:
        """Number of values in each bucket by itself, one more than there are bounds."""
        return self._counts.copy()


@dataclass(slots=True, eq=False)
class EngineMetrics:
    """All counters, gauges and histograms of one engine.

    A request is one row of ``Engine.submit``; a row is one beam of the decoder's batch.

    Attributes:
        requests_submitted: Requests taken in.
        requests_stopped: Requests answered whose sequence ended by itself.
        requests_length: Requests answered whose sequence max_new_tokens cut off.
        requests_failed: Requests that got an error other than those below.
        requests_cancelled: Requests whose caller no longer waits.
        requests_expired: Requests whose deadline passed.
        requests_refused: Requests that were invalid or found the queue full; none of them counts as submitted.
        generated_tokens: Tokens of answers, start tokens left out.
        decode_steps: Passes of the decoder.
        row_steps: Rows summed over the passes.
        useful_row_steps: Those of them that belonged to a request still searching.
        images_encoded: Images that went through the image tower.
        vision_batches: Passes of the image tower.
        prompts_encoded: Prompts that went through the text encoder.
        cross_kv_bytes: Bytes of cross-attention keys and values written.
        host_syncs: Times that the host waited for the device.
        feature_cache_hits: Images whose features were kept from before.
        feature_cache_misses: Images whose features were not.
        feature_cache_evictions: Images whose features made room for others.
        requests_waiting: Requests in the queue.
        requests_running: Requests being decoded.
        rows_running: Rows being decoded.
        tokens_reserved: Rows times max_new_tokens of the requests being decoded.
        feature_cache_bytes: Bytes of features kept.
        feature_cache_entries: Images whose features are kept.
        queue_seconds: Time of a request from submission until it is taken up.
        vision_seconds: Time of a pass of the image tower.
        prefill_seconds: Time of a pass of the text encoder with its cross-attention keys and values.
        decode_step_seconds: Time of a pass of the decoder with its step of the search.
        request_seconds: Time of an answered request from submission to its answer.
        batch_rows: Rows in a pass of the decoder.
    """

    requests_submitted: Counter = field(default_factory=Counter)
    requests_stopped: Counter = field(default_factory=Counter)
    requests_length: Counter = field(default_factory=Counter)
    requests_failed: Counter = field(default_factory=Counter)
    requests_cancelled: Counter = field(default_factory=Counter)
    requests_expired: Counter = field(default_factory=Counter)
    requests_refused: Counter = field(default_factory=Counter)
    generated_tokens: Counter = field(default_factory=Counter)
    decode_steps: Counter = field(default_factory=Counter)
    row_steps: Counter = field(default_factory=Counter)
    useful_row_steps: Counter = field(default_factory=Counter)
    images_encoded: Counter = field(default_factory=Counter)
    vision_batches: Counter = field(default_factory=Counter)
    prompts_encoded: Counter = field(default_factory=Counter)
    cross_kv_bytes: Counter = field(default_factory=Counter)
    host_syncs: Counter = field(default_factory=Counter)
    feature_cache_hits: Counter = field(default_factory=Counter)
    feature_cache_misses: Counter = field(default_factory=Counter)
    feature_cache_evictions: Counter = field(default_factory=Counter)

    requests_waiting: Gauge = field(default_factory=Gauge)
    requests_running: Gauge = field(default_factory=Gauge)
    rows_running: Gauge = field(default_factory=Gauge)
    tokens_reserved: Gauge = field(default_factory=Gauge)
    feature_cache_bytes: Gauge = field(default_factory=Gauge)
    feature_cache_entries: Gauge = field(default_factory=Gauge)

    queue_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    vision_seconds: Histogram = field(default_factory=partial(Histogram, STEP_SECONDS))
    prefill_seconds: Histogram = field(default_factory=partial(Histogram, STEP_SECONDS))
    decode_step_seconds: Histogram = field(default_factory=partial(Histogram, STEP_SECONDS))
    request_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    batch_rows: Histogram = field(default_factory=partial(Histogram, ROWS))

    def all(self) -> dict[str, Counter | Gauge | Histogram]:
        """Returns each metric by its name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def snapshot(self) -> dict[str, float]:
        """Returns counters and gauges by name, histograms as ``name_count`` and ``name_sum``."""
        values: dict[str, float] = {}
        for name, metric in self.all().items():
            if isinstance(metric, Histogram):
                values[f"{name}_count"] = metric.count
                values[f"{name}_sum"] = metric.sum
            else:
                values[name] = metric.value
        return values
