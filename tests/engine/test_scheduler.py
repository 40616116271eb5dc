from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from florence2_kserve.engine.interface import EngineStopped, GenerationRequest, QueueFull
from florence2_kserve.engine.scheduler import Job, Scheduler

PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)


def job(num_beams: int = 3, max_new_tokens: int = 10, deadline: float | None = None) -> Job:
    ids = np.array([0, 2])
    return Job(GenerationRequest(PIXELS, b"", ids, max_new_tokens, deadline=deadline), num_beams, 1.0)


def scheduler(**changes: float) -> Scheduler:
    return Scheduler(**({"max_queue_size": 10, "max_batch_size": 4, "max_rows": 12, "max_tokens": 1000} | changes))


def test_the_first_to_come_is_the_first_to_go():
    waiting = scheduler()
    jobs = [job() for _ in range(7)]
    waiting.submit(jobs[:3])
    waiting.submit(jobs[3:])
    assert waiting.admit() == jobs[:4]
    assert waiting.admit() == []
    waiting.release(jobs[2])
    assert waiting.admit() == [jobs[4]]
    assert (waiting.num_waiting, waiting.num_running, waiting.num_rows) == (2, 4, 12)


@pytest.mark.parametrize(
    ("bounds", "first", "admitted"),
    [
        ({"max_batch_size": 2}, [(1, 1)] * 3, 2),
        ({"max_rows": 8}, [(3, 1), (5, 1), (1, 1)], 2),
        ({"max_rows": 8}, [(3, 1), (6, 1), (1, 1)], 1),
        ({"max_tokens": 100}, [(3, 20), (2, 20), (1, 1)], 2),
        ({"max_tokens": 100}, [(3, 20), (2, 21), (1, 1)], 1),
    ],
)
def test_each_bound_holds_and_nobody_overtakes_the_one_that_does_not_fit(bounds, first, admitted):
    waiting = scheduler(**bounds)
    jobs = [job(beams, length) for beams, length in first]
    waiting.submit(jobs)
    assert waiting.admit() == jobs[:admitted]
    assert waiting.admit() == []


def test_the_queue_takes_all_or_none():
    waiting = scheduler(max_queue_size=3)
    waiting.submit([job(), job()])
    with pytest.raises(QueueFull, match="2 rows wait, 2 more don't fit into 3"):
        waiting.submit([job(), job()])
    waiting.submit([job()])
    assert waiting.num_waiting == 3


def test_those_who_are_late_or_cancelled_are_taken_out_wherever_they_are():
    waiting = scheduler(max_batch_size=2)
    past = time.monotonic() - 1
    jobs = [job(), job(deadline=past), job(deadline=past), job(), job(deadline=time.monotonic() + 100)]
    waiting.submit(jobs)
    waiting.admit()
    jobs[3].future.cancel()
    assert waiting.remove_over() == ([jobs[2], jobs[3]], [jobs[1]])
    waiting.release(jobs[1])
    assert waiting.admit() == [jobs[4]]


def test_after_the_stop_nothing_is_taken_and_everything_is_handed_out():
    waiting = scheduler(max_batch_size=1)
    jobs = [job(), job()]
    waiting.submit(jobs)
    assert waiting.wait()
    waiting.admit()
    waiting.stop()
    assert not waiting.wait()
    with pytest.raises(EngineStopped):
        waiting.submit([job()])
    assert waiting.remove_all() == jobs
    assert (waiting.num_waiting, waiting.num_running, waiting.num_rows, waiting.num_tokens) == (0, 0, 0, 0)


def test_nothing_starves():
    """Under any load, a request waits at most as many steps as those before it may take one after another.

    With `batch` of them side by side that is bounded by their steps / batch, plus the longest of them.
    """
    chance = random.Random(1)
    for _ in range(20):
        batch = chance.randint(1, 6)
        waiting = scheduler(max_queue_size=10_000, max_batch_size=batch, max_rows=8 * batch, max_tokens=8 * 50 * batch)
        left: dict[int, int] = {}
        arrived: dict[int, tuple[int, int]] = {}
        running: list[Job] = []
        queued: list[Job] = []
        for step in range(20_000):
            if step < 400:
                new = [job(chance.randint(1, 8), chance.choice((2, 5, 50))) for _ in range(chance.randint(0, 2))]
                before = sum(left[id(one)] for one in [*queued, *running])
                for one in new:
                    left[id(one)] = one.request.max_new_tokens
                    arrived[id(one)] = (step, before)
                    before += one.request.max_new_tokens
                waiting.submit(new)
                queued.extend(new)
            for one in waiting.admit():
                assert one is queued.pop(0)
                came, before = arrived[id(one)]
                assert step - came <= before / batch + 50
                running.append(one)
            for one in list(running):
                left[id(one)] -= 1
                if not left[id(one)]:
                    running.remove(one)
                    waiting.release(one)
            if step > 400 and not queued and not running:
                break
        assert not queued
        assert not running


def test_the_first_waits_for_others_but_not_beyond_the_delay_or_a_full_batch():
    waiting = scheduler(admission_delay=0.2, full_batch=3)
    first = [job(), job()]
    waiting.submit(first)
    assert waiting.admit() == []
    assert waiting.wait()  # sleeps until the delay is over
    assert time.monotonic() - first[0].queued_at >= 0.2
    assert waiting.admit() == first
    full = [job() for _ in range(3)]
    for one in first:
        waiting.release(one)
    waiting.submit(full)
    assert waiting.admit() == full


def test_who_decodes_goes_on_while_the_next_one_waits_for_others():
    waiting = scheduler(admission_delay=60, full_batch=2)
    waiting.submit([job(), job()])
    assert len(waiting.admit()) == 2
    waiting.submit([job()])
    assert waiting.wait()
    assert waiting.admit() == []


def test_another_that_comes_ends_the_waiting():
    waiting = scheduler(admission_delay=60, full_batch=2)
    waiting.submit([job()])
    thread = threading.Thread(target=lambda: waiting.submit([job()]))
    thread.start()
    assert waiting.wait()
    thread.join()
    assert len(waiting.admit()) == 2
