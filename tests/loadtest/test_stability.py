"""When windows agree."""

from __future__ import annotations

import pytest

from florence2_loadtest.results import Window
from florence2_loadtest.stability import fewest_answers, is_stable


def windows(*values: tuple[float, float]) -> list[Window]:
    return [Window(seconds=5.0, throughput=throughput, latency_s=latency) for throughput, latency in values]


def judge(given: list[Window], fewest: int = 10) -> bool:
    return is_stable(given, stable_windows=3, tolerance=0.1, fewest=fewest)


def test_three_windows_that_agree_are_stable() -> None:
    assert judge(windows((30, 1.2), (31, 1.25), (29, 1.15)))


def test_only_the_last_ones_count() -> None:
    steady = windows((30, 1.2), (31, 1.25), (29, 1.15))
    assert judge([*windows((3, 9.0), (60, 0.1)), *steady])
    assert not judge([*steady, *windows((60, 1.2))])


def test_two_are_too_few() -> None:
    assert not judge(windows((30, 1.2), (30, 1.2)))


@pytest.mark.parametrize("odd", [(40, 1.2), (20, 1.2), (30, 1.5), (30, 0.9)])
def test_each_has_to_lie_near_their_mean_in_throughput_and_latency(odd: tuple[float, float]) -> None:
    assert not judge(windows((30, 1.2), odd, (30, 1.2)))


def test_the_tolerance_is_about_the_mean() -> None:
    assert judge(windows((91, 1.0), (100, 1.0), (109, 1.0)))
    assert not judge(windows((88, 1.0), (100, 1.0), (112, 1.0)))


def test_windows_of_few_answers_do_not_agree_by_chance() -> None:
    few = windows((1.8, 1.2), (1.8, 1.2), (1.8, 1.2))  # nine answers each
    assert not judge(few)
    assert judge(few, fewest=9)


def test_nothing_answered_is_not_stable() -> None:
    assert not judge(windows((0, 0), (0, 0), (0, 0)))


@pytest.mark.parametrize(("concurrency", "tolerance", "fewest"), [(1, 0.1, 10), (36, 0.1, 36), (1, 0.05, 20)])
def test_a_window_has_to_hold_a_turn_of_each_client_and_enough_for_the_tolerance(
    concurrency: int, tolerance: float, fewest: int
) -> None:
    assert fewest_answers(concurrency, tolerance) == fewest
