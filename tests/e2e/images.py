"""This checkout's images, built from its Dockerfile and put where the cluster finds them."""

from __future__ import annotations

import subprocess
from typing import Any

from tests.images import build

from .kube import Cluster

TARGETS = ("transformer", "predictor")


def push_all(cluster: Cluster) -> dict[str, dict[str, str]]:
    """Builds and pushes the images; what hasn't changed costs seconds.

    Args:
        cluster: Whose registry takes them.

    Returns:
        The chart's image value of each target: repository, tag, pullPolicy.
    """
    return {target: push(cluster, target) for target in TARGETS}


def push(cluster: Cluster, target: str) -> dict[str, Any]:
    """Builds and pushes one image, and returns the chart's image value of it."""
    image = build.build(target)
    # Named by its content, so that a change is a rollout and the same thing is not pulled again.
    tag = subprocess.run(
        ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image],
        check=True, capture_output=True, text=True,
    ).stdout.strip()[:12]  # fmt: skip
    repository = f"{cluster.registry}/florence2-{target}"
    # Not compressed: nothing but this machine's disk lies between here and the node.
    subprocess.run(
        ["buildah", "push", "--quiet", "--tls-verify=false", "--disable-compression", image, f"docker://{repository}:{tag}"],
        check=True, timeout=600,
    )  # fmt: skip
    return {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"}
