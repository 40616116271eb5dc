"""Brings the cluster up on the node, takes it down, and says how it is."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import yaml

from . import node, pki
from .build import REGISTRY_ENV, build, image_names, registry_config
from .config import (
    BIN,
    CACHE,
    CGROUP,
    CONTAINERD,
    DNS_IP,
    KUBECONFIG,
    MANIFESTS,
    NODE,
    NODE_IP,
    NODE_POD_CIDR,
    PKI,
    POD_CIDR,
    REGISTRY_ADDRESS,
    RUN,
    SERVICE_CIDR,
)
from .manifests import CA_BUNDLE, EXTERNAL_GATEWAY, INTERNAL_GATEWAY, SERVERS, phases
from .shell import ClusterError, run, step, succeeds, wait

ETCD = "http://127.0.0.1:2379"  # in the node's network
CRI = RUN / "containerd.sock"
APPLIED = RUN / "applied"
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
MEMORY_GB = 8
READY_S = 300


def why_not() -> str | None:
    """The reason why no cluster can be had here, or None."""
    if platform.system() != "Linux":
        return "it needs Linux"
    if os.geteuid() != 0:
        return "it needs root"
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if missing := [name for name, bit in CAPABILITIES.items() if not int(status["CapEff"], 16) >> bit & 1]:
        return f"it needs the capabilities to make namespaces, mounts and links: {', '.join(missing)}"
    if not Path("/sys/fs/cgroup").is_mount() or not os.access("/sys/fs/cgroup", os.W_OK):
        return "it needs control groups at /sys/fs/cgroup that it may write to"
    if shutil.which("apt-get") is None:
        return "it needs Debian, from which containerd comes (apt-get isn't there)"
    if any(CACHE.is_relative_to(folder) for folder in node.PRIVATE):
        return f"FLORENCE2_CACHE can't be beneath {', '.join(node.PRIVATE)}, which the node has of its own"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if memory < MEMORY_GB:
        return f"it needs {MEMORY_GB} GB of memory, and here are {memory:.0f}"
    return None


def up() -> None:
    """Brings everything up until all of it is ready. Mends a cluster that is partly up.

    Raises:
        ClusterError: If it can't be, or something isn't ready in time.
    """
    if reason := why_not():
        raise ClusterError(f"no cluster can be made here: {reason}")
    with step("up, in all"):
        build()
        if not node.is_running() and RUN.exists():
            down()  # what an end by force left behind
        try:
            with step("node"):
                _start_node()
            with step("applied"):
                _apply()
            with step("ready"):
                _wait_ready()
        except ClusterError as error:
            dead = [name for name, alive in node.daemons().items() if not alive]
            raise ClusterError(
                "\n".join([str(error), *(f"{name} ended: {node.log_end(name)}" for name in dead)])
            ) from None


def down() -> None:
    """Takes everything down. What is kept for the next time is files alone. Harmless where nothing is up."""
    with step("down"):
        node.stop()
        if CONTAINERD.exists() and any(CONTAINERD.iterdir()):
            _forget_containers()


def purge() -> None:
    """Takes everything down and removes all that was kept."""
    down()
    shutil.rmtree(CACHE, ignore_errors=True)


def addresses() -> dict[str, str]:
    """What a test needs to know, as variables of the environment.

    Raises:
        ClusterError: If the cluster isn't up.
    """
    if not APPLIED.exists():
        raise ClusterError("the cluster isn't up")
    return {
        "KUBECONFIG": str(KUBECONFIG),
        "KUBECTL": str(BIN / "kubectl"),
        "INGRESS": f"http://{_gateway(EXTERNAL_GATEWAY)}",
        "INGRESS_INTERNAL": f"http://{_gateway(INTERNAL_GATEWAY)}",
        "REGISTRY": REGISTRY_ADDRESS,
        "ECHO_IMAGE": image_names()["echo"],
    }


def status() -> str:
    """How it is, for people."""
    if not node.is_running():
        return "down"
    lines = [f"{name}: {'runs' if alive else 'HAS ENDED'}" for name, alive in node.daemons().items()]
    usage = node.usage()
    lines += [f"memory: {sum(usage.values())} MiB", *(f"  {name}: {mib}" for name, mib in list(usage.items())[:12])]
    try:
        lines += [f"{key}={value}" for key, value in addresses().items()]
        lines += [kubectl("get", "nodes,isvc,ksvc,pods", "-A")]
    except ClusterError as error:
        lines += [str(error)]
    return "\n".join(lines)


def kubectl(*arguments: str | Path, stdin: str | None = None, limit_s: float = 60) -> str:
    """Runs kubectl as the cluster's administrator and returns what it printed."""
    return run(BIN / "kubectl", "--kubeconfig", KUBECONFIG, *arguments, stdin=stdin, limit_s=limit_s)


def _start_node() -> None:
    node.start()
    pki.make()
    _start_containers()
    kube = BIN / "kube"
    node.daemon(
        "etcd", kube, "etcd", "--name=node", f"--data-dir={RUN / 'etcd'}", "--log-level=warn",
        f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=node=http://127.0.0.1:2380",
        "--unsafe-no-fsync",  # none of it outlives the node
    )  # fmt: skip
    node.daemon(
        "kube-apiserver", kube, "kube-apiserver", f"--etcd-servers={ETCD}",
        f"--bind-address={NODE_IP}", f"--advertise-address={NODE_IP}", f"--service-cluster-ip-range={SERVICE_CIDR}",
        f"--tls-cert-file={PKI / 'api-server.crt'}", f"--tls-private-key-file={PKI / 'api-server.key'}",
        f"--client-ca-file={pki.CA}",
        f"--kubelet-client-certificate={PKI / 'admin.crt'}", f"--kubelet-client-key={PKI / 'admin.key'}",
        f"--kubelet-certificate-authority={pki.CA}", "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={PKI / 'service-accounts.pub'}",
        f"--service-account-signing-key-file={PKI / 'service-accounts.key'}",
        "--service-account-issuer=https://kubernetes.default.svc",
        # How it presents itself to APIs that others serve: metrics-server's.
        f"--proxy-client-cert-file={PKI / 'aggregator.crt'}", f"--proxy-client-key-file={PKI / 'aggregator.key'}",
        f"--requestheader-client-ca-file={pki.CA}", "--requestheader-allowed-names=aggregator",
        "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true", "--endpoint-reconciler-type=lease",
    )  # fmt: skip
    wait("the API server", 120, lambda: _works("get", "--raw", "/readyz"))
    for name, options in {
        "controller-manager": (
            "--use-service-account-credentials",
            f"--service-account-private-key-file={PKI / 'service-accounts.key'}",
            f"--root-ca-file={pki.CA}",
            f"--cluster-signing-cert-file={pki.CA}",
            f"--cluster-signing-key-file={PKI / 'ca.key'}",
            "--horizontal-pod-autoscaler-downscale-stabilization=20s",  # 5 minutes are for real traffic
            "--horizontal-pod-autoscaler-cpu-initialization-period=30s",
            f"--cluster-cidr={POD_CIDR}",
            f"--service-cluster-ip-range={SERVICE_CIDR}",
        ),
        "scheduler": (),
    }.items():
        config = PKI / f"{name}.kubeconfig"
        node.daemon(
            f"kube-{name}", kube, f"kube-{name}", "--bind-address=127.0.0.1", "--leader-elect=false",
            f"--kubeconfig={config}", f"--authentication-kubeconfig={config}", f"--authorization-kubeconfig={config}",
            *options,
        )  # fmt: skip
    resolv_conf = _write("resolv.conf", "search .\n")  # names that the cluster hasn't got exist nowhere
    kubelet = _write("kubelet.yaml", yaml.safe_dump(_kubelet_config(resolv_conf)))
    node.daemon(
        "kubelet", kube, "kubelet", f"--config={kubelet}", f"--kubeconfig={PKI / 'kubelet.kubeconfig'}",
        f"--hostname-override={NODE}", f"--node-ip={NODE_IP}", f"--root-dir={RUN / 'kubelet'}",
        f"--cert-dir={RUN / 'kubelet' / 'pki'}",
    )  # fmt: skip
    proxy = _write("proxy.yaml", yaml.safe_dump(_proxy_config()))
    node.daemon("kube-proxy", kube, "kube-proxy", f"--config={proxy}")
    node.daemon("coredns", BIN / "coredns", "-conf", _write("Corefile", _corefile()))
    wait("the node", 90, lambda: _works("wait", f"node/{NODE}", "--for=condition=Ready", "--timeout=5s"))


def _start_containers() -> None:
    """The registry, and containerd, which fetches from it alone."""
    registry = _write("registry.yaml", registry_config(REGISTRY_ADDRESS))
    node.daemon("registry", BIN / "registry", "serve", registry, env=REGISTRY_ENV)
    hosts = f'[host."http://{REGISTRY_ADDRESS}"]\n  capabilities = ["pull", "resolve"]\n'
    _write(f"registries/{REGISTRY_ADDRESS}/hosts.toml", hosts)
    interface = {
        "type": "ptp",  # needs neither a bridge nor netfilter on one; knows no NetworkPolicy
        "ipMasq": False,
        "ipam": {
            "type": "host-local",
            "dataDir": str(RUN / "pod-addresses"),
            "ranges": [[{"subnet": NODE_POD_CIDR}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    _write("cni/10-e2e.conflist", json.dumps({"cniVersion": "0.4.0", "name": "e2e", "plugins": [interface]}))
    config = _write(
        "containerd.toml",
        f"""
version = 2
root = "{CONTAINERD}"
state = "{RUN / "containerd"}"
disabled_plugins = ["io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]

[grpc]
address = "{CRI}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image_names()["pause"]}"
restrict_oom_score_adj = true # without CAP_SYS_RESOURCE, which a sandboxed root may lack, runc can't lower it
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{RUN / "cni"}"

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{RUN / "registries"}"

[plugins."io.containerd.grpc.v1.cri".containerd]
discard_unpacked_layers = true # the registry has them

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
""",
    )
    node.daemon("containerd", "containerd", "--config", config, "--log-level", "warn")
    wait("containerd", 30, lambda: CRI.exists() and succeeds(_ctr(CRI, "version")))


def _kubelet_config(resolv_conf: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_IP,
        "healthzBindAddress": "127.0.0.1",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(pki.CA)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(PKI / "kubelet.crt"),
        "tlsPrivateKeyFile": str(PKI / "kubelet.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": str(resolv_conf),
        "containerRuntimeEndpoint": f"unix://{CRI}",
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # never: the disk isn't the cluster's alone
        "imageGCLowThresholdPercent": 99,
        "makeIPTablesUtilChains": False,
        "maxPods": 200,
        "podLogsDir": str(RUN / "pod-logs"),
        "registryPullQPS": 0,
        "serializeImagePulls": False,
        "volumePluginDir": str(RUN / "kubelet" / "plugins"),
    }


def _proxy_config() -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": POD_CIDR,
        "hostnameOverride": NODE,
        "clientConnection": {"kubeconfig": str(PKI / "proxy.kubeconfig")},
        "nodePortAddresses": ["primary"],
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        # Leave the machine's limits on connections alone.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "nftables": {"syncPeriod": "30s", "minSyncPeriod": "200ms"},
    }


def _corefile() -> str:
    return f"""
.:53 {{
    bind {NODE_IP}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {PKI / "coredns.kubeconfig"}
        pods insecure
    }}
    cache 5
}}
"""


def _apply() -> None:
    """Applies the manifests, unless this cluster has had these same ones."""
    text = MANIFESTS.read_text()
    if APPLIED.exists() and APPLIED.read_text() == text:
        return
    secrets = []
    for namespace, secret, service in SERVERS:
        names = [f"DNS:{service}.{namespace}.svc", f"DNS:{service}.{namespace}.svc.cluster.local"]
        pki.certificate(secret, f"/CN={service}", *names)
        files = {"tls.crt": PKI / f"{secret}.crt", "tls.key": PKI / f"{secret}.key", "ca.crt": pki.CA}
        secrets.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/tls",
                "metadata": {"name": secret, "namespace": namespace},
                "data": {name: pki.encoded(path) for name, path in files.items()},
            }
        )
    loaded = list(yaml.load_all(text.replace(CA_BUNDLE, pki.encoded(pki.CA)), yaml.CSafeLoader))
    kinds, everything, webhooks = phases(loaded)
    with step("  kinds"):
        _apply_all(kinds)
        _wait_all("customresourcedefinition", "Established")
    with step("  everything else"):
        _apply_all(secrets + everything)
    with step("  deployments available"):
        _wait_all("deployment", "Available")
    # After the servers behind them are there, or they would refuse what comes next.
    _apply_all(webhooks)
    APPLIED.write_text(text)


def _apply_all(manifests: list[dict[str, Any]]) -> None:
    """Applies on the server's side: a few kinds are too long for the annotation that the client's side makes."""
    listed = {"apiVersion": "v1", "kind": "List", "items": manifests}
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(listed), limit_s=180)


def _wait_ready() -> None:
    _wait_all("gateway.gateway.networking.k8s.io", "Programmed")
    _wait_all("deployment", "Available")  # those too that the gateways brought
    _wait_all("apiservice", "Available")
    wait("the first measurements of metrics-server", 90, lambda: _has_items("/apis/metrics.k8s.io/v1beta1/nodes"))


def _wait_all(kind: str, condition: str) -> None:
    """Waits until all things of a kind meet a condition; `kubectl wait` asks for each alone, which takes long."""
    missing: list[str] = []

    def is_met() -> bool:
        items = json.loads(kubectl("get", kind, "-A", "-o", "json"))["items"]
        missing[:] = [item["metadata"]["name"] for item in items if not meets(item, condition)]
        return bool(items) and not missing

    try:
        wait(f"{condition} of every {kind}", READY_S, is_met)
    except ClusterError as error:
        raise ClusterError(f"{error}: {', '.join(missing)}") from None


def meets(item: dict[str, Any], condition: str) -> bool:
    """Whether a thing's status has a condition as true."""
    conditions = item.get("status", {}).get("conditions") or []
    return any(entry["type"] == condition and entry["status"] == "True" for entry in conditions)


def _has_items(path: str) -> bool:
    return _works("get", "--raw", path) and bool(json.loads(kubectl("get", "--raw", path))["items"])


def _works(*arguments: str) -> bool:
    return succeeds([BIN / "kubectl", "--kubeconfig", KUBECONFIG, *arguments])


def _gateway(gateway: tuple[str, str]) -> str:
    """Where a gateway's Envoy listens: a service's address, which leads from this machine into the node too."""
    namespace, name = gateway
    service = json.loads(kubectl("get", "service", "-n", namespace, f"envoy-{name}", "-o", "json"))["spec"]
    (port,) = (port["port"] for port in service["ports"] if port["port"] == 80)
    return f"{service['clusterIP']}:{port}"


def _forget_containers() -> None:
    """Removes what an ended node's containers left in containerd's store, and keeps the images there."""
    socket = RUN / "sweep.sock"
    config = _write(
        "sweep.toml",
        f'version = 2\nroot = "{CONTAINERD}"\nstate = "{RUN / "sweep"}"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{socket}"\n',
    )
    node.start()
    try:
        node.daemon("sweep", "containerd", "--config", config, "--log-level", "warn")
        wait("containerd", 30, lambda: socket.exists() and succeeds(_ctr(socket, "version")))
        if containers := run(*_ctr(socket, "containers", "ls", "-q")).split():
            run(*_ctr(socket, "containers", "rm", *containers), limit_s=120)
    finally:
        node.stop()
    shutil.rmtree(CONTAINERD / "io.containerd.grpc.v1.cri", ignore_errors=True)


def _ctr(socket: Path, *command: str) -> list[str]:
    return ["ctr", "--connect-timeout", "3s", "--address", str(socket), "--namespace", "k8s.io", *command]


def _write(name: str, text: str) -> Path:
    """Writes a file of the running cluster, unless it says that already: kube-proxy ends when its own is rewritten."""
    path = RUN / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path
