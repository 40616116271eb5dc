"""Engine metrics as Prometheus reads them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from florence2_kserve.engine.metrics import Counter, EngineMetrics, Histogram
from florence2_kserve.metrics import DESCRIPTIONS, PREFIX, publish, withdraw


@pytest.fixture
def registry():
    return CollectorRegistry(auto_describe=True)  # as the default one


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    text = generate_latest(registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {
        sample.name + (f"/{sample.labels['le']}" if "le" in sample.labels else ""): sample.value for sample in samples
    }
    assert len(values) == len(samples), "a sample is there twice"
    return values


def test_every_metric_has_a_description_and_every_description_a_metric():
    assert set(DESCRIPTIONS) == set(EngineMetrics().all())


def test_every_metric_is_scraped_with_its_kind_and_help(registry):
    metrics = EngineMetrics()
    publish(metrics, registry)
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    assert len(families) == len(DESCRIPTIONS)
    for name, metric in metrics.all().items():
        family = families[PREFIX + name]
        assert family.documentation == DESCRIPTIONS[name]
        assert family.type == type(metric).__name__.lower()
        for unit in ("seconds", "bytes"):
            assert (unit in name) == (unit in family.documentation), name


def test_values_are_those_of_the_moment_of_the_scrape(registry):
    metrics = EngineMetrics()
    publish(metrics, registry)
    metrics.generated_tokens.add(7)
    metrics.requests_waiting.set(3)
    assert scrape(registry)[f"{PREFIX}generated_tokens_total"] == 7
    metrics.generated_tokens.add(2)
    metrics.requests_waiting.set(1)
    values = scrape(registry)
    assert (values[f"{PREFIX}generated_tokens_total"], values[f"{PREFIX}requests_waiting"]) == (9, 1)


def test_counters_end_in_total_and_nothing_else_does(registry):
    metrics = EngineMetrics()
    publish(metrics, registry)
    names = {name for name in scrape(registry) if name.endswith("_total")}
    assert names == {f"{PREFIX}{name}_total" for name, m in metrics.all().items() if isinstance(m, Counter)}


def test_histograms_are_cumulative(registry):
    metrics = EngineMetrics()
    for rows in (1, 2, 3, 4, 1000):
        metrics.batch_rows.observe(rows)
    publish(metrics, registry)
    values = scrape(registry)
    name = f"{PREFIX}batch_rows"
    buckets = {bound: values[f"{name}_bucket/{bound}"] for bound in ("1.0", "2.0", "4.0", "8.0", "512.0", "+Inf")}
    assert buckets == {"1.0": 1, "2.0": 2, "4.0": 4, "8.0": 4, "512.0": 4, "+Inf": 5}
    assert (values[f"{name}_count"], values[f"{name}_sum"]) == (5, 1010)
    empty = next(n for n, m in metrics.all().items() if isinstance(m, Histogram) and not m.count)
    assert (values[f"{PREFIX}{empty}_bucket/+Inf"], values[f"{PREFIX}{empty}_count"]) == (0, 0)


def test_the_last_engine_is_shown_and_leaves_with_its_withdrawal(registry):
    first, second = EngineMetrics(), EngineMetrics()
    first.decode_steps.add(1)
    second.decode_steps.add(2)
    earlier = publish(first, registry)
    later = publish(second, registry)
    withdraw(earlier, registry)  # long replaced: the second must not vanish
    assert scrape(registry)[f"{PREFIX}decode_steps_total"] == 2
    withdraw(later, registry)
    withdraw(later, registry)
    assert scrape(registry) == {}
    publish(first, registry)
    assert scrape(registry)[f"{PREFIX}decode_steps_total"] == 1
