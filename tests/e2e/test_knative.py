"""The chart in Knative mode: answers, balance, rollouts under load, to zero and back."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from .common import assert_answers, assert_gone, assert_locked_down, run_conformance, share_of_rows
from .conftest import OUTPUT
from .kube import Kube
from .load import Load, Question
from .release import Release
from .timeline import Timeline

NAMESPACE = "f2-knative"
TWO_PREDICTORS = {"predictor": {"autoscaling": {"minReplicas": 2, "maxReplicas": 2}}}
# Wide open at first, so that nothing scales while the other things are looked at.
STEADY = {"transformer": {"autoscaling": {"minReplicas": 1, "maxReplicas": 1}}, **TWO_PREDICTORS}
TO_ZERO = {
    "transformer": {"autoscaling": {"minReplicas": 0, "maxReplicas": 3, "kpa": {"target": 2, "window": "10s"}}},
    "predictor": {"autoscaling": {"minReplicas": 0, "maxReplicas": 2, "kpa": {"target": 4, "window": "10s"}}},
}


@pytest.fixture(scope="module")
def release(kube: Kube, images: dict[str, dict[str, str]]) -> Iterator[Release]:
    """The chart, installed once for this module."""
    kube.remove_namespace(NAMESPACE)
    installed = Release(kube, NAMESPACE, "Knative", images)
    installed.apply(STEADY)
    yield installed
    kube.remove_namespace(NAMESPACE)


def test_answers_through_the_ingress_are_those_of_the_process(release: Release, questions: list[Question]) -> None:
    assert_answers(release, questions)


def test_conformance_suite_passes_through_the_ingress(release: Release) -> None:
    print(run_conformance(release, grpc=False))


def test_helm_test_passes(release: Release, kube: Kube) -> None:
    kube.helm("test", release.name, "-n", NAMESPACE, "--timeout", "2m")


def test_pods_are_locked_down(release: Release) -> None:
    assert_locked_down(release)


def test_two_predictors_share_the_rows(release: Release, questions: list[Question]) -> None:
    shares = share_of_rows(release, questions)
    print(shares)
    assert len(shares) == 2
    assert all(0.4 <= share <= 0.6 for share in shares.values()), shares


def test_nothing_is_lost_when_a_predictor_is_deleted(release: Release, kube: Kube, questions: list[Question]) -> None:
    with Load(release.connect, questions) as load:
        load.wait_for(10, 60)
        victim = kube.ready_pods(NAMESPACE, "predictor")[0]
        kube.core.delete_namespaced_pod(victim, NAMESPACE)
        kube.wait("another predictor", 120, lambda: len(kube.ready_pods(NAMESPACE, "predictor")) == 2, NAMESPACE)
        load.wait_for(10, 60)
    print(load.outcome)
    assert victim not in kube.ready_pods(NAMESPACE, "predictor")
    assert not load.outcome.failed, load.outcome.failed
    assert not load.outcome.wrong


def test_upgrade_and_rollback_under_load_lose_nothing(release: Release, questions: list[Question]) -> None:
    with Load(release.connect, questions, senders=2) as load:
        load.wait_for(5, 60)
        release.apply({**STEADY, "transformer": {**STEADY["transformer"], "settings": {"max_rows": 16}}})
        load.wait_for(5, 60)
        upgraded = str(load.outcome)
        release.rollback()
        load.wait_for(5, 60)
    print(f"after the upgrade: {upgraded}; after the rollback: {load.outcome}")
    assert not load.outcome.failed, load.outcome.failed
    assert not load.outcome.wrong


def test_to_zero_cold_start_out_and_back(release: Release, kube: Kube, questions: list[Question]) -> None:
    release.apply(TO_ZERO)
    with Timeline(kube, NAMESPACE, "Knative") as timeline:
        timeline.note("no requests")
        kube.wait("scale to zero", 120, lambda: not kube.pods(NAMESPACE), NAMESPACE)
        timeline.note("zero; one request")
        began = time.monotonic()
        with release.connect() as client:
            first = questions[0]
            assert client.infer(first.image, first.task, first.text) == first.answer
            cold = time.monotonic() - began
            timeline.note(f"answered after {cold:.1f} s, {client.retries_made} retries")
        with Load(release.connect, questions, senders=10) as load:
            timeline.load = load
            timeline.note("10 requests in flight")
            kube.wait("more transformers", 120, lambda: timeline.most("transformer_ready") > 1, NAMESPACE)
            load.wait_for(20, 120)
        timeline.note("no requests")
        kube.wait("scale to zero again", 180, lambda: not kube.pods(NAMESPACE), NAMESPACE)
        timeline.note("zero")
        time.sleep(1.5)
    timeline.write(OUTPUT / "knative-scale.csv")
    print(f"cold request {cold:.1f} s; {load.outcome}\n{timeline.changes()}")
    assert not load.outcome.failed, load.outcome.failed
    assert not load.outcome.wrong


def test_uninstall_leaves_nothing(release: Release) -> None:
    release.uninstall()
    assert_gone(release)
