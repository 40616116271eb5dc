"""Sampling a cluster, against a server on loopback that answers as its API does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from florence2_loadtest.cluster.api import ClusterError
from florence2_loadtest.cluster.panic import PanicWatch
from florence2_loadtest.cluster.sampler import Sampler, find_service
from florence2_loadtest.cluster.service import read_service

from . import cluster_objects as objects
from .cluster_api import AUTOSCALER, KINDS, LOG, SERVICE, ClusterApi

pytestmark = pytest.mark.slow
KEY = "vision/florence2-predictor-00001"


@pytest.fixture
def cluster() -> Iterator[ClusterApi]:
    """A cluster with the service at zero, in Knative mode."""
    with ClusterApi() as api:
        api.serve(objects.inference_service())
        for component in ("transformer", "predictor"):
            api.put("podautoscalers", objects.pod_autoscaler(component, 0, 0))
            api.put("serverlessservices", objects.serverless_service(component, "Proxy"))
        yield api


def sampler_of(cluster: ClusterApi) -> Sampler:
    api = cluster.connect()
    return Sampler(api, find_service(api, objects.NAME, objects.NAMESPACE), period_s=0.1)


def wait(is_so: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def log_line(message: str, key: str = KEY) -> str:
    return json.dumps({"severity": "INFO", "message": message, "knative.dev/key": key})


def test_samples_follow_what_happens(cluster: ClusterApi) -> None:
    with sampler_of(cluster) as sampler:
        wait(lambda: sampler.now.get("predictor", {}).get("panicking") == 0)
        assert sampler.now["predictor"] == {
            "ready": 0, "pending": 0, "terminating": 0,
            "desired": 0, "actual": 0, "activator_in_path": 1, "panicking": 0,
        }  # fmt: skip
        first, second = objects.pod("predictor"), objects.pod("predictor", 1)
        cluster.put("podautoscalers", objects.pod_autoscaler("predictor", 2, 0))
        cluster.put("pods", first, second)
        wait(lambda: sampler.now["predictor"]["pending"] == 2)
        assert sampler.now["predictor"]["desired"] == 2
        cluster.put("pods", objects.pod("predictor", ready=1_800_000_009))
        cluster.put("serverlessservices", objects.serverless_service("predictor", "Serve"))
        wait(lambda: sampler.now["predictor"]["activator_in_path"] == 0)
        assert (sampler.now["predictor"]["ready"], sampler.now["predictor"]["pending"]) == (1, 1)
        cluster.put("pods", objects.pod("predictor", ready=1_800_000_009, is_ending=True))
        wait(lambda: sampler.now["predictor"]["terminating"] == 1)
        cluster.delete("pods", first, second)
        wait(lambda: sampler.now["predictor"]["pending"] == 0)
        assert sampler.now["transformer"]["ready"] == 0
    origin = time.monotonic()
    assert [pod.gone_s is not None for pod in sampler.pods(origin)] == [True, True]
    assert all(sample.second < 0 for sample in sampler.samples(origin)[:-1])


def test_phases_of_a_pod_are_timed_as_they_come(cluster: ClusterApi) -> None:
    with sampler_of(cluster) as sampler:
        wait(lambda: bool(sampler.now))
        cluster.put("pods", objects.pod("predictor", phase="Pending"))
        time.sleep(0.4)
        cluster.put("pods", objects.pod("predictor", scheduled=1))
        cluster.put("events", objects.pulled(objects.pod("predictor"), 2))
        time.sleep(0.4)
        cluster.put("pods", objects.pod("predictor", scheduled=1, started=2))
        cluster.put("pods", objects.pod("predictor", scheduled=1, started=2, is_loaded=True))
        time.sleep(0.4)
        cluster.put("pods", objects.pod("predictor", scheduled=1, started=2, is_loaded=True, ready=9))
        wait(lambda: sampler.now["predictor"]["ready"] == 1)
    (pod,) = sampler.pods(0.0)
    phases = [pod.scheduled_s, pod.pulled_s, pod.started_s, pod.loaded_s, pod.ready_s]
    assert None not in phases
    assert phases == sorted(phases, key=lambda seconds: seconds or 0.0)
    # A second's precision would make all of them equal.
    assert 0.3 < (pod.scheduled_s or 0) < (pod.started_s or 0) < (pod.ready_s or 0)


def test_panics_are_those_that_the_autoscaler_s_log_tells(cluster: ClusterApi) -> None:
    cluster.say(log_line("PANICKING."))
    cluster.say(log_line("PANICKING.", "vision/florence2-other-00001"))
    with sampler_of(cluster) as sampler:
        wait(lambda: sampler.now.get("predictor", {}).get("panicking") == 1)
        assert sampler.now["transformer"]["panicking"] == 0, "it was panicking before, and the other one is another"
        cluster.say(log_line("Un-panicking."))
        wait(lambda: sampler.now["predictor"]["panicking"] == 0)
        cluster.say(log_line("PANICKING.", "vision/florence2-transformer-00001"))
        wait(lambda: sampler.now["transformer"]["panicking"] == 1)


def test_panics_of_a_service_that_was_there_before_don_t_count(cluster: ClusterApi) -> None:
    service = objects.inference_service()
    service["metadata"]["creationTimestamp"] = objects.timestamp(time.time() - 5)
    cluster.serve(service)
    with sampler_of(cluster) as sampler:
        wait(lambda: sampler.now.get("predictor", {}).get("panicking") == 0)
    (earlier,) = [query for path, query in cluster.asked if path == LOG and "follow" not in query]
    assert 5 <= int(earlier["sinceSeconds"][0]) <= 60


def test_what_may_not_be_asked_is_unknown_and_noted_once(cluster: ClusterApi) -> None:
    cluster.refusals |= {LOG: 403, KINDS["serverlessservices"]: 403}
    cluster.put("pods", objects.pod("transformer", ready=1))
    with sampler_of(cluster) as sampler:
        wait(lambda: len(sampler.notes(0)) == 2)
        wait(lambda: sampler.now.get("transformer", {}).get("ready") == 1)
        time.sleep(2.5)  # it asks again, and doesn't say it again
        assert sampler.now["transformer"]["panicking"] is None
        assert sampler.now["transformer"]["activator_in_path"] is None
        assert sampler.now["transformer"]["desired"] == 0
    told = sorted(text for _, text in sampler.notes(0))
    assert told[0] == "serverlessservices: the API said 403 Forbidden"
    assert told[1].startswith("whether the autoscaler panics isn't known: its log can't be read: the API said 403")
    assert len(told) == 2


def test_an_api_that_goes_away_leaves_a_gap_and_is_asked_again(cluster: ClusterApi) -> None:
    here, gone = objects.pod("transformer", ready=1), objects.pod("transformer", 1)
    cluster.put("pods", here, gone)
    with sampler_of(cluster) as sampler:
        wait(lambda: sampler.now.get("transformer", {}).get("ready") == 1)
        cluster.refusals[KINDS["pods"]] = 500
        cluster.break_watches()
        wait(lambda: sampler.now["transformer"]["ready"] is None)
        cluster.delete("pods", gone)
        cluster.refusals.clear()
        cluster.mend_watches()
        wait(lambda: sampler.now["transformer"]["ready"] == 1)
        assert sampler.now["transformer"]["pending"] == 0
    assert any("pods: the API said 500" in text for _, text in sampler.notes(0))
    assert sum(sample.components["transformer"]["ready"] is None for sample in sampler.samples(0)) >= 1
    assert {pod.name: pod.gone_s is not None for pod in sampler.pods(0)} == {
        here["metadata"]["name"]: False,
        gone["metadata"]["name"]: True,
    }


def test_an_object_that_can_t_be_read_leaves_a_gap_rather_than_what_was_known_last(cluster: ClusterApi) -> None:
    strange = objects.pod("transformer", started=1, is_loaded=True)
    del strange["spec"]
    with sampler_of(cluster) as sampler:
        wait(lambda: sampler.now.get("transformer", {}).get("ready") == 0)
        cluster.put("pods", strange)
        wait(lambda: sampler.now["transformer"]["ready"] is None)
        cluster.delete("pods", strange)
        cluster.put("pods", objects.pod("transformer", 1, ready=1))
        wait(lambda: sampler.now["transformer"]["ready"] == 1)
    assert "pods: KeyError: 'spec'" in [text for _, text in sampler.notes(0)]


def test_that_panics_aren_t_known_is_noted_once_an_outage(cluster: ClusterApi) -> None:
    def asked() -> int:
        return sum(path == AUTOSCALER for path, _ in list(cluster.asked))

    notes: list[str] = []
    api = cluster.connect()
    watch = PanicWatch(api, find_service(api, objects.NAME, objects.NAMESPACE), notes.append, look_s=0.02)
    cluster.refusals[AUTOSCALER] = 503
    watch.start()
    try:
        wait(lambda: asked() >= 4)
        assert watch.is_panicking("predictor") is None
        assert len(notes) == 1
        cluster.refusals.clear()
        wait(lambda: watch.is_panicking("predictor") is False)
        cluster.refusals[AUTOSCALER] = 503
        wait(lambda: len(notes) == 2)
    finally:
        watch.stop()
    assert notes[0] == notes[1]
    assert "the API said 503" in notes[0]


def test_a_version_that_is_too_old_only_asks_for_a_new_list(cluster: ClusterApi) -> None:
    with sampler_of(cluster) as sampler:
        wait(lambda: sampler.now.get("transformer", {}).get("ready") == 0)
        cluster.refusals[KINDS["pods"]] = 410
        cluster.break_watches()
        time.sleep(0.3)
        cluster.put("pods", objects.pod("transformer", ready=1))
        cluster.refusals.clear()
        cluster.mend_watches()
        wait(lambda: sampler.now["transformer"]["ready"] == 1)
    assert sampler.notes(0) == []


def test_a_pod_that_no_node_takes_is_noted(cluster: ClusterApi) -> None:
    waiting, other = objects.pod("predictor"), objects.pod("predictor")
    other["metadata"]["name"] = "another-service-predictor-00001-deployment-1"
    with sampler_of(cluster) as sampler:
        wait(lambda: bool(sampler.now))
        time.sleep(0.3)
        for of in (waiting, other, waiting):
            cluster.put("events", objects.unschedulable(of))
        wait(lambda: bool(sampler.notes(0)))
        time.sleep(0.3)
    (note,) = sampler.notes(0)
    assert note[1] == (
        f"{waiting['metadata']['name']}: FailedScheduling: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )


def test_standard_mode_asks_other_objects() -> None:
    with ClusterApi() as cluster:
        cluster.serve(objects.inference_service("Standard", fewest=1))
        cluster.put("pods", objects.pod("transformer", ready=1), objects.pod("transformer", 1))
        cluster.put("horizontalpodautoscalers", objects.horizontal_pod_autoscaler("transformer", 2))
        cluster.put("deployments", objects.deployment("transformer", 1), objects.deployment("predictor", 2))
        with sampler_of(cluster) as sampler:
            wait(lambda: sampler.now.get("predictor", {}).get("desired") == 2)
            wait(lambda: sampler.now["transformer"]["desired"] == 2)
            assert sampler.now["transformer"] == {"ready": 1, "pending": 1, "terminating": 0, "desired": 2}
        assert not [path for path, _ in cluster.asked if "knative" in path]


def test_each_kind_is_asked_for_by_selector_and_in_the_namespace_alone(cluster: ClusterApi) -> None:
    with sampler_of(cluster) as sampler:
        wait(lambda: sampler.now.get("transformer", {}).get("panicking") == 0)
    lists = {path: query for path, query in cluster.asked if path in KINDS.values() and "watch" not in query}
    assert lists[KINDS["pods"]]["labelSelector"] == ["serving.kserve.io/inferenceservice=florence2"]
    assert lists[KINDS["events"]]["fieldSelector"] == ["involvedObject.kind=Pod"]
    of_knative = ["serving.knative.dev/service in (florence2-transformer,florence2-predictor)"]
    assert lists[KINDS["podautoscalers"]]["labelSelector"] == of_knative
    assert not [path for path, _ in cluster.asked if "secrets" in path]


def test_a_service_that_isn_t_there_is_named(cluster: ClusterApi) -> None:
    api = cluster.connect()
    with pytest.raises(ClusterError, match="inferenceservice vision/other: the API said 404"):
        find_service(api, "other", "vision")
    cluster.refusals[SERVICE] = 403
    with pytest.raises(ClusterError, match="inferenceservice vision/florence2: the API said 403"):
        find_service(api, "florence2", "vision")
    assert read_service(objects.inference_service()).name == "florence2"
