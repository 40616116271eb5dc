"""A scenario's levels, and what is kept of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from florence2_loadtest.measure import describe_target, measure
from florence2_loadtest.results import Level, Record, RunResult, Target
from florence2_loadtest.scenario import ClosedLoad, MixItem, Pictures, Scenario
from tests.loadtest.fake_server import FakeServer

TWO_LEVELS = ClosedLoad(concurrency=[1, 2], warmup_s=0, window_s=0.2, max_windows=1)


def asked(**fields: Any) -> Scenario:
    return Scenario(**{"pictures": Pictures(scenes=1, width=64, height=64), "load": TWO_LEVELS, **fields})


def measured(scenario: Scenario, **options: Any) -> tuple[RunResult, dict[str, list[Record]]]:
    with FakeServer(lambda number: 0.005).serve() as url:
        return asyncio.run(measure(Target(url=url, model=None), scenario, say=lambda line: None, **options))


def test_requests_are_kept_where_nobody_takes_them() -> None:
    result, records = measured(asked())
    assert {name: len(of) for name, of in records.items()} == {level.name: level.answered for level in result.levels}


def test_requests_are_not_kept_where_somebody_takes_them() -> None:
    taken: list[tuple[str, int]] = []

    def take(result: RunResult, level: Level, records: list[Record]) -> None:
        taken.append((level.name, len(records)))

    result, records = measured(asked(), on_level=take)
    assert records == {}
    assert taken == [(level.name, level.answered) for level in result.levels]


def test_every_request_is_passed_on_while_its_level_is_measured() -> None:
    events: list[str] = []
    result, _ = measured(
        asked(),
        on_level=lambda result, level, records: events.append(f"{level.name} is over"),
        on_record=lambda level, record: events.append(level),
    )
    for level in result.levels:
        of = [number for number, event in enumerate(events) if event == level.name]
        assert len(of) >= level.answered > 0
        assert of[level.answered - 1] < events.index(f"{level.name} is over")


def test_what_goes_wrong_in_a_level_is_said_with_its_name() -> None:
    def fail(level: str, record: Record) -> None:
        raise OSError("no space left")

    with pytest.raises(RuntimeError, match=r"^concurrency 1: OSError: no space left$"):
        measured(asked(), on_record=fail)


def test_a_level_of_one_task_is_not_judged_by_the_slos_of_others() -> None:
    mix = [MixItem(task=task, slo="p95<50s") for task in ("CAPTION", "OD")]
    result, _ = measured(asked(mix=mix, separately=True))
    assert [list(level.tasks) for level in result.levels] == [["<CAPTION>"]] * 2 + [["<OD>"]] * 2
    assert all(task.slo_met for level in result.levels for task in level.tasks.values())


def test_a_target_is_recorded_without_its_secrets_and_asked_with_them() -> None:
    server = FakeServer(lambda number: 0.005)
    with server.serve() as url:
        target = Target(url=url.replace("http://", "http://user:s3cret@"), model=None)
        result, _ = asyncio.run(measure(target, asked(), say=lambda line: None))
    assert all(headers["authorization"].startswith("Basic ") for headers in server.headers)
    assert "s3cret" not in result.model_dump_json()
    assert RunResult.model_validate(result.model_dump()).target.url == url


@pytest.mark.parametrize("metadata", [[], 7, {"properties": [1]}, {"properties": {"model": 7, "revision": ["x"]}}])
def test_odd_metadata_tell_nothing(metadata: Any) -> None:
    async def tell(request: web.Request) -> web.Response:
        return web.json_response(metadata)

    async def ask() -> Target:
        app = web.Application()
        app.router.add_get("/v2/models/florence2", tell)
        async with TestServer(app) as server:
            return await describe_target(Target(url=f"http://127.0.0.1:{server.port}", model="mine"), {}, 5.0)

    target = asyncio.run(ask())
    assert (target.model, target.revision) == ("mine", None)
