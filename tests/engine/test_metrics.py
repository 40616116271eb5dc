from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from florence2_kserve.engine.metrics import Counter, EngineMetrics, Gauge, Histogram


def test_a_bound_belongs_to_the_bucket_that_it_ends():
    histogram = Histogram((1, 2, 4))
    for value in (0, 1, 1.5, 2, 4, 4.001, 100):
        histogram.observe(value)
    assert histogram.buckets == [2, 2, 1, 2]
    assert histogram.count == 7
    assert histogram.sum == pytest.approx(112.501)


def test_buckets_are_a_copy():
    histogram = Histogram((1,))
    histogram.buckets[0] = 5
    assert histogram.count == 0


def test_two_engines_count_apart():
    one, other = EngineMetrics(), EngineMetrics()
    one.decode_steps.add()
    one.batch_rows.observe(3)
    one.requests_waiting.set(2)
    assert not any(other.snapshot().values())


def test_the_snapshot_has_every_metric():
    metrics = EngineMetrics()
    metrics.row_steps.add(9)
    metrics.rows_running.set(4)
    metrics.rows_running.set(3)
    metrics.queue_seconds.observe(0.5)
    metrics.queue_seconds.observe(0.25)
    snapshot = metrics.snapshot()
    assert (snapshot["row_steps"], snapshot["rows_running"]) == (9, 3)
    assert (snapshot["queue_seconds_count"], snapshot["queue_seconds_sum"]) == (2, 0.75)
    kinds = [type(metric) for metric in metrics.all().values()]
    assert len(snapshot) == len(kinds) + kinds.count(Histogram)
    assert kinds.count(Counter) + kinds.count(Gauge) + kinds.count(Histogram) == len(kinds)


@pytest.mark.parametrize("name", [name for name, m in EngineMetrics().all().items() if isinstance(m, Histogram)])
def test_bounds_ascend(name):
    bounds = EngineMetrics().all()[name].bounds
    assert all(low < high for low, high in pairwise(bounds))


def test_a_misspelt_metric_is_an_error():
    with pytest.raises(AttributeError):
        EngineMetrics().decode_step = Counter()


def test_readers_see_a_histogram_that_agrees_with_itself():
    """No reader finds more values counted than were observed, nor fewer than it found before."""
    histogram, done = Histogram((0.5, 1.5)), threading.Event()

    def write() -> None:
        for value in range(200_000):
            histogram.observe(value % 3)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    last = [0, 0, 0]
    while not done.is_set():
        seen = histogram.buckets
        assert all(now >= before for now, before in zip(seen, last, strict=True))
        assert seen[0] >= seen[1] >= seen[2] >= seen[0] - 1
        last = seen
    writer.join()
    assert histogram.buckets == [66_667, 66_667, 66_666]
