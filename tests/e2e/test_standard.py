"""The chart in Standard mode: REST and gRPC, balance over a headless Service, HPA, rollouts under load."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .common import assert_answers, assert_gone, assert_locked_down, enlarged, run_conformance, share_of_rows
from .conftest import OUTPUT
from .kube import Kube
from .load import Load, Question
from .release import Release
from .timeline import Timeline

NAMESPACE = "f2-standard"
TWO_PREDICTORS = {"predictor": {"autoscaling": {"class": "none", "minReplicas": 2, "maxReplicas": 2}}}
STEADY = {"transformer": {"autoscaling": {"class": "none", "minReplicas": 1, "maxReplicas": 1}}, **TWO_PREDICTORS}
ON_CPU = {
    "transformer": {
        "autoscaling": {
            "class": "hpa",
            "minReplicas": 1,
            "maxReplicas": 3,
            "hpa": {"targetCPUUtilizationPercentage": 50},
        },
        "resources": {"requests": {"cpu": "100m"}},
    },
    **TWO_PREDICTORS,
}


@pytest.fixture(scope="module")
def release(kube: Kube, images: dict[str, dict[str, str]]) -> Iterator[Release]:
    """The chart, installed once for this module."""
    kube.remove_namespace(NAMESPACE)
    installed = Release(kube, NAMESPACE, "Standard", images)
    installed.apply(STEADY)
    yield installed
    kube.remove_namespace(NAMESPACE)


@pytest.mark.parametrize("grpc", [False, True], ids=["rest", "grpc"])
def test_answers_through_the_ingress_are_those_of_the_process(
    release: Release, questions: list[Question], grpc: bool
) -> None:
    assert_answers(release, questions, grpc=grpc)


def test_conformance_suite_passes_through_the_ingress(release: Release) -> None:
    print(run_conformance(release, grpc=True))


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


def test_a_new_predictor_gets_its_share(release: Release, kube: Kube, questions: list[Question]) -> None:
    """The predictor that replaced the deleted one is found by transformers whose connections live on."""
    shares = share_of_rows(release, questions)
    print(shares)
    assert all(0.4 <= share <= 0.6 for share in shares.values()), shares


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


def test_hpa_scales_the_transformer_out_and_in(release: Release, kube: Kube, questions: list[Question]) -> None:
    release.apply(ON_CPU)
    # Pictures as phones take them: to decode and to shrink them is what a transformer's processor does.
    questions = [Question(enlarged(question.image), question.task, question.text) for question in questions]
    with Timeline(kube, NAMESPACE, "Standard") as timeline:
        with Load(release.connect, questions, senders=8) as load:
            timeline.load = load
            timeline.note("8 requests in flight")
            kube.wait("more transformers", 180, lambda: timeline.most("transformer_ready") > 1, NAMESPACE)
            load.wait_for(20, 120)
        timeline.note("no requests")
        kube.wait("one transformer", 240, lambda: len(kube.pods(NAMESPACE, "transformer")) == 1, NAMESPACE)
        timeline.note("one transformer")
        kube.wait("its sample", 10, lambda: timeline.rows[-1]["transformer_pods"] == 1)
    timeline.write(OUTPUT / "standard-hpa.csv")
    print(f"{load.outcome}\n{timeline.changes()}")
    assert not load.outcome.failed, load.outcome.failed


def test_uninstall_leaves_nothing(release: Release) -> None:
    release.uninstall()
    assert_gone(release)
