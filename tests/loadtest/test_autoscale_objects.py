"""What is read out of a cluster's objects."""

from __future__ import annotations

import json
import time

import pytest

from florence2_loadtest.cluster.panic import read_line
from florence2_loadtest.cluster.pods import PodLog, passed, pulled_pod, state
from florence2_loadtest.cluster.scalers import knative_state, standard_state
from florence2_loadtest.cluster.service import Bounds, read_service

from . import cluster_objects as objects

BORN = 1_800_000_000.0


class TestService:
    def test_knative_scales_by_requests_in_flight(self) -> None:
        service = read_service(objects.inference_service())
        assert (service.name, service.namespace, service.mode) == ("florence2", "vision", "Knative")
        assert service.is_ready
        assert service.host == "florence2-vision.example.com"
        assert service.local_url("rest") == "http://florence2-transformer.vision"
        assert service.local_url("grpc") == "grpc://florence2-transformer.vision:80"
        assert service.bounds == {"transformer": Bounds(0, 3, 1.4), "predictor": Bounds(0, 2, 2.8)}

    def test_standard_has_no_target_of_requests(self) -> None:
        service = read_service(objects.inference_service("Standard", fewest=1))
        assert service.mode == "Standard"
        assert service.bounds["transformer"] == Bounds(1, 3, None)

    def test_names_of_modes_before_kserve_0_16_are_known(self) -> None:
        item = objects.inference_service("Serverless")
        assert read_service(item).mode == "Knative"
        item["status"] = {}
        assert read_service(item).mode == "Knative", "by the annotation, before it has a status"
        assert not read_service(item).is_ready

    def test_what_the_specification_leaves_out_has_kserve_s_defaults(self) -> None:
        item = objects.inference_service()
        item["spec"] = {"predictor": {}}
        assert read_service(item).bounds == {"predictor": Bounds(1, None, 70.0)}

    @pytest.mark.parametrize(
        ("given", "percent", "target"),
        [
            ({"scaleTarget": 10}, None, 7.0),
            ({"scaleTarget": 10}, "85", 8.5),
            ({"scaleTarget": 10, "containerConcurrency": 4}, "50", 2.0),
            ({"containerConcurrency": 64}, "75", 48.0),
            ({"scaleTarget": 10, "containerConcurrency": 0}, "100", 10.0),
            ({"scaleTarget": 1}, None, 1.0),
            ({"scaleTarget": 10, "scaleMetric": "rps"}, None, None),
        ],
    )
    def test_knative_keeps_replicas_at_a_share_of_what_they_may_have(
        self, given: dict[str, object], percent: str | None, target: float | None
    ) -> None:
        item = objects.inference_service()
        item["spec"] = {"predictor": given}
        if percent is not None:
            given["annotations"] = {"autoscaling.knative.dev/target-utilization-percentage": percent}
        assert read_service(item).bounds["predictor"].target == target


class TestPods:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"phase": "Pending"}, "pending"),
            ({"scheduled": BORN, "started": BORN, "is_loaded": True}, "pending"),
            ({"ready": BORN + 5}, "ready"),
            ({"ready": BORN + 5, "is_ending": True}, "terminating"),
            ({"phase": "Failed"}, "ended"),
        ],
    )
    def test_are_counted_as(self, given: dict[str, object], expected: str) -> None:
        assert state(objects.pod("predictor", **given)) == expected  # type: ignore[arg-type]

    def test_say_which_phases_lie_behind(self) -> None:
        assert passed(objects.pod("predictor")) == {}
        begun = objects.pod("predictor", scheduled=BORN + 1, started=BORN + 3)
        assert passed(begun) == {"scheduled": BORN + 1, "started": BORN + 3}
        there = objects.pod("predictor", scheduled=BORN + 1, started=BORN + 3, is_loaded=True, ready=BORN + 9)
        assert passed(there) == {"scheduled": BORN + 1, "started": BORN + 3, "loaded": None, "ready": BORN + 9}

    def test_without_a_start_up_probe_don_t_say_when_the_model_is_loaded(self) -> None:
        there = objects.pod("predictor", started=BORN, is_loaded=True, ready=BORN, has_probe=False)
        assert "loaded" not in passed(there)

    def test_only_images_of_the_container_that_serves_count(self) -> None:
        of = objects.pod("predictor")
        assert pulled_pod(objects.pulled(of, BORN)) == of["metadata"]["name"]
        assert pulled_pod(objects.pulled(of, BORN, "queue-proxy")) is None
        assert pulled_pod(objects.unschedulable(of)) is None


class TestPodLog:
    def test_phases_that_are_watched_have_the_moment_at_which_they_were_seen(self) -> None:
        log = PodLog()
        steps = {
            100.0: {"phase": "Pending"},
            100.4: {"scheduled": BORN},
            101.5: {"scheduled": BORN, "started": BORN},
            107.25: {"scheduled": BORN, "started": BORN, "is_loaded": True},
            108.0: {"scheduled": BORN, "started": BORN, "is_loaded": True, "ready": BORN + 8},
        }
        for at, given in steps.items():
            log.see(objects.pod("predictor", **given), at, is_news=True)  # type: ignore[arg-type]
        log.see_event(objects.pulled(objects.pod("predictor"), BORN), 101.0, is_news=True)
        log.lose(objects.pod("predictor")["metadata"]["name"], 160.0)
        (times,) = log.times(origin=90.0)
        assert times.component == "predictor"
        assert times.created_s == 10.0
        assert times.scheduled_s == pytest.approx(0.4)
        assert times.pulled_s == 1.0
        assert (times.started_s, times.loaded_s, times.ready_s, times.gone_s) == (1.5, 7.25, 8.0, 60.0)

    def test_a_pod_that_was_there_before_has_the_cluster_s_times(self) -> None:
        log, began = PodLog(), int(time.time()) - 100
        there = objects.pod(
            "transformer", created=began, scheduled=began + 1, started=began + 4, is_loaded=True, ready=began + 9
        )
        log.see_event(objects.pulled(there, began + 2), time.monotonic(), is_news=False)
        log.see(there, time.monotonic(), is_news=False)
        (times,) = log.times(origin=time.monotonic())
        assert times.created_s == pytest.approx(-100, abs=2)
        assert times.scheduled_s == pytest.approx(1)
        assert times.pulled_s == pytest.approx(2)
        assert times.started_s == pytest.approx(4)
        assert times.ready_s == pytest.approx(9)
        assert times.loaded_s == times.ready_s, "it was loaded by then, and no time is given"

    def test_news_in_the_wrong_order_are_put_right(self) -> None:
        log = PodLog()
        log.see(objects.pod("predictor"), 10.0, is_news=True)
        log.see(objects.pod("predictor", scheduled=BORN, started=BORN), 12.0, is_news=True)
        log.see_event(objects.pulled(objects.pod("predictor"), BORN), 12.2, is_news=True)
        (times,) = log.times(origin=10.0)
        assert (times.pulled_s, times.started_s) == (2.0, 2.0)

    def test_a_container_s_second_start_doesn_t_count(self) -> None:
        log = PodLog()
        for at, started in ((10.0, None), (12.0, BORN), (50.0, BORN + 40)):
            log.see(objects.pod("predictor", started=started), at, is_news=True)
        assert log.times(origin=0.0)[0].started_s == 2.0


class TestScalers:
    def test_knative_s_wishes_are_those_of_the_component(self) -> None:
        autoscalers = [objects.pod_autoscaler("transformer", 3, 1), objects.pod_autoscaler("predictor", 1, 1)]
        serverless = [
            objects.serverless_service("transformer", "Proxy"),
            objects.serverless_service("predictor", "Serve"),
        ]
        transformer = knative_state("florence2-transformer", autoscalers, serverless)
        assert transformer == {"desired": 3.0, "actual": 1.0, "activator_in_path": 1.0}
        assert knative_state("florence2-predictor", autoscalers, serverless)["activator_in_path"] == 0.0

    def test_during_a_rollout_both_revisions_count_but_the_old_one_s_path_doesn_t(self) -> None:
        autoscalers = [
            objects.pod_autoscaler("predictor", 2, 2, reachability="Unreachable"),
            objects.pod_autoscaler("predictor", 1, 0, revision="00002"),
        ]
        serverless = [
            objects.serverless_service("predictor", "Proxy"),
            objects.serverless_service("predictor", "Serve", revision="00002"),
        ]
        found = knative_state("florence2-predictor", autoscalers, serverless)
        assert found == {"desired": 3.0, "actual": 2.0, "activator_in_path": 0.0}

    @pytest.mark.parametrize("desired", [None, -1])
    def test_what_knative_doesn_t_know_yet_is_none(self, desired: int | None) -> None:
        found = knative_state("florence2-predictor", [objects.pod_autoscaler("predictor", desired)], [])
        assert found == {"desired": None, "actual": None, "activator_in_path": None}

    def test_standard_asks_the_hpa_and_else_the_deployment(self) -> None:
        hpas = [objects.horizontal_pod_autoscaler("transformer", 3)]
        deployments = [objects.deployment("transformer", 1), objects.deployment("predictor", 2)]
        assert standard_state("florence2-transformer", hpas, deployments) == {"desired": 3.0}
        assert standard_state("florence2-predictor", hpas, deployments) == {"desired": 2.0}
        assert standard_state("florence2-other", hpas, deployments) == {"desired": None}

    def test_an_hpa_that_hasn_t_looked_yet_wants_nothing_known(self) -> None:
        assert standard_state("florence2-transformer", [objects.horizontal_pod_autoscaler("transformer", 0)], []) == {
            "desired": None
        }


class TestPanic:
    def test_begins_and_ends_are_read_out_of_the_log(self) -> None:
        line = {"severity": "INFO", "message": "PANICKING.", "knative.dev/key": "vision/florence2-predictor-00001"}
        assert read_line(json.dumps(line)) == ("vision/florence2-predictor-00001", True)
        assert read_line(json.dumps({**line, "message": "Un-panicking."}))[1] is False  # type: ignore[index]

    @pytest.mark.parametrize(
        "line",
        [
            "",
            "PANICKING.",
            "[1, 2]",
            '"PANICKING."',
            '{"message": "PANICKING."}',
            '{"message": "not PANICKING. at all", "knative.dev/key": "a/b"}',
            '{"message": "PANICKING.", "knative',
        ],
    )
    def test_all_other_lines_say_nothing(self, line: str) -> None:
        assert read_line(line) is None
