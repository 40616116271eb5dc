"""What is applied to the cluster: the projects' own manifests, from their Go modules, fitted to one small node.

Changed in them:
- Images are those of the cluster's registry.
- No resource requests and limits, no spreading over nodes, no autoscaling of the projects' own parts; and no
  liveness probes, which on a busy machine restart what is only slow.
- KServe: no cert-manager (the certificate is made here), no kube-rbac-proxy before the metrics, no conversion
  webhooks, no LLM and local-model controllers. Inference services are reached by the Gateway API.
- Knative: Pod fields that charts for GPUs need are allowed; windows are short, unless a revision says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from .config import DNS_IP, DOMAIN, NODE_IP, REGISTRY_ADDRESS

Manifest = dict[str, Any]

# Put in when the cluster starts, since certificates are new each time.
CA_BUNDLE = "Q0FfQlVORExF"
KSERVE_WEBHOOK = ("kserve", "kserve-webhook-server-cert", "kserve-webhook-server-service")
METRICS_SERVER = ("kube-system", "metrics-server-cert", "metrics-server")
SERVERS = (
    KSERVE_WEBHOOK,
    METRICS_SERVER,
)  # namespace, secret and service of what is served by a certificate made here

# Where the manifests, or the controllers that start the image, expect the program. Elsewhere it is /NAME.
ENTRYPOINTS = {
    "contour": "/bin/contour",
    "envoy": "/usr/local/bin/envoy",
    "kserve-manager": "/manager",
}
EXTERNAL_GATEWAY = ("contour-external", "knative-external")
INTERNAL_GATEWAY = ("contour-internal", "knative-local")

KNATIVE_FEATURES = (
    "affinity", "dnsconfig", "dnspolicy", "fieldref", "hostaliases", "init-containers", "nodeselector",
    "persistent-volume-claim", "persistent-volume-write", "priorityclassname", "runtimeclassname", "schedulername",
    "securitycontext", "tolerations", "topologyspreadconstraints", "volumes-emptydir",
)  # fmt: skip


def render(modules: Mapping[str, Path], images: Mapping[str, str]) -> Iterator[Manifest]:
    """All manifests.

    Args:
        modules: Folder of each Go module that brings some.
        images: Each image as a pod names it.
    """
    parts = (
        _node(),
        _ingress(modules, images),
        _knative(modules, images),
        _kserve(modules["github.com/kserve/kserve"], images),
        _metrics_server(modules["sigs.k8s.io/metrics-server"], images),
    )
    seen = set()
    for part in parts:
        for manifest in part:
            # net-gateway-api and serving bring some things both.
            name = (manifest["kind"], manifest["metadata"].get("namespace"), manifest["metadata"]["name"])
            if name not in seen:
                seen.add(name)
                yield _slim(manifest)


def _node() -> Iterator[Manifest]:
    """DNS, which runs on the node and not in a pod, and its rights."""
    rules = [
        {"apiGroups": [""], "resources": ["services", "namespaces", "pods"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    group = "rbac.authorization.k8s.io"
    yield {"apiVersion": f"{group}/v1", "kind": "ClusterRole", "metadata": {"name": "coredns"}, "rules": rules}
    yield {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "coredns"},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "coredns"},
        "subjects": [{"apiGroup": group, "kind": "User", "name": "coredns"}],
    }
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
        "spec": {"clusterIP": DNS_IP, "ports": ports},
    }
    yield {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns-node",
            "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [NODE_IP], "conditions": {"ready": True}}],
        "ports": ports,
    }


def _ingress(modules: Mapping[str, Path], images: Mapping[str, str]) -> Iterator[Manifest]:
    """Contour, which starts an Envoy for each of two gateways: one for the outside, one inside the cluster."""
    examples = modules["github.com/projectcontour/contour"] / "examples"
    yield from _load(examples / "gateway" / "00-crds.yaml", examples / "contour" / "01-crds.yaml")
    for manifest in _load(*sorted((examples / "gateway-provisioner").glob("0*.yaml"))):
        if manifest["kind"] == "Deployment":
            container = _containers(manifest)[0]
            container["image"] = images["contour"]
            container["args"] += [f"--contour-image={images['contour']}", f"--envoy-image={images['envoy']}"]
        yield manifest
    gateways = modules["knative.dev/net-gateway-api"] / "third_party" / "contour"
    for manifest in _load(gateways / "gateway-external.yaml", gateways / "gateway-internal.yaml"):
        if manifest["kind"] == "ContourDeployment":
            envoy, contour = manifest["spec"]["envoy"], manifest["spec"]["contour"]
            envoy["deployment"]["replicas"] = contour["deployment"]["replicas"] = 1
            envoy["resources"] = {"requests": {"cpu": "10m"}}
            envoy["networkPublishing"] = {"type": "ClusterIPService"}  # nobody hands out load balancers here
            # Contour waits for these kinds unless told that the cluster hasn't got them.
            contour["disabledFeatures"] = ["grpcroutes", "backendtlspolicies", "tlsroutes"]
        if manifest["kind"] == "Gateway":
            listeners = manifest["spec"]["listeners"]
            manifest["spec"]["listeners"] = [listener for listener in listeners if listener["protocol"] == "HTTP"]
        yield manifest


def _knative(modules: Mapping[str, Path], images: Mapping[str, str]) -> Iterator[Manifest]:
    core = modules["knative.dev/serving"] / "config" / "core"
    gateway = modules["knative.dev/net-gateway-api"]
    files = [core / "100-namespace.yaml", core / "200-serviceaccount.yaml", core / "999-cache.yaml"]
    for folder in ("200-roles", "300-resources", "configmaps", "deployments", "webhooks"):
        files += sorted((core / folder).glob("*.yaml"))
    for module in ("knative.dev/networking", "knative.dev/caching"):
        files += sorted((modules[module] / "config").glob("*.yaml"))
    files += [gateway / "config" / "200-clusterrole.yaml", gateway / "config" / "300-controller.yaml"]
    files += [gateway / "third_party" / "contour" / "config-gateway.yaml"]
    settings = {
        "config-autoscaler": {
            "stable-window": "10s",
            "scale-to-zero-grace-period": "10s",
            "allow-zero-initial-scale": "true",
        },
        "config-deployment": {
            "registries-skipping-tag-resolving": REGISTRY_ADDRESS,  # Knative would ask for digests over HTTPS
            "queue-sidecar-cpu-request": "10m",
            "queue-sidecar-memory-request": "32Mi",
        },
        "config-domain": {DOMAIN: ""},
        "config-features": {f"kubernetes.podspec-{feature}": "enabled" for feature in KNATIVE_FEATURES},
        "config-network": {
            "ingress-class": "gateway-api.ingress.networking.knative.dev",
            "autocreate-cluster-domain-claims": "true",
            # Else the activator gives up on pods that a busy node answers for late, and sends all through one address.
            "mesh-compatibility-mode": "disabled",
        },
    }
    programs = {
        f"ko://knative.dev/serving/cmd/{name}": images[f"knative-{name}"]
        for name in ("controller", "webhook", "autoscaler", "activator", "queue")
    }
    programs["ko://knative.dev/net-gateway-api/cmd/controller"] = images["net-gateway-api"]
    for manifest in _load(*files):
        if manifest["kind"] == "HorizontalPodAutoscaler":
            continue
        manifest = _replaced(manifest, programs)
        if manifest["kind"] == "ConfigMap":
            manifest.setdefault("data", {}).update(settings.get(manifest["metadata"]["name"], {}))
        yield manifest


def _kserve(module: Path, images: Mapping[str, str]) -> Iterator[Manifest]:
    yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kserve"}}
    for manifest in _load(module / "install" / module.name.partition("@")[2] / "kserve.yaml"):
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        of_others = "llm" in name or "localmodel" in name or name.startswith("inferencepools.")
        if of_others or kind in ("Certificate", "Issuer"):
            continue
        if kind == "CustomResourceDefinition":
            manifest["spec"].pop("conversion", None)
        if kind.endswith("WebhookConfiguration"):
            for webhook in manifest["webhooks"]:
                webhook["clientConfig"]["caBundle"] = CA_BUNDLE
        if kind == "Deployment":
            containers = manifest["spec"]["template"]["spec"]["containers"]
            containers[:] = [container for container in containers if container["name"] == "manager"]
            containers[0]["image"] = images["kserve-manager"]
            containers[0]["readinessProbe"]["initialDelaySeconds"] = 1
        if kind == "ClusterStorageContainer":
            manifest["spec"]["container"]["image"] = images["storage-initializer"]
        if kind == "ConfigMap" and name == "inferenceservice-config":
            _configure_kserve(manifest["data"], images)
        yield manifest


def _configure_kserve(data: dict[str, str], images: Mapping[str, str]) -> None:
    sidecar = {"cpuRequest": "10m", "memoryRequest": "32Mi"}
    changes: dict[str, dict[str, Any]] = {
        "ingress": {
            "enableGatewayApi": True,
            "kserveIngressGateway": "/".join(EXTERNAL_GATEWAY),
            "ingressGateway": "/".join(EXTERNAL_GATEWAY),
            "localGateway": "/".join(INTERNAL_GATEWAY),
            "localGatewayService": f"envoy-{INTERNAL_GATEWAY[1]}.{INTERNAL_GATEWAY[0]}.svc.cluster.local",
            "ingressClassName": "contour",
            "ingressDomain": DOMAIN,
            "disableIstioVirtualHost": True,
        },
        "storageInitializer": {"image": images["storage-initializer"], **sidecar},
        "agent": {"image": images["kserve-agent"], **sidecar},
        "batcher": {"image": images["kserve-agent"], **sidecar},
        "logger": {"image": images["kserve-agent"], **sidecar},
        "router": {"image": images["kserve-router"], **sidecar},
        "autoscaler": {"scaleDownStabilizationWindowSeconds": "15"},  # 300 is too long to watch in a test
    }
    for key, change in changes.items():
        data[key] = json.dumps({**json.loads(data[key]), **change})


def _metrics_server(module: Path, images: Mapping[str, str]) -> Iterator[Manifest]:
    _, secret, _ = METRICS_SERVER
    for manifest in _load(*sorted((module / "manifests" / "base").glob("*.yaml"))):
        if manifest["kind"] == "Kustomization":
            continue
        if manifest["kind"] == "APIService":
            manifest["spec"].pop("insecureSkipTLSVerify")
            manifest["spec"]["caBundle"] = CA_BUNDLE
        if manifest["kind"] == "Deployment":
            pod, container = manifest["spec"]["template"]["spec"], _containers(manifest)[0]
            container["image"] = images["metrics-server"]
            container["args"] = [
                "--secure-port=10250",
                "--tls-cert-file=/certificates/tls.crt",
                "--tls-private-key-file=/certificates/tls.key",
                "--kubelet-certificate-authority=/certificates/ca.crt",
                "--kubelet-preferred-address-types=InternalIP",
                "--metric-resolution=15s",
            ]
            container["readinessProbe"]["initialDelaySeconds"] = 1
            container["volumeMounts"].append({"name": "certificates", "mountPath": "/certificates", "readOnly": True})
            pod["volumes"].append({"name": "certificates", "secret": {"secretName": secret}})
            # Labels come from the kustomization.
            labels = {"k8s-app": "metrics-server"}
            manifest["spec"]["selector"] = {"matchLabels": labels}
            manifest["spec"]["template"]["metadata"] = {"labels": labels}
        if manifest["kind"] == "Service":
            manifest["spec"]["selector"] = {"k8s-app": "metrics-server"}
        yield manifest


def _load(*files: Path) -> Iterator[Manifest]:
    for file in files:
        yield from (manifest for manifest in yaml.load_all(file.read_text(), yaml.CSafeLoader) if manifest)


def _containers(manifest: Manifest) -> list[Manifest]:
    return manifest["spec"]["template"]["spec"]["containers"]


def _replaced(value: Any, new: Mapping[str, str]) -> Any:
    """The same value with these strings replaced, however deep."""
    if isinstance(value, dict):
        return {key: _replaced(item, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, new) for item in value]
    return new.get(value, value) if isinstance(value, str) else value


def _slim(manifest: Manifest) -> Manifest:
    if manifest["kind"] in ("Deployment", "DaemonSet", "Job"):
        for container in _containers(manifest):
            container.pop("resources", None)
            container.pop("livenessProbe", None)
            container["imagePullPolicy"] = "IfNotPresent"
        manifest["spec"]["template"]["spec"].pop("affinity", None)
    return manifest


def phases(manifests: Iterable[Manifest]) -> tuple[list[Manifest], list[Manifest], list[Manifest]]:
    """Splits manifests by what must be there before what: kinds and namespaces; all else; webhooks."""
    first, second, third = [], [], []
    for manifest in manifests:
        kind = manifest["kind"]
        if kind in ("CustomResourceDefinition", "Namespace"):
            first.append(manifest)
        elif kind.endswith("WebhookConfiguration"):
            third.append(manifest)
        else:
            second.append(manifest)
    return first, second, third
