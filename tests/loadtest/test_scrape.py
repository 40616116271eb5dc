"""What servers' metrics and statistics say of the time between two readings of them."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from florence2_kserve.client import ClientError, Florence2Client
from florence2_kserve.engine.metrics import EngineMetrics
from florence2_kserve.local import LocalService
from florence2_kserve.metrics import publish
from florence2_kserve.tiny.scenes import held_out_scene
from florence2_loadtest.results import ServerSide
from florence2_loadtest.scrape import Scraper, Snapshot, difference

STARTED = 1_700_000_000.0
TRITONS_METRICS = '# TYPE nv_inference_count counter\nnv_inference_count{model="florence2",version="1"} 7\n'


@dataclass
class Process:
    """What one of our servers shows at /metrics."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        def counter(name: str, *labels: str) -> Counter:
            return Counter(name, "Of a test.", labels, registry=self.registry)

        self.started = Gauge("process_start_time_seconds", "Of a test.", registry=self.registry)
        self.cpu = counter("process_cpu_seconds")
        self.requests = counter("florence2_requests", "model", "outcome")
        self.seconds = counter("florence2_request_seconds", "model", "outcome")
        self.phases = counter("florence2_request_phase_seconds", "model", "phase")
        self.started.set(STARTED)

    def answer(self, seconds: float, *, model: str = "florence2", outcome: str = "success", **phases: float) -> None:
        self.requests.labels(model, outcome).inc()
        self.seconds.labels(model, outcome).inc(seconds)
        for phase, time_s in phases.items():
            self.phases.labels(model, phase).inc(time_s)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Predictor(Process):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.engine = EngineMetrics()
        publish(self.engine, self.registry)


class Transformer(Process):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.retries = Counter("florence2_transformer_predictor_retries", "Of a test.", registry=self.registry)


@asynccontextmanager
async def serving(*processes: Process) -> AsyncIterator[list[str]]:
    """Serves the processes' metrics and yields their URLs."""

    def handler(process: Process) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(body=process.text(), content_type="text/plain")

        return answer

    servers = []
    for process in processes:
        app = web.Application()
        app.router.add_get("/metrics", handler(process))
        servers.append(TestServer(app))
    try:
        for server in servers:
            await server.start_server()
        yield [f"http://127.0.0.1:{server.port}" for server in servers]
    finally:
        for server in servers:
            await server.close()


def between(do: Callable[[], None], *processes: Process, seconds: float = 2.0) -> tuple[ServerSide, list[str]]:
    """Returns what scrapes before and after `do` show, and what was said about them."""
    said: list[str] = []

    async def scrape() -> ServerSide:
        async with serving(*processes) as urls:
            scraper = Scraper(urls)
            before = await scraper.scrape()
            do()
            return difference(before, await scraper.scrape(), seconds, say=said.append)

    return asyncio.run(scrape()), said


def work(predictor: Predictor, scale: int = 1) -> None:
    engine = predictor.engine
    engine.images_encoded.add(6 * scale)
    engine.vision_batches.add(2 * scale)
    engine.generated_tokens.add(100 * scale)
    engine.decode_steps.add(4 * scale)
    engine.row_steps.add(40 * scale)
    engine.useful_row_steps.add(30 * scale)
    engine.feature_cache_hits.add(2 * scale)
    engine.feature_cache_misses.add(6 * scale)
    for _ in range(2 * scale):
        engine.vision_seconds.observe(0.2)
        engine.prefill_seconds.observe(0.05)
    for rows in (6, 14) * 2 * scale:
        engine.decode_step_seconds.observe(0.1)
        engine.batch_rows.observe(rows)


def test_what_an_engine_did_between_two_scrapes():
    predictor = Predictor()
    work(predictor, 5)  # before the first of them
    side, said = between(lambda: work(predictor), predictor)
    told = side.model_dump(exclude={"sources", "counters", "problems"}, exclude_none=True)
    assert told == pytest.approx(
        {
            "requests": 0,
            "failures": 0,
            "vision_batch_s": 0.2,
            "vision_batch_images": 3.0,
            "prefill_s": 0.05,
            "decode_step_s": 0.1,
            "batch_rows": 10.0,
            "useful_rows_share": 0.75,
            "cache_hits_share": 0.25,
            "images_encoded": 6,
            "tokens": 100,
            "tokens_per_s": 50.0,
            "vision_busy_share": 0.2,
            "prefill_busy_share": 0.05,
            "decode_busy_share": 0.2,
        }
    )
    assert side.counters["florence2_engine_row_steps_total"] == 40
    assert side.counters["florence2_engine_vision_seconds_count"] == 2
    assert not [name for name in side.counters if "bucket" in name or "created" in name or "gc_" in name]
    assert said == []


def test_replicas_are_summed_and_their_shares_are_of_all_of_them():
    predictors = Predictor(), Predictor()

    def do() -> None:
        work(predictors[0])
        work(predictors[1], 3)

    side, said = between(do, *predictors)
    assert (side.images_encoded, side.tokens, side.tokens_per_s) == (24, 400, 200.0)
    assert side.vision_busy_share == pytest.approx(4 * 0.4 / (2 * 2.0))
    assert side.decode_step_s == pytest.approx(0.1)
    assert (len(side.sources), said) == (2, [])


def test_requests_are_those_of_the_transformer_and_phases_of_its_answered_ones():
    transformer, predictor = Transformer(), Predictor()

    def do() -> None:
        for _ in range(3):
            transformer.answer(0.8, queue=0.1, compute_input=0.02, compute_infer=0.5, compute_output=0.01)
            predictor.answer(0.7, queue=0.1, compute_infer=0.5)
        transformer.answer(9.0, outcome="fail")  # the first failure: until now there was no such series
        transformer.answer(5.0, model="another")
        predictor.answer(0.7)
        transformer.retries.inc(2)
        transformer.cpu.inc(0.5)
        predictor.cpu.inc(1.5)

    for servers in ((transformer, predictor), (predictor, transformer)):
        side, _ = between(do, *servers)
        assert (side.requests, side.failures) == (4, 1)
        assert side.request_s == pytest.approx(0.8)
        phases = (side.queue_s, side.preprocess_s, side.generate_s, side.postprocess_s)
        assert phases == pytest.approx((0.1, 0.02, 0.5, 0.01))
        assert side.counters['florence2_requests_total{component="predictor",outcome="success"}'] == 4
        assert side.counters["florence2_transformer_predictor_retries_total"] == 2
        assert side.counters['process_cpu_seconds_total{component="transformer"}'] == 0.5
        assert side.counters['process_cpu_seconds_total{component="predictor"}'] == 1.5
    side, _ = between(do, predictor)
    assert (side.requests, side.queue_s, side.request_s) == (4, pytest.approx(0.075), pytest.approx(0.7))


def test_where_nothing_was_answered_no_mean_is_told():
    transformer = Transformer()
    side, _ = between(lambda: transformer.answer(9.0, outcome="fail"), transformer)
    assert (side.requests, side.failures, side.request_s, side.queue_s) == (1, 1, None, None)


def test_a_restarted_server_is_left_out_and_said():
    old, steady, new = Predictor(), Predictor(), Predictor()
    work(old, 2)

    def restart() -> None:
        old.registry = new.registry
        work(new, 3)
        work(steady)

    new.started.set(STARTED + 100)
    side, said = between(restart, old, steady)
    assert (side.tokens, len(side.sources)) == (100, 1)
    (line,) = said
    assert "left out" in line
    assert "restarted" in line


def test_a_restart_shows_in_falling_counters_where_no_start_is_told():
    old, new = Predictor(), Predictor()
    work(old, 2)
    for process in (old, new):
        process.registry.unregister(process.started)

    def restart() -> None:
        old.registry = new.registry
        work(new)

    side, said = between(restart, old)
    assert (side.tokens, side.requests, side.counters, side.sources) == (None, None, {}, [])
    assert "restarted" in said[0]


def test_when_the_transformer_is_left_out_the_predictor_does_not_speak_for_it():
    transformer, new, predictor = Transformer(), Transformer(), Predictor()
    new.started.set(STARTED + 100)

    def restart() -> None:
        transformer.registry = new.registry
        predictor.answer(0.5)
        work(predictor)

    side, said = between(restart, transformer, predictor)
    assert (side.requests, side.request_s, side.tokens, len(said)) == (None, None, 100, 1)


def test_what_cannot_be_scraped_is_said_and_fails_nothing():
    predictor = Predictor()
    closed = f"http://127.0.0.1:{unused_port()}"

    async def scrape() -> tuple[ServerSide, list[str]]:
        said: list[str] = []
        async with serving(predictor) as urls:
            wrong = f"{urls[0]}/no-metrics"
            scraper = Scraper([*urls, *urls, closed, "not a URL", wrong])
            before = await scraper.scrape()
            work(predictor)
            return difference(before, await scraper.scrape(), say=said.append), said

    side, said = asyncio.run(scrape())
    assert side.tokens == 100  # once, though its URL was given twice
    assert len(said) == 3
    assert said[0].startswith(f"{closed} is left out")
    assert said[1].startswith("not a URL is left out")
    assert "HTTP 404 at" in said[2]


def statistics(count: int, fail: int = 0, name: str = "florence2") -> dict[str, Any]:
    """Returns what Triton tells of a model that took 0.5 s a request."""
    phases = {"queue": 0.1, "compute_input": 0.02, "compute_infer": 0.3, "compute_output": 0.01}
    stats = {"success": {"count": count, "ns": count * 500_000_000}, "fail": {"count": fail, "ns": fail * 1000}}
    stats |= {phase: {"count": count, "ns": int(count * seconds * 1e9)} for phase, seconds in phases.items()}
    return {"name": name, "version": "1", "inference_stats": stats, "batch_stats": []}


@pytest.mark.parametrize("metrics", [None, TRITONS_METRICS], ids=["without metrics", "with its own metrics"])
@pytest.mark.parametrize("suffix", ["", "/metrics", "/v2/models/florence2/stats"])
def test_a_triton_is_read_by_its_statistics(metrics, suffix):
    told = {"model_stats": [statistics(5), statistics(100, name="florence2_model")]}
    said: list[str] = []

    async def stats(request: web.Request) -> web.Response:
        return web.json_response(told)

    async def own_metrics(request: web.Request) -> web.Response:
        return web.Response(text=metrics)

    async def scrape() -> tuple[ServerSide, ServerSide]:
        app = web.Application()
        app.router.add_get("/v2/models/{name}/stats", stats)
        if metrics is not None:
            app.router.add_get("/metrics", own_metrics)
        async with TestServer(app) as server:
            scraper = Scraper([f"http://127.0.0.1:{server.port}{suffix}"])
            before = await scraper.scrape()
            told["model_stats"] = [statistics(9, fail=2), statistics(110, name="florence2_model")]
            side = difference(before, await scraper.scrape(), say=said.append)
            told["model_stats"] = [statistics(110, name="florence2_model")]
            return side, difference(before, await scraper.scrape(), say=said.append)

    side, gone = asyncio.run(scrape())
    assert (side.requests, side.failures) == (6, 2)
    figures = (side.request_s, side.queue_s, side.preprocess_s, side.generate_s, side.postprocess_s)
    assert figures == pytest.approx((0.5, 0.1, 0.02, 0.3, 0.01))
    assert (side.tokens, side.batch_rows) == (None, None)
    assert side.sources[0].endswith("/v2/models/florence2/stats")
    assert gone.requests is None
    assert "tells nothing of florence2" in said[0]


def test_the_queue_of_an_ensemble_is_that_of_its_models():
    counts = {"florence2": 0, "florence2_process": 0, "florence2_model": 0}

    async def stats(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return web.json_response({"model_stats": [statistics(counts[name], name=name)]})

    async def config(request: web.Request) -> web.Response:
        steps = [{"model_name": name} for name in counts if name != "florence2"]
        return web.json_response({"name": "florence2", "ensemble_scheduling": {"step": [*steps, steps[0]]}})

    async def scrape() -> ServerSide:
        app = web.Application()
        app.router.add_get("/v2/models/{name}/stats", stats)
        app.router.add_get("/v2/models/florence2/config", config)
        async with TestServer(app) as server:
            scraper = Scraper([f"http://127.0.0.1:{server.port}"])
            before = await scraper.scrape()
            counts.update(florence2=2, florence2_process=4, florence2_model=2)
            return difference(before, await scraper.scrape())

    side = asyncio.run(scrape())
    assert side.requests == 2
    assert side.queue_s == pytest.approx((2 + 4 + 2) * 0.1 / 2)
    assert side.generate_s == pytest.approx(0.3)


ODD = [[], {}, "text", None, 7, {"model_stats": [7]}, {"model_stats": [{"name": "florence2"}]}]
ODD_COUNT = statistics(1)
ODD_COUNT["inference_stats"]["success"]["count"] = [1]
ODD_CONFIGS = [[], 7, "text", None, {"ensemble_scheduling": [1]}, {"ensemble_scheduling": {"step": [{}]}}]
ODD_METRICS = ['florence2_engine_x{a="b" 7\n', "florence2_engine_x{}{}{} = ?\n", "florence2_engine_x seven\n"]


@pytest.mark.parametrize(
    ("metrics", "stats", "config"),
    [
        *((None, odd, {}) for odd in [*ODD, {"model_stats": [ODD_COUNT]}]),
        *((None, {"model_stats": [statistics(1)]}, odd) for odd in ODD_CONFIGS),
        *((odd, {}, {}) for odd in ODD_METRICS),
    ],
)
def test_an_odd_server_is_a_problem_of_its_url_alone(metrics, stats, config):
    async def own_metrics(request: web.Request) -> web.Response:
        return web.Response(text=metrics, status=200 if metrics else 404)

    async def tell(request: web.Request) -> web.Response:
        return web.json_response(stats if request.path.endswith("/stats") else config)

    async def scrape() -> Snapshot:
        app = web.Application()
        app.router.add_get("/metrics", own_metrics)
        app.router.add_get("/v2/models/florence2/{what}", tell)
        async with TestServer(app) as odd, serving(Predictor()) as urls:
            return await Scraper([f"http://127.0.0.1:{odd.port}", *urls]).scrape()

    snapshot = asyncio.run(scrape())
    (problem,) = snapshot.problems.values()
    assert ": not " in problem
    assert len(snapshot.readings) == 1


def test_no_secret_of_a_url_is_recorded():
    predictor = Predictor()
    said: list[str] = []

    async def scrape() -> ServerSide:
        async with serving(predictor) as urls:
            secret = urls[0].replace("http://", "http://user:s3cret@")
            scraper = Scraper([f"{secret}/metrics?token=s3cret", f"{secret}/nowhere?token=s3cret", "x:s3cret@y"])
            before = await scraper.scrape()
            return difference(before, await scraper.scrape(), say=said.append)

    side = asyncio.run(scrape())
    assert len(side.sources) == 1
    assert len(side.problems) == 2
    assert "s3cret" not in side.model_dump_json() + " ".join(said)


def test_samples_in_between_tell_means_and_maxima_of_gauges():
    predictors = Predictor(), Predictor()

    async def more_than(samples: list[Snapshot], count: int) -> None:
        async with asyncio.timeout(20):
            while len(samples) <= count:
                await asyncio.sleep(0.005)

    async def scrape() -> tuple[ServerSide, list[Snapshot]]:
        async with serving(*predictors, Transformer()) as urls:
            scraper = Scraper(urls)
            before = await scraper.scrape()
            async with scraper.sampling(every_s=0.01) as samples:
                for waiting in (1, 5):
                    predictors[0].engine.requests_waiting.set(waiting)
                    predictors[1].engine.requests_waiting.set(2 * waiting)
                    await more_than(samples, len(samples) + 1)
            after, taken = await scraper.scrape(), len(samples)
            await asyncio.sleep(0.05)
            assert len(samples) == taken  # it ends with its context
            return difference(before, after, samples=samples), samples

    side, samples = asyncio.run(scrape())
    assert side.counters["florence2_engine_requests_waiting_max"] == 15
    assert 0 < side.counters["florence2_engine_requests_waiting_mean"] < 15
    assert side.counters["florence2_engine_rows_running_mean"] == 0
    assert {len(sample.readings) for sample in samples[1:]} == {2}  # a transformer has no gauges


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[LocalService, LocalService]]:
    """Transformer and predictor, each where its metrics can be read."""
    with (
        LocalService("predictor") as predictor,
        LocalService("transformer", predictor_host=predictor.grpc_url) as transformer,
    ):
        yield transformer, predictor


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(held_out_scene(number).image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_the_real_services_metrics_are_of_what_was_sent(both):
    transformer, predictor = both
    statistics_url = f"{transformer.rest_url}/v2/models/florence2/stats"
    urls = [transformer.rest_url, predictor.rest_url, statistics_url]
    sent, waited_s = 4, 0.0
    before = {url: asyncio.run(Scraper([url]).scrape()) for url in urls}
    both_before = asyncio.run(Scraper(urls[:2]).scrape())
    with Florence2Client(transformer.rest_url) as client:
        for number in range(sent):
            started = time.monotonic()
            client.infer(png(number % 2), "<CAPTION>", max_new_tokens=6)
            waited_s += time.monotonic() - started
        with pytest.raises(ClientError):
            client.infer(png(0), "<REGION_TO_OCR>")
    said: list[str] = []
    side = difference(both_before, asyncio.run(Scraper(urls[:2]).scrape()), say=said.append)
    assert said == []
    assert side.sources == [f"{url}/metrics" for url in urls[:2]]
    assert (side.requests, side.failures) == (sent + 1, 1)
    phases = [side.queue_s, side.preprocess_s, side.generate_s, side.postprocess_s]
    assert all(phase is not None and phase > 0 for phase in phases)
    assert sum(phases) <= side.request_s <= waited_s / sent
    assert (side.images_encoded, side.cache_hits_share) == (2, 0.5)
    assert 0 < side.tokens <= 6 * sent
    assert side.useful_rows_share == 1.0
    assert 1 <= side.batch_rows <= 3  # beams of the one request at a time
    assert side.vision_batch_images == 1.0
    busy = side.vision_busy_share + side.prefill_busy_share + side.decode_busy_share
    assert 0 < busy <= 1.0
    engine = {name: value for name, value in side.counters.items() if name.startswith("florence2_engine_")}
    assert engine["florence2_engine_requests_submitted_total"] == sent
    assert side.counters["florence2_transformer_predictor_retries_total"] == 0
    assert side.counters['process_cpu_seconds_total{component="predictor"}'] > 0
    by_statistics = difference(before[statistics_url], asyncio.run(Scraper([statistics_url]).scrape()))
    for name in ("requests", "failures", "request_s", "queue_s", "preprocess_s", "generate_s", "postprocess_s"):
        assert getattr(by_statistics, name) == pytest.approx(getattr(side, name)), name
    alone = difference(before[predictor.rest_url], asyncio.run(Scraper([predictor.rest_url]).scrape()))
    assert (alone.requests, alone.failures, alone.tokens) == (sent, 0, side.tokens)
    assert alone.queue_s + alone.generate_s <= alone.request_s <= side.request_s


@pytest.mark.slow
def test_a_real_restart_between_two_scrapes_is_noticed(both):
    _, predictor = both
    said: list[str] = []
    with LocalService("transformer", predictor_host=predictor.grpc_url) as transformer:
        scraper = Scraper([transformer.rest_url, predictor.rest_url])
        before = asyncio.run(scraper.scrape())
    with LocalService("transformer", predictor_host=predictor.grpc_url, http_port=transformer.http_port):
        side = difference(before, asyncio.run(scraper.scrape()), say=said.append)
    assert (side.requests, side.tokens, len(said)) == (None, 0, 1)
    assert f"{transformer.rest_url} is left out" in said[0]
