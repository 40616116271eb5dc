"""Streams of jobs: lazy, bounded, in order or as they complete, and gone without a trace when they are left."""

from __future__ import annotations

import asyncio
import gc
import itertools
import socket
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from florence2_kserve.client import (
    AsyncFlorence2Client,
    Caption,
    Detections,
    Florence2Client,
    InvalidRequestError,
    Job,
    Outcome,
)
from tests.client.pictures import png
from tests.client.servers import FULL, LOADING, WRONG, Fault, http_server


def numbers(count: int | None = None) -> Iterator[Job]:
    """Yields jobs whose images, and captions, are numbers, without end where there is no count."""
    for number in itertools.count() if count is None else range(count):
        yield Job(str(number).encode(), key=number)


def keys(outcomes: list[Outcome]) -> list[int]:
    return [outcome.job.key for outcome in outcomes]


def set_when(event: threading.Event, condition: Callable[[], bool]) -> None:
    """Sets `event`, from another thread, as soon as `condition` holds."""

    def watch() -> None:
        while not condition() and not event.wait(0.005):
            pass
        event.set()

    threading.Thread(target=watch, daemon=True).start()


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("florence2-stream")]


@pytest.mark.parametrize("ordered", [True, False])
def test_every_job_has_its_outcome(open_client, small_server, ordered):
    with open_client(small_server) as client:
        outcomes = list(client.stream(numbers(50), concurrency=4, ordered=ordered))
    assert sorted(keys(outcomes)) == list(range(50))
    assert all(outcome.answer.text == str(outcome.job.key) for outcome in outcomes)
    assert all(outcome.error is None and outcome.seconds > 0 for outcome in outcomes)
    assert keys(outcomes) == list(range(50)) or not ordered


@pytest.mark.parametrize("concurrency", [1, 5])
def test_no_more_than_so_many_are_in_flight(open_client, small_server, behaviour, concurrency):
    behaviour.seconds = 0.02
    with open_client(small_server) as client:
        assert len(list(client.stream(numbers(30), concurrency=concurrency))) == 30
    assert behaviour.most_in_flight == concurrency


def test_no_more_than_so_many_are_taken_ahead(open_client, small_server, behaviour):
    taken = handed_out = most = 0

    def counted() -> Iterator[Job]:
        nonlocal taken, most
        for job in numbers(40):
            taken += 1
            most = max(most, taken - handed_out)
            yield job

    event = behaviour.hold(b"0")
    with open_client(small_server) as client:
        for outcome in client.stream(counted(), concurrency=3):
            if outcome.job.key == 20:
                event.set()
            handed_out += 1
    assert (taken, handed_out) == (40, 40)
    # The outcome in the loop's hands isn't counted as handed out yet.
    assert 3 < most <= 2 * 3 + 1


def test_a_slow_job_holds_no_other_up(open_client, small_server, behaviour):
    event = behaviour.hold(b"0")
    order = []
    with open_client(small_server) as client:
        for outcome in client.stream(numbers(12), concurrency=2):
            order.append(outcome.job.key)
            if len(order) == 11:
                event.set()
    assert order[-1] == 0
    assert sorted(order) == list(range(12))


def test_in_order_a_slow_job_is_waited_for(open_client, small_server, behaviour):
    # Meanwhile the others go on as far as they may: to twice as many as may be in flight.
    set_when(behaviour.hold(b"0"), lambda: len(behaviour.images) == 8)
    with open_client(small_server) as client:
        assert keys(list(client.stream(numbers(12), concurrency=4, ordered=True))) == list(range(12))
    assert set(behaviour.images[:8]) == {str(number).encode() for number in range(8)}


def test_an_endless_source_is_read_as_it_is_used(open_client, small_server, behaviour):
    with open_client(small_server) as client:
        outcomes = client.stream(numbers(), concurrency=3, ordered=True)
        assert keys(list(itertools.islice(outcomes, 20))) == list(range(20))
        outcomes.close()
    assert len(behaviour.images) <= 20 + 2 * 3


def test_the_error_of_a_job_ends_nothing(open_client, small_server, behaviour, tmp_path):
    (tmp_path / "image").write_bytes(b"0")

    def no_bytes() -> bytes:
        return None  # type: ignore[return-value]

    def broken() -> bytes:
        raise StopIteration

    jobs = [
        Job(tmp_path / "image"),
        Job(tmp_path / "missing"),
        Job(lambda: b"2"),
        Job(broken),
        Job(no_bytes),
        Job(str(tmp_path / "image")),
    ]
    with open_client(small_server) as client:
        outcomes = list(client.stream(jobs, concurrency=1, ordered=True))
    assert [outcome.answer and outcome.answer.text for outcome in outcomes] == ["0", None, "2", None, None, "0"]
    errors = [type(outcome.error) for outcome in outcomes]
    assert errors == [type(None), FileNotFoundError, type(None), RuntimeError, TypeError, type(None)]


def test_refusals_and_retries_are_each_jobs_own(open_client, small_server, behaviour):
    behaviour.faults = [WRONG, FULL, LOADING]
    with open_client(small_server) as client:
        outcomes = list(client.stream(numbers(4), concurrency=1, ordered=True))
        assert client.retries_made == 2
    assert isinstance(outcomes[0].error, InvalidRequestError)
    assert [outcome.error for outcome in outcomes[1:]] == [None] * 3


def test_images_are_read_when_their_turn_comes(open_client, small_server, behaviour):
    read, read_at_first = [], []

    def image(number: int) -> bytes:
        read.append(number)
        return str(number).encode()

    def is_asked() -> bool:
        read_at_first[:] = read
        return bool(behaviour.images)

    set_when(behaviour.hold(b"0"), is_asked)
    with open_client(small_server) as client:
        jobs = [Job(partial(image, number)) for number in range(6)]
        outcomes = client.stream(jobs, concurrency=1)
        next(outcomes)
        outcomes.close()
    assert read_at_first == [0]
    assert len(read) <= 2


def test_an_error_of_the_source_comes_behind_the_outcomes_before_it(open_client, small_server):
    def failing() -> Iterator[Job]:
        yield from numbers(7)
        raise OSError("the list ends here")

    seen = []
    with open_client(small_server) as client:
        outcomes = client.stream(failing(), concurrency=2)
        with pytest.raises(OSError, match="the list ends here"):
            seen.extend(outcome.job.key for outcome in outcomes)
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("jobs", [[], iter(())])
def test_no_jobs_have_no_outcomes(open_client, small_server, jobs):
    with open_client(small_server) as client:
        assert list(client.stream(jobs)) == []


def test_a_concurrency_of_nothing_is_refused(open_client, small_server):
    with open_client(small_server) as client, pytest.raises(ValueError, match="at least 1"):
        client.stream([], concurrency=0)


def test_jobs_reach_the_real_service(client):
    short = {"num_beams": 1, "max_new_tokens": 12}
    jobs = [Job(png(index), task, parameters=short) for index, task in enumerate(("od", "<CAPTION>"))]
    first, second, third = client.stream([*jobs, Job(b"no image")], ordered=True)
    assert isinstance(first.answer, Detections)
    assert second.answer.raw == client.infer(jobs[1].image, "<CAPTION>", **short)
    assert isinstance(third.error, InvalidRequestError)


def test_a_loop_that_is_left_leaves_no_thread(small_server, behaviour):
    behaviour.seconds = 0.05
    with Florence2Client(small_server) as client:
        for outcome in client.stream(numbers(), concurrency=4):
            assert stream_threads()
            if outcome.job.key >= 3:
                break
        assert not stream_threads()
        assert client.infer(b"7", "<CAPTION>") == {"<CAPTION>": "7"}
    assert behaviour.in_flight == 0


def test_pauses_are_cut_short_when_a_loop_is_left(behaviour):
    """A job that would wait an hour ends with its stream."""
    behaviour.faults = [Fault(429, headers={"Retry-After": "3600"})] * 99
    with http_server(behaviour) as url, Florence2Client(url, timeout=7200) as client:
        outcomes = client.stream(itertools.chain([Job(Path("missing"))], numbers()), concurrency=2)
        assert isinstance(next(outcomes).error, FileNotFoundError)
        while client.retries_made < 1:
            time.sleep(0.01)
        outcomes.close()
        assert not stream_threads()


async def jobs_of_a_loop(count: int) -> AsyncIterator[Job]:
    for job in numbers(count):
        await asyncio.sleep(0)
        yield job


async def failing_jobs() -> AsyncIterator[Job]:
    async for job in jobs_of_a_loop(3):
        yield job
    raise OSError("the list ends here")


def test_async_iterables_are_sources_too(small_server):
    async def run() -> list[int]:
        async with AsyncFlorence2Client(small_server) as client:
            stream = client.stream(jobs_of_a_loop(20), concurrency=3, ordered=True)
            return [outcome.job.key async for outcome in stream]

    assert asyncio.run(run()) == list(range(20))


def test_an_error_of_an_async_source_comes_behind_the_outcomes_before_it(small_server):
    seen = []

    async def run() -> None:
        async with AsyncFlorence2Client(small_server) as client:
            async for outcome in client.stream(failing_jobs()):
                seen.append(outcome.job.key)

    with pytest.raises(OSError, match="the list ends here"):
        asyncio.run(run())
    assert sorted(seen) == [0, 1, 2]


def test_outcomes_come_while_the_source_waits(small_server):
    """Of a queue of work, say, that is empty for now."""

    async def waiting(answered: asyncio.Event) -> AsyncIterator[Job]:
        yield Job(b"0", key=0)
        await answered.wait()
        yield Job(b"1", key=1)

    async def run() -> list[int]:
        answered, seen = asyncio.Event(), []
        async with AsyncFlorence2Client(small_server) as client:
            async for outcome in client.stream(waiting(answered)):
                seen.append(outcome.job.key)
                answered.set()
        return seen

    assert asyncio.run(asyncio.wait_for(run(), 20)) == [0, 1]


@pytest.mark.parametrize("leave", ["break", "aclose"])
def test_an_async_loop_that_is_left_leaves_no_task(small_server, behaviour, leave):
    behaviour.hold(b"5")  # and its request would never be answered

    async def run() -> set[asyncio.Task[None]]:
        before = asyncio.all_tasks()
        async with AsyncFlorence2Client(small_server) as client:
            stream = client.stream(numbers(), concurrency=4)
            async for outcome in stream:
                if outcome.job.key == 3:
                    break
            if leave == "aclose":
                await stream.aclose()
                assert asyncio.all_tasks() == before
        return asyncio.all_tasks() - before

    assert asyncio.run(run()) == set()


def test_a_cancelled_consumer_cancels_its_jobs(small_server, behaviour):
    behaviour.hold(b"0")

    async def run() -> set[asyncio.Task[None]]:
        async with AsyncFlorence2Client(small_server) as client:

            async def consume() -> list[Outcome]:
                return [outcome async for outcome in client.stream([Job(b"0")])]

            consumer = asyncio.create_task(consume())
            while not behaviour.images:
                await asyncio.sleep(0.01)
            consumer.cancel()
            await asyncio.wait([consumer])
            assert consumer.cancelled()
            return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(run()) == set()


def test_a_stream_whose_client_is_closed_says_so(small_server, behaviour):
    behaviour.hold(b"0")

    async def run() -> None:
        client = AsyncFlorence2Client(small_server)

        async def consume() -> None:
            async for _ in client.stream([Job(b"0")]):
                pass

        consumer = asyncio.create_task(consume())
        while not behaviour.images:
            await asyncio.sleep(0.01)
        await client.close()
        await consumer

    with pytest.raises(RuntimeError, match="closed while its stream was read"):
        asyncio.run(run())


def test_no_socket_is_left_open(open_client, behaviour):
    """An unclosed socket warns when it is collected; what others have left is collected before."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with http_server(behaviour) as url, open_client(url) as client:
            outcomes = client.stream(numbers(), concurrency=4)
            next(outcomes)
            outcomes.close()
            del outcomes
        gc.collect()
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, ResourceWarning)]
    assert not [message for message in messages if "socket" in message]


def test_connections_are_as_many_as_requests_in_flight(open_client, behaviour):
    behaviour.seconds = 0.005
    with http_server(behaviour) as url, open_client(url) as client:
        assert len(list(client.stream(numbers(200), concurrency=25))) == 200
    assert behaviour.connections <= 25


def test_a_closed_port_is_each_jobs_error(open_client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with open_client(address, retries=0) as client:
        outcomes = list(client.stream(numbers(3)))
    assert [type(outcome.error).__name__ for outcome in outcomes] == ["UnavailableError"] * 3


def test_a_streamed_answer_is_typed(open_client, small_server):
    with open_client(small_server) as client:
        (outcome,) = client.stream([Job(b"a cat", "CAPTION", parameters={"num_beams": 1})])
    answer = outcome.answer
    assert isinstance(answer, Caption)
    assert (answer.text, answer.score, answer.sequence_score) == ("a cat", 0.25, -0.5)
