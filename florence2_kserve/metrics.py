"""An engine's metrics for Prometheus, on the registry that the SDK serves at ``/metrics``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import accumulate
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from florence2_kserve.engine.metrics import Counter, EngineMetrics, Gauge, Histogram

PREFIX = "florence2_engine_"

# Field of EngineMetrics → HELP text.
DESCRIPTIONS = {
    "requests_submitted": "Requests taken in; a request is one prompt about one image.",
    "requests_stopped": "Requests answered with a sequence that ended by itself.",
    "requests_length": "Requests answered with a sequence that max_new_tokens cut off.",
    "requests_failed": "Requests that failed through no fault of their caller.",
    "requests_cancelled": "Requests that were dropped since their caller went away.",
    "requests_expired": "Requests that were dropped since their deadline passed.",
    "requests_refused": "Requests that were invalid or found the queue full.",
    "generated_tokens": "Tokens of answers, without start tokens.",
    "decode_steps": "Passes of the decoder.",
    "row_steps": "Rows (beams) summed over the passes of the decoder.",
    "useful_row_steps": "Of row_steps, those of requests that were still searching.",
    "images_encoded": "Images that went through the image tower.",
    "vision_batches": "Passes of the image tower.",
    "prompts_encoded": "Prompts that went through the text encoder.",
    "cross_kv_bytes": "Cross-attention keys and values written, in bytes.",
    "host_syncs": "Times that the host waited for the device.",
    "feature_cache_hits": "Images whose features were kept from before.",
    "feature_cache_misses": "Images whose features were not kept.",
    "feature_cache_evictions": "Images whose features made room for others.",
    "requests_waiting": "Requests in the queue.",
    "requests_running": "Requests being decoded.",
    "rows_running": "Rows (beams) being decoded.",
    "tokens_reserved": "Rows times max_new_tokens of the requests being decoded.",
    "feature_cache_bytes": "Image features kept, in bytes.",
    "feature_cache_entries": "Images whose features are kept.",
    "queue_seconds": "Time of a request in the queue, in seconds.",
    "vision_seconds": "Time of a pass of the image tower, in seconds.",
    "prefill_seconds": "Time of a pass of the text encoder and its cross-attention keys and values, in seconds.",
    "decode_step_seconds": "Time of a pass of the decoder with its step of the search, in seconds.",
    "request_seconds": "Time of an answered request from submission to answer, in seconds.",
    "batch_rows": "Rows (beams) in a pass of the decoder.",
}


class EngineCollector(Collector):
    """Reads an engine's metrics whenever Prometheus asks.

    Args:
        metrics: Of the engine.
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yields each metric as it is now."""
        for field, metric in self._metrics.all().items():
            yield _family(f"{PREFIX}{field}", DESCRIPTIONS[field], metric)


# A registry takes a name once: whoever comes last is shown.
_published: WeakKeyDictionary[CollectorRegistry, EngineCollector] = WeakKeyDictionary()
_changing = threading.Lock()


def publish(metrics: EngineMetrics, registry: CollectorRegistry = REGISTRY) -> EngineCollector:
    """Shows `metrics` at `registry`, in place of an engine's that are shown there already.

    Returns:
        What ``withdraw`` takes.
    """
    collector = EngineCollector(metrics)
    with _changing:
        if previous := _published.pop(registry, None):
            registry.unregister(previous)
        registry.register(collector)
        _published[registry] = collector
    return collector


def withdraw(collector: EngineCollector, registry: CollectorRegistry = REGISTRY) -> None:
    """Shows an engine's metrics no longer; does nothing if others have taken their place."""
    with _changing:
        if _published.get(registry) is collector:
            del _published[registry]
            registry.unregister(collector)


def _family(name: str, description: str, metric: Counter | Gauge | Histogram) -> Metric:
    if isinstance(metric, Counter):
        return CounterMetricFamily(name, description, value=metric.value)  # the exposition appends _total
    if isinstance(metric, Gauge):
        return GaugeMetricFamily(name, description, value=metric.value)
    # Read once: the count must be the last bucket's, while the engine goes on counting.
    cumulative = list(accumulate(metric.buckets))
    bounds = [*(str(float(bound)) for bound in metric.bounds), "+Inf"]
    return HistogramMetricFamily(
        name, description, buckets=list(zip(bounds, cumulative, strict=True)), sum_value=metric.sum
    )
