"""The chart in both deployment modes: answers, balance, rollouts under load, and no trace left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from .common import assert_answers, assert_gone, assert_locked_down, kill, run_conformance, share_of_rows
from .kube import Cluster, Kube
from .load import Load, Question
from .release import Release

KNATIVE, STANDARD = "Knative", "Standard"


def steady(mode: str, **settings: Any) -> dict[str, Any]:
    """Values by which nothing scales while other things are looked at: one transformer, two predictors."""
    by_hand = {"class": "none"} if mode == STANDARD else {}  # Knative always scales; equal bounds hold it
    return {
        "transformer": {"autoscaling": {**by_hand, "minReplicas": 1, "maxReplicas": 1}, "settings": settings},
        "predictor": {"autoscaling": {**by_hand, "minReplicas": 2, "maxReplicas": 2}},
    }


@pytest.fixture(scope="module", params=[KNATIVE, STANDARD])
def release(request: pytest.FixtureRequest, kube: Kube, images: dict[str, dict[str, str]]) -> Iterator[Release]:
    """The chart, installed once for each mode."""
    mode: str = request.param
    namespace = f"f2-{mode.lower()}"
    kube.remove_namespace(namespace)
    installed = Release(kube, namespace, mode, images)
    installed.apply(steady(mode))
    print(f"\n{kube.kubectl('get', 'isvc,ksvc,pods', '-A')}")
    yield installed
    kube.remove_namespace(namespace)


def test_answers_through_the_ingress_are_those_of_the_process(release: Release, questions: list[Question]) -> None:
    assert_answers(release, questions)
    if release.offers_grpc:
        assert_answers(release, questions, grpc=True)


def test_conformance_suite_passes_through_the_ingress(release: Release) -> None:
    print(run_conformance(release))


def test_helm_test_passes(release: Release, kube: Kube) -> None:
    kube.helm("test", release.name, "-n", release.namespace, "--timeout", "2m")


def test_pods_are_locked_down(release: Release) -> None:
    assert_locked_down(release)


def test_two_predictors_share_the_rows(release: Release, questions: list[Question]) -> None:
    shares = share_of_rows(release, questions)
    print(shares)
    assert len(shares) == 2
    assert all(0.4 <= share <= 0.6 for share in shares.values()), shares


def test_nothing_is_lost_when_a_predictor_is_deleted(release: Release, kube: Kube, questions: list[Question]) -> None:
    namespace, before = release.namespace, release.transformer_retries()
    with Load(release.connect, questions) as load:
        load.wait_for(10, 60)
        victim = kube.ready_pods(namespace, "predictor")[0]
        kube.core.delete_namespaced_pod(victim, namespace)
        kube.wait("another predictor", 120, lambda: len(kube.ready_pods(namespace, "predictor")) == 2, namespace)
        load.wait_for(10, 60)
    assert victim not in kube.ready_pods(namespace, "predictor")
    _assert_unnoticed(release, load, before)


def test_a_new_predictor_gets_its_share(release: Release, kube: Kube, questions: list[Question]) -> None:
    """The predictor that replaced the deleted one is found by transformers whose connections live on, as they age."""
    began, before = time.monotonic(), release.rows_by_predictor()

    def both_asked() -> bool:
        return all(rows > before[pod] for pod, rows in release.rows_by_predictor().items())

    with Load(release.connect, questions):
        kube.wait("rows for both", 90, both_asked, release.namespace)
    found = time.monotonic() - began
    shares = share_of_rows(release, questions)
    print(f"found within {found:.0f} s; {shares}")
    assert all(0.4 <= share <= 0.6 for share in shares.values()), shares


def test_nothing_is_lost_when_a_predictor_is_killed(
    own_cluster: Cluster, release: Release, kube: Kube, questions: list[Question]
) -> None:
    """As when it runs out of memory: calls that it had are asked again by the transformer."""
    namespace, before = release.namespace, release.transformer_retries()
    rows = release.rows_by_predictor()
    victim = max(rows, key=lambda pod: rows[pod])
    with Load(release.connect, questions, senders=6) as load:
        load.wait_for(10, 60)
        kill(kube.core.read_namespaced_pod(victim, namespace).metadata.uid)
        kube.wait("its end", 30, lambda: victim not in kube.ready_pods(namespace, "predictor"), namespace)
        kube.wait("its next start", 120, lambda: len(kube.ready_pods(namespace, "predictor")) == 2, namespace)
        load.wait_for(10, 60)
    assert _assert_unnoticed(release, load, before) > 0, "the kill hit no call: nothing was seen of its loss"


def test_upgrade_and_rollback_under_load_lose_nothing(release: Release, questions: list[Question]) -> None:
    with Load(release.connect, questions, senders=2) as load:
        load.wait_for(5, 60)
        release.apply(steady(release.mode, max_rows=16))
        load.wait_for(5, 60)
        upgraded = str(load.outcome)
        release.rollback()
        load.wait_for(5, 60)
    print(f"after the upgrade: {upgraded}; after the rollback: {load.outcome}")
    load.assert_nothing_lost()


def test_uninstall_leaves_nothing(release: Release) -> None:
    release.uninstall()
    assert_gone(release)


def _assert_unnoticed(release: Release, load: Load, before: float) -> float:
    """Fails if clients lost anything or had to ask again; returns how often the transformer did since `before`."""
    asked_again = release.transformer_retries() - before
    print(f"{load.outcome}; {asked_again:g} by the transformer")
    load.assert_nothing_lost()
    assert load.outcome.retries == 0, "the transformer asks again, clients notice nothing"
    return asked_again
