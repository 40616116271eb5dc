"""A real one-node cluster for tests, made from package registries alone: see README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cluster import addresses, down, up, why_not

if TYPE_CHECKING:
    from ..kube import Cluster

__all__ = ["addresses", "down", "up", "use", "why_not"]


def use() -> Cluster:
    """Brings the cluster up, where it isn't, and returns it as tests use it. It stays up."""
    from ..kube import Cluster
    from .config import BIN, KUBECONFIG

    up()
    known = addresses()
    return Cluster(KUBECONFIG, known["INGRESS"], known["REGISTRY"], (BIN,))
