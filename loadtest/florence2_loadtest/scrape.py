"""The servers' side of a level: their own metrics, read before and after it.

Of our servers that is Prometheus' text at ``/metrics``; of others, such as Triton, whose metrics are called
otherwise, the statistics extension at ``/v2/models/NAME/stats``, which tells the same of requests and their
phases. Several replicas are summed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample as MetricSample
from yarl import URL

from florence2_kserve.urls import public_url
from florence2_loadtest.results import ServerSide

# In the order in which they are believed about requests: the first that is there is the one that clients ask.
TRANSFORMER, SERVER, PREDICTOR = "transformer", "server", "predictor"
_ENGINE, _RETRIES = "florence2_engine_", "florence2_transformer_predictor_retries"
_REQUESTS, _REQUEST_SECONDS = "florence2_requests_total", "florence2_request_seconds_total"
_PHASE_SECONDS = "florence2_request_phase_seconds_total"
_CPU, _STARTED = "process_cpu_seconds_total", "process_start_time_seconds"
_PHASES = ("queue", "compute_input", "compute_infer", "compute_output")
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One server at one moment.

    Attributes:
        source: What was read.
        component: ``transformer``, ``predictor``, or ``server`` where statistics alone were to be had.
        counters: What only grows, by name and labels.
        gauges: What goes up and down.
        started: When its process started, in Unix time; None where it doesn't tell.
    """

    source: str
    component: str
    counters: Mapping[str, float]
    gauges: Mapping[str, float]
    started: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All servers at one moment.

    Attributes:
        at_s: By the monotonic clock.
        readings: By URL as given.
        problems: By URL: why it couldn't be read.
    """

    at_s: float
    readings: Mapping[str, Reading] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)


class Scraper:
    """Reads servers' metrics.

    Args:
        urls: Of servers (``http://HOST:PORT``: metrics, or else statistics), of their metrics, or of their statistics.
        model_name: Whose metrics and statistics count.
        headers: Sent along.
    """

    def __init__(
        self, urls: Sequence[str], *, model_name: str = "florence2", headers: Mapping[str, str] | None = None
    ) -> None:
        self._urls, self._model_name, self._headers = list(dict.fromkeys(urls)), model_name, dict(headers or {})

    async def scrape(self) -> Snapshot:
        """Reads all servers at once; what can't be read is among the snapshot's problems."""
        return await self._scrape(self._urls)

    @asynccontextmanager
    async def sampling(self, every_s: float = 1.0) -> AsyncIterator[list[Snapshot]]:
        """Reads, while the context lasts, those servers that have gauges; the list grows meanwhile."""
        samples: list[Snapshot] = []

        async def sample() -> None:
            urls = self._urls
            while True:
                samples.append(await self._scrape(urls))
                urls = [url for url, reading in samples[-1].readings.items() if reading.gauges] or urls
                await asyncio.sleep(every_s)

        task = asyncio.create_task(sample())
        try:
            yield samples
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _scrape(self, urls: Sequence[str]) -> Snapshot:
        at_s = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session:
            read = await asyncio.gather(*(self._read(session, url) for url in urls))
        readings = {url: reading for url, reading in zip(urls, read, strict=True) if isinstance(reading, Reading)}
        problems = {url: problem for url, problem in zip(urls, read, strict=True) if isinstance(problem, str)}
        return Snapshot(at_s, readings, problems)

    async def _read(self, session: aiohttp.ClientSession, text: str) -> Reading | str:
        """Returns what a server tells, or why it couldn't be read."""
        try:
            url, path = URL(text), URL(text).path
            if path.endswith("/stats"):
                return await _read_statistics(session, url.with_path(path.partition("/v2/")[0]), self._model_name)
            metrics = url if path != "/" else url / "metrics"
            try:
                reading = _read_metrics(await _get(session, metrics), self._model_name, str(metrics))
            except aiohttp.ClientResponseError:  # it has no metrics there, but may have statistics
                reading = None
            return reading or await _read_statistics(session, url.origin(), self._model_name)
        except aiohttp.ClientResponseError as error:
            return f"HTTP {error.status} at {public_url(str(error.request_info.url))}"
        except TimeoutError:
            return f"no answer within {_TIMEOUT_S:g} s"
        except (aiohttp.ClientError, ValueError) as error:
            return str(error).replace(text, public_url(text)) or type(error).__name__


def difference(
    before: Snapshot,
    after: Snapshot,
    seconds: float | None = None,
    *,
    samples: Sequence[Snapshot] = (),
    say: Callable[[str], None] = print,
) -> ServerSide:
    """Returns what happened between two snapshots.

    A server that couldn't be read, or began to count anew meanwhile, is left out of it, and that is said.

    Args:
        before: The first.
        after: The second.
        seconds: Between them; None takes it from the snapshots.
        samples: Snapshots in between, for means and maxima of gauges: ``NAME_mean`` and ``NAME_max`` among counters.
        say: Gets a line for each server that is left out.
    """
    elapsed_s = after.at_s - before.at_s if seconds is None else seconds
    grown: Counter[str] = Counter()
    counted: list[Reading] = []
    problems: dict[str, str] = {}
    for url in dict.fromkeys((*before.readings, *before.problems, *after.readings, *after.problems)):
        first, last = before.readings.get(url), after.readings.get(url)
        if first is None or last is None:
            problems[url] = str(before.problems.get(url) or after.problems.get(url))
        elif _has_begun_anew(first, last):
            problems[url] = "it was restarted, or another server answers there now"
        else:
            grown.update({name: value - first.counters.get(name, 0.0) for name, value in last.counters.items()})
            counted.append(last)
    lines = [f"{public_url(url)} is left out of the server's figures: {reason}" for url, reason in problems.items()]
    for line in lines:
        say(line)
    seen = {reading.component for snapshot in (before, after) for reading in snapshot.readings.values()}
    asked = next((component for component in (TRANSFORMER, SERVER, PREDICTOR) if component in seen), None)
    side = ServerSide(
        sources=[reading.source for reading in counted],
        counters=dict(sorted(grown.items())) | _gauges(samples),
        problems=lines,
    )
    if asked in {reading.component for reading in counted}:
        _tell_requests(side, grown, str(asked))
    engines = sum(reading.component == PREDICTOR for reading in counted)
    if engines:
        _tell_engines(side, grown, engines * elapsed_s, elapsed_s)
    return side


def _tell_requests(side: ServerSide, grown: Mapping[str, float], component: str) -> None:
    def count(outcome: str) -> float:
        return grown.get(_series(_REQUESTS, component, outcome=outcome), 0.0)

    def mean(name: str, **labels: str) -> float | None:
        return _ratio(grown.get(_series(name, component, **labels)), count("success"))

    side.requests, side.failures = round(count("success") + count("fail")), round(count("fail"))
    side.request_s = mean(_REQUEST_SECONDS, outcome="success")
    side.queue_s, side.preprocess_s, side.generate_s, side.postprocess_s = (
        mean(_PHASE_SECONDS, phase=phase) for phase in _PHASES
    )


def _tell_engines(side: ServerSide, grown: Mapping[str, float], engine_s: float, elapsed_s: float) -> None:
    def of(name: str) -> float:
        return grown.get(_ENGINE + name, 0.0)

    def mean(name: str) -> float | None:
        return _ratio(of(f"{name}_sum"), of(f"{name}_count"))

    images, tokens = of("images_encoded_total"), of("generated_tokens_total")
    hits, misses = of("feature_cache_hits_total"), of("feature_cache_misses_total")
    side.vision_batch_s, side.prefill_s = mean("vision_seconds"), mean("prefill_seconds")
    side.decode_step_s, side.batch_rows = mean("decode_step_seconds"), mean("batch_rows")
    side.vision_batch_images = _ratio(images, of("vision_batches_total"))
    side.useful_rows_share = _ratio(of("useful_row_steps_total"), of("row_steps_total"))
    side.cache_hits_share = _ratio(hits, hits + misses)
    side.images_encoded, side.tokens = round(images), round(tokens)
    side.tokens_per_s = _ratio(tokens, elapsed_s)
    side.vision_busy_share, side.prefill_busy_share, side.decode_busy_share = (
        _ratio(of(f"{name}_seconds_sum"), engine_s) for name in ("vision", "prefill", "decode_step")
    )


def _has_begun_anew(first: Reading, last: Reading) -> bool:
    fell = any(value < first.counters.get(name, 0.0) for name, value in last.counters.items())
    return fell or first.started != last.started or first.component != last.component


def _gauges(samples: Sequence[Snapshot]) -> dict[str, float]:
    """Returns means and maxima over samples of what all servers' gauges say together."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        together: Counter[str] = Counter()
        for reading in sample.readings.values():
            together.update(reading.gauges)
        for name, value in together.items():
            values.setdefault(name, []).append(value)
    means = {f"{name}_mean": sum(given) / len(given) for name, given in values.items()}
    return means | {f"{name}_max": max(given) for name, given in values.items()}


async def _get(session: aiohttp.ClientSession, url: URL) -> str:
    async with session.get(url, raise_for_status=True) as response:
        return await response.text()


def _read_metrics(text: str, model_name: str, source: str) -> Reading | None:
    """Reads Prometheus' text; None if it isn't of one of our servers."""
    component = PREDICTOR if _ENGINE in text else TRANSFORMER if _RETRIES in text else None
    if component is None:
        return None
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    started: float | None = None
    for kind, sample in _samples(text, source):
        name = sample.name
        if name == _STARTED:
            started = sample.value
        elif sample.labels.get("model", model_name) != model_name or name.endswith("_created"):
            continue
        elif kind == "gauge":
            gauges |= {name: sample.value} if name.startswith(_ENGINE) else {}
        else:
            labels = {label: value for label, value in sample.labels.items() if label != "model"}
            counters[_series(name, component, **labels)] = sample.value
    return Reading(source, component, counters, gauges, started)


def _samples(text: str, source: str) -> Iterator[tuple[str, MetricSample]]:
    """Yields the samples that matter, with their metrics' kinds."""
    # Most of the text is buckets, and parsing takes the load generator's time.
    wanted = "\n".join(
        line
        for line in text.splitlines()
        if ("florence2_" in line or "process_" in line) and "_bucket{" not in line and not line.startswith("# HELP")
    )
    try:
        families = list(text_string_to_metric_families(wanted + "\n"))
    except (LookupError, TypeError, ValueError) as error:  # the parser's, of what it doesn't expect
        raise ValueError(f"{public_url(source)}: not metrics: {type(error).__name__}: {error}") from None
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("florence2_") or sample.name in (_CPU, _STARTED):
                yield family.type, sample


async def _read_statistics(session: aiohttp.ClientSession, server: URL, model_name: str) -> Reading:
    """Reads the statistics extension, under the names that our metrics have.

    Raises:
        ValueError: If it isn't that.
    """
    models = server / "v2/models"
    counters = await _statistics(session, models, model_name)
    # An ensemble's statistics sum up what its models computed, but not how long requests waited for them.
    queue = _series(_PHASE_SECONDS, SERVER, phase="queue")
    for step in await _ensemble(session, models, model_name):
        counters[queue] += (await _statistics(session, models, step))[queue]
    return Reading(str(models / model_name / "stats"), SERVER, counters, {})


async def _statistics(session: aiohttp.ClientSession, models: URL, name: str) -> dict[str, float]:
    url = models / name / "stats"
    text = await _get(session, url)
    try:
        versions = [entry["inference_stats"] for entry in orjson.loads(text)["model_stats"] if entry["name"] == name]
        counted = [_count_statistics(stats) for stats in versions]
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(url, "the statistics of a model", error) from None
    if not counted:
        raise ValueError(f"{public_url(str(url))}: tells nothing of {name}")
    return {series: sum(counters[series] for counters in counted) for series in counted[0]}


async def _ensemble(session: aiohttp.ClientSession, models: URL, name: str) -> list[str]:
    """Returns the models that an ensemble is made of; none if it isn't one, or doesn't tell."""
    url = models / name / "config"
    try:
        config = orjson.loads(await _get(session, url))
    except (aiohttp.ClientResponseError, orjson.JSONDecodeError):
        return []
    try:
        steps = (config.get("ensemble_scheduling") or {}).get("step") or []
        return list(dict.fromkeys(str(step["model_name"]) for step in steps))
    except (AttributeError, KeyError, TypeError) as error:
        raise _unreadable(url, "the configuration of a model", error) from None


def _unreadable(url: URL, what: str, error: Exception) -> ValueError:
    return ValueError(f"{public_url(str(url))}: not {what}: {type(error).__name__}: {error}")


def _count_statistics(stats: Mapping[str, Any]) -> dict[str, float]:
    counters: dict[str, float] = {}
    for outcome in ("success", "fail"):
        counters[_series(_REQUESTS, SERVER, outcome=outcome)] = float(stats[outcome]["count"])
        counters[_series(_REQUEST_SECONDS, SERVER, outcome=outcome)] = stats[outcome]["ns"] / 1e9
    for phase in _PHASES:
        counters[_series(_PHASE_SECONDS, SERVER, phase=phase)] = stats[phase]["ns"] / 1e9
    return counters


def _series(name: str, component: str, **labels: str) -> str:
    """Returns a series' name; what both components have is told apart by a label."""
    if not name.startswith((_ENGINE, _RETRIES)):
        labels["component"] = component
    inner = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{inner}}}" if inner else name


def _ratio(numerator: float | None, denominator: float) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator
