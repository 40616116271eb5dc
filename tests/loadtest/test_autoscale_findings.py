"""What samples and requests are found to tell, on made-up runs and on one that was recorded on a cluster."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from florence2_loadtest.cluster.command import SCENARIO
from florence2_loadtest.cluster.expectations import COMPONENT_NUMBERS, NUMBERS
from florence2_loadtest.cluster.findings import find, statuses_per_second, with_first_answer
from florence2_loadtest.cluster.service import Bounds
from florence2_loadtest.cluster.steps import detect_steps
from florence2_loadtest.results import PodTimes, Record, Sample
from florence2_loadtest.scenario import OpenLoad, read_scenario
from florence2_loadtest.schedules import parse_schedule

BOUNDS = {"transformer": Bounds(0, 3, 2.0), "predictor": Bounds(0, 2, 4.0)}
# Of tests/e2e on one small node: until which second there were so many transformers ready, pods, wanted; predictors.
RECORDED = (
    (0, 0, 0, 0, 0, 0, 0), (2, 0, 1, 1, 0, 0, 0), (11, 1, 1, 1, 0, 1, 1), (14, 1, 1, 1, 1, 1, 1),
    (17, 1, 2, 2, 1, 1, 1), (20, 2, 3, 3, 1, 2, 2), (29, 3, 3, 3, 1, 2, 2), (40, 3, 3, 3, 2, 2, 2),
    (42, 1, 3, 1, 1, 2, 1), (71, 0, 3, 0, 0, 2, 0), (72, 0, 2, 0, 0, 2, 0), (73, 0, 1, 0, 0, 2, 0),
    (75, 0, 0, 0, 0, 1, 0), (76, 0, 0, 0, 0, 0, 0),
)  # fmt: skip


def component(ready: float, pods: float, desired: float, **more: float | None) -> dict[str, float | None]:
    """Returns a component's sample; pods that aren't ready are on their way in, or out where fewer are wanted."""
    rest = pods - ready
    coming = rest if desired >= pods else 0.0
    return {"ready": ready, "pending": coming, "terminating": rest - coming, "desired": desired, **more}


def recorded_samples() -> list[Sample]:
    samples = []
    for second in range(77):
        row = next(row for row in RECORDED if second <= row[0])
        in_path = {"activator_in_path": 1.0, "panicking": float(16 <= second < 31)}
        transformer, predictor = component(*row[1:4], **in_path), component(*row[4:7], **in_path)
        samples.append(Sample(second=float(second), components={"transformer": transformer, "predictor": predictor}))
    return samples


def recorded_requests() -> list[Record]:
    """One request at zero; when it is answered, ten at a time for 18 s."""
    return [request(0, 0.0, 11.6), *(request(1 + i, 12 + 0.18 * i, min(30.0, 13.8 + 0.18 * i)) for i in range(100))]


def request(index: int, planned: float, done: float | None = None, status: str = "ok", **more: Any) -> Record:
    sent = more.pop("sent", planned)
    return Record(index, "<CAPTION>", planned, sent, done, status if done is not None else "timeout", 1, **more)


def steady(seconds: int, **values: Any) -> list[Sample]:
    return [Sample(second=float(second), components={"predictor": values}) for second in range(seconds)]


class TestRecorded:
    found = find(BOUNDS, recorded_samples(), [], recorded_requests())

    def test_first_answer_comes_from_zero_of_both(self) -> None:
        assert self.found["from_zero"] == ["transformer", "predictor"]
        assert self.found["first_answer_s"] == 11.6

    def test_step_is_the_ten_clients(self) -> None:
        assert [step["second"] for step in self.found["steps"]] == [0.0, 12.0]

    def test_enough_replicas_are_those_that_were_wanted(self) -> None:
        first, second = self.found["transformer"]["steps"]
        assert (first["from"], first["to"], first["desired_s"], first["enough_s"]) == (0.0, 1.0, 1.0, 3.0)
        assert (second["from"], second["to"], second["desired_s"], second["enough_s"]) == (1.0, 3.0, 6.0, 9.0)
        assert self.found["transformer"]["enough_s"] == 9.0
        assert self.found["predictor"]["enough_s"] == 18.0
        assert self.found["enough_s"] == 18.0

    def test_most_replicas(self) -> None:
        assert (self.found["transformer"]["most_ready"], self.found["predictor"]["most_ready"]) == (3.0, 2.0)

    def test_way_back_ends_before_the_pods_do(self) -> None:
        last = max(record.done_s or 0 for record in recorded_requests())
        assert last == 30.0
        assert self.found["back_s"] == 13.0
        assert (self.found["transformer"]["gone_s"], self.found["predictor"]["gone_s"]) == (44.0, 46.0)

    def test_panics_of_both_are_counted(self) -> None:
        assert self.found["panics"] == 2
        assert self.found["transformer"]["panics"] == 1

    def test_replicas_beyond_the_need_are_mostly_those_that_end(self) -> None:
        transformer = self.found["transformer"]
        # Three of them while ten requests, for five, are in flight: none too many. From then on all are.
        assert transformer["surplus_replica_s"] == pytest.approx(42 * 3 + 2 + 1, abs=3)
        assert transformer["replica_s"] == pytest.approx(14 + 3 * 2 + 54 * 3 + 2 + 1, abs=3)
        assert transformer["surplus_share"] == transformer["surplus_replica_s"] / transformer["replica_s"]

    def test_what_the_activator_held_is_the_request_at_zero(self) -> None:
        assert (self.found["held"], self.found["held_longest_s"]) == (1, 11.6)
        assert self.found["transformer"]["activator_s"] == 76.0

    def test_every_number_that_may_be_expected_is_there(self) -> None:
        assert {name for name, value in self.found.items() if isinstance(value, int | float)} == set(NUMBERS)
        for name in COMPONENT_NUMBERS:
            assert isinstance(self.found["predictor"][name], int | float), name


class TestFirstAnswer:
    samples: ClassVar = [
        Sample(second=float(s), components={"transformer": component(s >= 6, s >= 2, 1)}) for s in range(-3, 20)
    ]
    pods: ClassVar = [
        PodTimes(name="old", component="transformer", created_s=-90, ready_s=3, gone_s=60),
        PodTimes(name="late", component="transformer", created_s=4.5, scheduled_s=0.1),
        PodTimes(
            name="new", component="transformer", created_s=1.5, scheduled_s=0.25, pulled_s=1, started_s=2, ready_s=4
        ),
    ]
    records: ClassVar = [request(0, 1.0, 9.0), request(1, 2.0, 7.5), request(2, 3.0, 8.0, "http 503")]

    def test_is_the_first_that_comes_whichever_request_s_it_is(self) -> None:
        found = find({"transformer": BOUNDS["transformer"]}, self.samples, self.pods, self.records)
        assert found["first_answer_s"] == 6.5

    def test_parts_are_those_of_the_pod_that_was_ready_first(self) -> None:
        found = find({"transformer": BOUNDS["transformer"]}, self.samples, self.pods, self.records)
        assert found["first_answer_parts"] == {
            "transformer": {"created": 0.5, "scheduled": 0.75, "pulled": 1.5, "started": 2.5, "ready": 4.5}
        }

    def test_isn_t_one_from_zero_where_a_replica_was_ready(self) -> None:
        samples = steady(10, **component(1, 1, 1))
        found = find({"predictor": BOUNDS["predictor"]}, samples, [], self.records)
        assert (found["from_zero"], found["first_answer_s"]) == ([], None)

    def test_is_unknown_where_none_came(self) -> None:
        found = find({"transformer": BOUNDS["transformer"]}, self.samples, [], [request(0, 1.0)])
        assert (found["from_zero"], found["first_answer_s"]) == (["transformer"], None)

    def test_stands_beside_the_only_pod_that_can_have_given_it(self) -> None:
        told = {pod.name: pod.first_answer_s for pod in with_first_answer(self.pods, self.records)}
        assert told == {"old": None, "late": None, "new": 6.0}

    def test_stands_beside_none_of_two(self) -> None:
        both = [*self.pods, PodTimes(name="twin", component="transformer", created_s=1.6, ready_s=4)]
        assert {pod.first_answer_s for pod in with_first_answer(both, self.records)} == {None}


class TestRequests:
    def test_unsent_ones_lower_the_share_and_are_no_failures(self) -> None:
        records = [request(0, 0.0, 1.0), request(1, 1.0, sent=None), request(2, 2.0, 3.0, "http 504"), request(3, 3.0)]
        found = find(BOUNDS, [], [], records)
        assert found["sent_share"] == 0.75
        assert found["failures"] == 2

    def test_statuses_are_counted_by_the_second_in_which_they_came(self) -> None:
        refused = {"status": "http 503", "component": "ingress"}
        records = [request(i, 0.0, 2.1 + i / 10, **refused) for i in range(3)]
        records += [request(3, 0.0, 2.5), request(4, 0.0, 3.5), request(5, 0.0)]
        assert statuses_per_second(records) == [
            {"second": 2, "component": "", "status": "ok", "count": 1},
            {"second": 2, "component": "ingress", "status": "http 503", "count": 3},
            {"second": 3, "component": "", "status": "ok", "count": 1},
        ]

    def test_nothing_planned_finds_nothing(self) -> None:
        found = find(BOUNDS, recorded_samples(), [], [])
        assert (found["sent_share"], found["first_answer_s"], found["steps"]) == (None, None, [])


class TestSteps:
    def test_are_the_schedule_s_where_it_has_parts(self) -> None:
        scenario = read_scenario(SCENARIO)
        assert isinstance(scenario.load, OpenLoad)
        schedule = parse_schedule(scenario.load.schedule, scenario.seed)
        records = [request(i, float(start)) for i, start in enumerate(schedule.starts)]
        found = find(BOUNDS, [], [], records, schedule.rises)
        assert [(step["second"], step["rate"]) for step in found["steps"]] == [(0, 2), (60, 10), (150, 40)]

    @pytest.mark.parametrize("seed", range(10))
    def test_of_a_trace_are_found_among_random_requests(self, seed: int) -> None:
        starts = parse_schedule("poisson:2/s,60s;10/s,90s;40/s,20s;10/s,40s;0/s,30s", seed).starts
        found = [second for second, _ in detect_steps([request(i, float(start)) for i, start in enumerate(starts)])]
        assert found == [pytest.approx(0, abs=3), pytest.approx(60, abs=3), pytest.approx(150, abs=3)]

    @staticmethod
    def rates(*parts: tuple[float, int], poisson: bool = False) -> list[tuple[float, float]]:
        random, begin, planned = np.random.default_rng(5), 0.0, []
        for rate, seconds in parts:
            count = random.poisson(rate * seconds) if poisson else round(rate * seconds)
            within = np.sort(random.uniform(0, seconds, count)) if poisson else np.arange(count) / (rate or 1)
            planned += [begin + float(start) for start in within]
            begin += seconds
        return detect_steps([request(i, start) for i, start in enumerate(planned)])

    def test_are_the_first_request_and_each_rise(self) -> None:
        assert self.rates((0, 10), (2, 20), (10, 20), (40, 6), (10, 10)) == [(10, 2), (30, 10), (50, 40)]

    def test_of_a_short_one_the_rate_is_its_own(self) -> None:
        assert self.rates((4, 3), (40, 10)) == [(0, 4), (3, 40)]

    def test_of_random_requests_are_where_they_were_planned(self) -> None:
        found = self.rates((4, 20), (30, 20), poisson=True)
        assert [second for second, _ in found] == [0, pytest.approx(20, abs=1)]
        assert found[1][1] == pytest.approx(30, rel=0.3)

    def test_one_rate_has_none_but_the_first(self) -> None:
        assert [second for second, _ in self.rates((8, 60), poisson=True)] == [0]

    def test_a_fall_is_none(self) -> None:
        assert self.rates((20, 10), (2, 10)) == [(0, 20)]


class TestEnough:
    @staticmethod
    def of(*counts: tuple[float, float | None]) -> dict[str, Any]:
        """Returns what is found of a predictor's ready and desired replicas by the second, after a step at 0."""
        samples = [
            Sample(second=float(s), components={"predictor": {"ready": ready, "desired": desired}})
            for s, (ready, desired) in enumerate(counts)
        ]
        found = find({"predictor": Bounds(0, 4, 2.0)}, samples, [], [request(0, 0.0, 1.0)], [(0.0, 5.0)])
        assert found["enough_s"] == found["predictor"]["enough_s"]
        return dict(found["predictor"])

    def test_isn_t_known_where_nobody_said_how_many_are_wanted(self) -> None:
        assert self.of((1, None), (1, None))["enough_s"] is None

    def test_is_none_needed_where_never_more_are_wanted(self) -> None:
        found = self.of((2, 2), (2, 1), (2, 2))
        assert (found["enough_s"], found["steps"]) == (0.0, [])

    def test_isn_t_reached_on_the_way_to_the_most(self) -> None:
        found = self.of((1, 1), (1, 2), (2, 2), (2, 3), (2, 3), (3, 3))
        assert found["steps"] == [{"second": 0.0, "from": 1.0, "to": 3.0, "desired_s": 3.0, "enough_s": 5.0}]

    def test_are_as_many_as_are_still_wanted(self) -> None:
        assert self.of((1, 1), (1, 4), (2, 4), (2, 3), (3, 3), (3, 1))["enough_s"] == 4.0

    def test_isn_t_known_of_a_step_that_nobody_saw(self) -> None:
        samples = [Sample(second=float(s), components={"predictor": component(1, 1, 1)}) for s in range(5)]
        rises = [(0.0, 1.0), (10.0, 2.0)]
        found = find({"predictor": Bounds(0, 4, 2.0)}, samples, [], [request(0, 0.0, 1.0)], rises)["predictor"]
        assert found["enough_s"] is None
        assert found["steps"][-1] == {"second": 10.0, **dict.fromkeys(("from", "to", "desired_s", "enough_s"))}


class TestSurplus:
    def test_of_an_idle_service_is_all_above_the_fewest(self) -> None:
        found = find({"predictor": Bounds(1, 4, 4.0)}, steady(11, **component(3, 3, 3)), [], [])["predictor"]
        assert (found["replica_s"], found["surplus_replica_s"]) == (30.0, 20.0)

    @pytest.mark.parametrize(("in_flight", "surplus"), [(1, 20.0), (4, 20.0), (5, 10.0), (9, 0.0), (100, 0.0)])
    def test_is_what_the_requests_in_flight_don_t_fill(self, in_flight: int, surplus: float) -> None:
        records = [request(i, 0.0, 20.0) for i in range(in_flight)]
        found = find({"predictor": Bounds(0, 4, 4.0)}, steady(11, **component(3, 3, 3)), [], records)["predictor"]
        assert found["surplus_replica_s"] == surplus

    def test_a_request_within_a_second_counts_for_it(self) -> None:
        records = [request(0, 4.2, 4.4)]
        found = find({"predictor": Bounds(0, 4, 4.0)}, steady(11, **component(1, 1, 1)), [], records)["predictor"]
        assert found["surplus_replica_s"] == 9.0

    def test_without_a_target_is_only_known_where_nothing_is_asked(self) -> None:
        records = [request(0, 0.0, 5.0)]
        found = find({"predictor": Bounds(1, 4, None)}, steady(11, **component(3, 3, 3)), [], records)["predictor"]
        assert found["surplus_replica_s"] == 10.0, "two of three, from the fifth second to the tenth"


class TestUnknown:
    samples = steady(
        10, ready=None, pending=None, terminating=None, desired=None, activator_in_path=None, panicking=None
    )

    def test_what_wasn_t_sampled_is_none(self) -> None:
        found = find({"predictor": Bounds(0, 2, 4.0)}, self.samples, [], [request(0, 1.0, 2.0)])
        predictor = found["predictor"]
        assert predictor["enough_s"] is None
        for name in ("most_ready", "most_desired", "panics", "replica_s", "surplus_share", "activator_s", "back_s"):
            assert predictor[name] is None, name
        assert (found["panics"], found["held"], found["back_s"], found["first_answer_s"]) == (None, None, None, None)

    def test_gaps_are_left_out(self) -> None:
        known = steady(4, **component(2, 2, 2, panicking=1.0))
        gap = [Sample(second=4.0 + i, components={}) for i in range(3)]
        after = [Sample(second=7.0 + i, components={"predictor": component(0, 0, 0, panicking=0.0)}) for i in range(3)]
        found = find({"predictor": Bounds(0, 2, 4.0)}, [*known, *gap, *after], [], [request(0, 0.0, 3.5)])["predictor"]
        assert (found["most_ready"], found["panics"], found["replica_s"]) == (2.0, 1, 8.0)
        assert found["back_s"] == 3.5

    def test_not_back_by_the_end_is_none(self) -> None:
        samples = steady(20, **component(1, 1, 1))
        assert find({"predictor": BOUNDS["predictor"]}, samples, [], [request(0, 1.0, 2.0)])["back_s"] is None

    def test_back_and_up_again_is_back_only_at_last(self) -> None:
        ready = [1, 1, 0, 0, 1, 0, 0]
        samples = [Sample(second=float(i), components={"predictor": component(r, r, r)}) for i, r in enumerate(ready)]
        assert find({"predictor": BOUNDS["predictor"]}, samples, [], [request(0, 0.0, 1.0)])["back_s"] == 4.0

    def test_replicas_that_never_came_are_no_answer_to_a_step(self) -> None:
        samples = [
            Sample(second=float(i), components={"predictor": component(1, 1 + (i > 4), 1 + (i > 4))})
            for i in range(20)
        ]
        records = [request(i, i / 2, i / 2 + 1) for i in range(6)] + [request(i, 3 + i / 20, 9.0) for i in range(100)]
        found = find({"predictor": BOUNDS["predictor"]}, samples, [], records)
        assert found["predictor"]["steps"][-1]["enough_s"] is None
        assert found["enough_s"] is None
