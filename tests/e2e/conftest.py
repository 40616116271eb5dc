"""The cluster, the images and the expected answers that all e2e tests share."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from florence2_kserve.client import Florence2Client
from florence2_kserve.local import LocalService
from florence2_kserve.tiny.scenes import held_out_scene

from .kube import Cluster, Kube
from .load import Question
from .release import ROOT

# One text task among them, boxes, polygons, a word.
TASKS = (
    "<CAPTION>",
    "<OD>",
    "<CAPTION_TO_PHRASE_GROUNDING>",
    "<REFERRING_EXPRESSION_SEGMENTATION>",
    "<OCR_WITH_REGION>",
)
SCENES = (30, 36, 41)
OUTPUT = Path(os.environ.get("FLORENCE2_E2E_OUTPUT", ROOT / "e2e-output"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything here."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "cluster" not in item.path.parts:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster that FLORENCE2_E2E_KUBECONFIG names, else one of the tests' own, brought up if it isn't."""
    given = os.environ.get("FLORENCE2_E2E_KUBECONFIG")
    if given:
        missing = [name for name in ("FLORENCE2_E2E_INGRESS", "FLORENCE2_E2E_REGISTRY") if name not in os.environ]
        if missing:
            pytest.fail(f"FLORENCE2_E2E_KUBECONFIG needs {' and '.join(missing)} beside it: see docs/deploy.md")
        yield Cluster(Path(given), os.environ["FLORENCE2_E2E_INGRESS"], os.environ["FLORENCE2_E2E_REGISTRY"])
        return
    from . import cluster as own

    if reason := own.why_not():
        pytest.skip(f"no cluster can be made here: {reason}")
    yield own.use()


@pytest.fixture(scope="session")
def own_cluster(cluster: Cluster) -> Cluster:
    """The cluster, where it is the tests' own: what changes nodes and settings of all is for that alone."""
    if "FLORENCE2_E2E_KUBECONFIG" in os.environ:
        pytest.skip("it changes the cluster, which isn't the tests' own")
    return cluster


@pytest.fixture(scope="session")
def kube(cluster: Cluster) -> Kube:
    """Commands and questions to the cluster."""
    return Kube(cluster)


@pytest.fixture(scope="session")
def images(cluster: Cluster) -> dict[str, dict[str, str]]:
    """The images of this checkout, in the cluster's registry."""
    from .images import push_all

    return push_all(cluster)


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """Questions with the answers that the same model gives outside of any cluster."""
    asked = []
    for index in SCENES:
        scene = held_out_scene(index)
        with io.BytesIO() as file:
            Image.fromarray(scene.image).save(file, "PNG")
            picture = file.getvalue()
        for task in TASKS:
            if (example := scene.truth(task)) is not None:
                asked.append(Question(picture, task, example.text or None))
    with LocalService() as service, Florence2Client(service.rest_url) as client:
        for question in asked:
            question.answer = client.infer(question.image, question.task, question.text)
    return asked
