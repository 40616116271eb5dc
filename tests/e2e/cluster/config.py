"""Where the cluster's files and addresses are."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
GO = HERE.parents[1] / "tools" / "go"
VERSIONS = tomllib.loads((HERE / "versions.toml").read_text())

# Kept, outside of the repository.
CACHE = Path(os.environ.get("FLORENCE2_CACHE", Path.home() / ".cache" / "florence2-kserve")).absolute() / "e2e"
BIN = CACHE / "bin"
KEYS = CACHE / "keys"  # what each kept thing was made from
MANIFESTS = CACHE / "manifests.yaml"
REGISTRY = CACHE / "registry"  # the registry's images
CONTAINERD = CACHE / "containerd"  # the same, unpacked for running

# Gone after `down`.
RUN = CACHE / "run"
PKI = RUN / "pki"
KUBECONFIG = RUN / "kubeconfig"
CGROUP = "florence2-e2e"

# 198.18.0.0/15 is set aside for tests of networks (RFC 2544): nobody's real network is hidden by it.
NETWORK = "198.18.0.0/15"
POD_CIDR = "198.18.0.0/16"
NODE_POD_CIDR = "198.18.0.0/24"
SERVICE_CIDR = "198.19.0.0/16"
API_SERVICE_IP = "198.19.0.1"
DNS_IP = "198.19.0.10"
NODE_IP = "198.18.255.254"
HOST_IP = "198.18.255.253"  # this machine's end of the wire to the node
HOST_LINK = "florence2-e2e"

NODE = "node"
DOMAIN = "example.test"  # under which Knative and KServe name what the ingress serves
API_SERVER = f"https://{NODE_IP}:6443"
REGISTRY_ADDRESS = f"{NODE_IP}:5000"
