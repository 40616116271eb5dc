"""Loads are the same for both sides and at every run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from florence2_kserve.benchmark.workload import TASKS, Workload, draw_image, prompt_ids


@pytest.fixture
def workload():
    return Workload(seed=3, length_scale=1.0, concurrency=36)


def all_loads(workload):
    return [
        workload.mixed(45),
        *(workload.alone(task, 40) for task in TASKS.values()),
        workload.nine_tasks(4),
        workload.unique(20),
        workload.caption_beside_od(3, clients=6),
        workload.open(45, rate=10.0),
        workload.single(TASKS["od"]),
        workload.equal(5, 7),
    ]


def test_equal_seeds_give_equal_loads_and_others_do_not(workload):
    def content(seed):
        loads = all_loads(Workload(seed=seed, length_scale=1.0, concurrency=36))
        return [(load.name, load.items, [stream.arrivals for stream in load.streams]) for load in loads]

    assert content(3) == content(3)
    assert content(3) != content(4)


def test_lengths_come_from_the_tasks_range(workload):
    for load in all_loads(workload)[:-1]:
        assert [item.index for item in load.items] == list(range(len(load.items)))
        for item in load.items:
            assert item.task.shortest <= item.length <= item.task.longest <= workload.longest
    od = [item.length for item in workload.alone(TASKS["od"], 400).items]
    assert min(od) < 75
    assert max(od) > 285


def test_lengths_can_be_scaled():
    scaled = Workload(seed=3, length_scale=0.1, concurrency=36)
    assert scaled.longest == 30
    assert {item.length for item in scaled.unique(50).items} <= {2}  # of 10 to 14: never below start and end
    assert max(item.length for item in scaled.mixed(90).items) > 20


def test_mixed_asks_all_tasks_equally_often_each_about_its_own_image(workload):
    items = workload.mixed(45).items
    assert set(Counter(item.task.name for item in items).values()) == {5}
    assert len({item.image for item in items}) == 45
    assert [item.task for item in items[:9]] != [item.task for item in items[9:18]]


def test_nine_tasks_on_each_image(workload):
    items = workload.nine_tasks(4).items
    asked = Counter((item.image, item.task.name) for item in items)
    assert len(asked) == 36
    assert set(asked.values()) == {1}
    assert [item.image for item in items] == sorted(item.image for item in items)


def test_a_closed_loop_has_no_more_clients_than_requests(workload):
    assert workload.mixed(90).name == "mixed.c36"
    assert workload.mixed(90).streams[0].clients == 36
    assert workload.mixed(9).name == "mixed.c9"


def test_open_arrivals_come_at_the_rate(workload):
    (stream,) = workload.open(2000, rate=10.0).streams
    assert list(stream.arrivals) == sorted(stream.arrivals)
    gaps = np.diff(stream.arrivals)
    assert gaps.mean() == pytest.approx(0.1, rel=0.1)
    assert gaps.std() == pytest.approx(0.1, rel=0.15)  # as of a Poisson process


@pytest.mark.parametrize("vocab_size", [128, 4096, 51_328])
def test_prompts_fit_the_vocabulary_beside_the_image_token(vocab_size):
    for task in TASKS.values():
        ids = prompt_ids(task, vocab_size)
        assert 8 <= len(ids) <= 14
        assert (ids[0], ids[-1]) == (0, 2)
        assert not {0, 1, 2, 3} & set(ids[1:-1].tolist())
        assert ids.max() < vocab_size - 1
    if vocab_size > 50_000:
        assert all(tuple(prompt_ids(task, vocab_size)) == task.prompt_ids for task in TASKS.values())


def test_images_differ_and_can_not_be_changed():
    first, second = draw_image(0, 16, 5), draw_image(1, 16, 5)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, draw_image(0, 16, 6))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
