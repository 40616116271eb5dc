"""The cluster's certificates and kubeconfigs, new at each start."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from .config import API_SERVER, API_SERVICE_IP, KUBECONFIG, NODE, NODE_IP, PKI
from .shell import run

DAYS = "365"
CA = PKI / "ca.crt"
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
API_NAMES = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")

# Who speaks to the API server by a kubeconfig of its own, and as whom.
CLIENTS = {
    "admin": "/O=system:masters/CN=admin",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "proxy": "/CN=system:kube-proxy",
    "kubelet": f"/O=system:nodes/CN=system:node:{NODE}",
    "coredns": "/CN=coredns",
}


def make() -> None:
    """Makes what isn't there yet."""
    if KUBECONFIG.exists():
        return
    PKI.mkdir(parents=True, exist_ok=True)
    run(
        "openssl", "req", "-x509", *NEW_KEY, "-days", DAYS, "-keyout", PKI / "ca.key", "-out", CA,
        "-subj", "/CN=e2e-ca",
        "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,digitalSignature",
    )  # fmt: skip
    run("openssl", "genrsa", "-out", PKI / "service-accounts.key", "2048")
    run("openssl", "rsa", "-in", PKI / "service-accounts.key", "-pubout", "-out", PKI / "service-accounts.pub")
    api_names = [*(f"DNS:{name}" for name in API_NAMES), f"IP:{NODE_IP}", f"IP:{API_SERVICE_IP}"]
    certificate("api-server", "/CN=kube-apiserver", *api_names)
    certificate("aggregator", "/CN=aggregator")
    for name, subject in CLIENTS.items():
        certificate(name, subject, f"DNS:{NODE}", f"IP:{NODE_IP}")
        (PKI / f"{name}.kubeconfig").write_text(_kubeconfig(name))
    KUBECONFIG.write_text(_kubeconfig("admin"))  # the last, so that an unfinished set is made anew


def certificate(name: str, subject: str, *names: str) -> None:
    """Writes NAME.key and NAME.crt, signed by the cluster's CA, good for clients and servers."""
    request, extensions = PKI / f"{name}.csr", PKI / f"{name}.ext"
    run("openssl", "req", *NEW_KEY, "-keyout", PKI / f"{name}.key", "-out", request, "-subj", subject)
    extensions.write_text(
        "extendedKeyUsage=clientAuth,serverAuth\nkeyUsage=digitalSignature\n"
        + (f"subjectAltName={','.join(names)}\n" if names else "")
    )
    run(
        "openssl", "x509", "-req", "-in", request, "-CA", CA, "-CAkey", PKI / "ca.key", "-CAcreateserial",
        "-days", DAYS, "-out", PKI / f"{name}.crt", "-extfile", extensions,
    )  # fmt: skip
    request.unlink()
    extensions.unlink()


def encoded(path: Path) -> str:
    """A file in base64, as Kubernetes wants it."""
    return base64.b64encode(path.read_bytes()).decode()


def _kubeconfig(name: str) -> str:
    user = {
        "client-certificate-data": encoded(PKI / f"{name}.crt"),
        "client-key-data": encoded(PKI / f"{name}.key"),
    }
    cluster = {"server": API_SERVER, "certificate-authority-data": encoded(CA)}
    return json.dumps(  # which is YAML too
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "e2e", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": name}}],
            "current-context": "e2e",
        }
    )
