"""The built images, run as a restricted pod runs them: read-only, without root or capabilities."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from florence2_kserve.client import Florence2Client
from florence2_kserve.local import free_port
from tests.images import build, container
from tests.images.container import Container

pytestmark = pytest.mark.e2e

PYTHON = "/opt/florence2/bin/python"
SITE_PACKAGES = "opt/florence2/lib/python3.11/site-packages"
MODEL = f"{SITE_PACKAGES}/florence2_kserve/tiny/checkpoint/model.safetensors"
READY_S = 300  # two cores, busy with other tests

WHO_AM_I = """
import json, os, pathlib
def writable(folder):
    try:
        pathlib.Path(folder, "probe").write_text("")
        return True
    except OSError:
        return False
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
folders = ["/", "/etc", "/opt/florence2", "/home", "/tmp", "/cache"]
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "capabilities": int(status["CapEff"], 16),
    "writable": [folder for folder in folders if writable(folder)],
}))
"""

COMPILE = """
import os, tempfile, torch, triton
from triton.runtime.build import _build

assert torch.compile(lambda x: torch.nn.functional.gelu(x @ x))(torch.ones(8, 8)).shape == (8, 8)
folder = tempfile.mkdtemp()
source = os.path.join(folder, "launcher.c")
with open(source, "w") as file:
    file.write("#include <Python.h>\\n#include <cuda.h>\\nint launcher(void) { return CUDA_SUCCESS; }")
headers = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "include")
print("built", os.path.exists(_build("launcher", source, folder, [], [headers], [], [])))
"""

# The scorers write beside their own files, which nothing here may: both names are looked up when it is used.
CAPTIONS = """
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer import ptbtokenizer
jar = ptbtokenizer.__file__.replace("ptbtokenizer.py", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, ptbtokenizer.__file__ = jar, "/tmp/ptbtokenizer.py"
words = ptbtokenizer.PTBTokenizer().tokenize({1: [{"caption": "A red circle, and a blue star."}]})
print(words)
print(round(Meteor().compute_score(words, words)[0], 2))
"""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if reason := container.why_not():
        pytest.skip(reason)


def built(target: str) -> str:
    """Builds a target, or takes it from the layers built before."""
    try:
        return build.build(target)
    except build.BuildError as error:
        if "needs" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def transformer() -> str:
    return built("transformer")


@pytest.fixture(scope="module")
def predictor() -> str:
    return built("predictor")


@pytest.fixture(scope="module")
def tools() -> str:
    return built("tools")


@pytest.fixture(params=build.TARGETS)
def image(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    return str(request.getfixturevalue(request.param))


def size(image: str) -> int:
    """Bytes of an image, unpacked."""
    listed = json.loads(subprocess.check_output(["buildah", "images", "--json", image]))
    number, unit = listed[0]["size"].split()
    return int(float(number) * {"MB": 1e6, "GB": 1e9}[unit])


def wait_ready(server: Container, url: str) -> float:
    """Waits until a server is ready and returns how long that took since its start."""
    with Florence2Client(url) as client:
        while not client.is_ready():
            assert server.is_running(), server.output()[-4000:]
            assert server.usage().wall_s < READY_S, server.output()[-4000:]
            time.sleep(0.05)
    return server.usage().wall_s


def flags(*, rest: int, grpc: int) -> list[str]:
    return ["--host=127.0.0.1", f"--http_port={rest}", f"--grpc_port={grpc}"]


def test_runs_without_root_on_a_root_that_cant_be_written(image: str) -> None:
    done = container.run(image, PYTHON, "-c", WHO_AM_I, entrypoint=False)
    assert json.loads(done.stdout) == {
        "uid": 65532,
        "gid": 65532,
        "capabilities": 0,
        "writable": ["/tmp", "/cache"],
    }


def test_has_the_command_line_and_the_embedded_model(image: str) -> None:
    done = container.run(image, "version")
    assert (done.returncode, done.stdout.strip()) == (0, build.version())
    with container.files(image) as root:
        assert (root / MODEL).stat().st_size > 1_000_000


def test_says_what_it_was_built_from(image: str) -> None:
    labels = container.config(image)["config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == build.version()
    assert labels["org.opencontainers.image.revision"] == build.revision()


def test_has_neither_installers_nor_the_packages_tests(image: str) -> None:
    with container.files(image) as root:
        found = {path.name.split("-")[0] for path in (root / SITE_PACKAGES).iterdir()}
        assert not found & {"pip", "uv", "wheel", "hatchling"}
        assert ("setuptools" in found) == ("predictor" in image)  # which torch.compile imports
        assert not [p for p in (root / SITE_PACKAGES).rglob("test*") if p.is_dir() and p.name in ("test", "tests")]
        for name in ("usr/lib/python3.11/ensurepip", "usr/share/python-wheels", "opt/florence2/bin/pip"):
            assert not (root / name).exists()
        assert (root / "usr/bin/gcc").exists() == ("predictor" in image)


def test_the_compiled_modules_are_read_as_they_are(image: str) -> None:
    """An unchecked one stays valid whatever becomes of the source's date; a stale one would slow down each start."""
    with container.files(image) as root:
        modules = list((root / SITE_PACKAGES / "kserve").rglob("*.pyc"))
        assert len(modules) > 100
        assert {int.from_bytes(path.read_bytes()[4:8], "little") for path in modules} == {0b01}


def test_layers_and_history_keep_nothing_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds a stage that installs, with a host among pip's settings that is found nowhere else."""
    marker = "florence2-index-marker.invalid"
    monkeypatch.setenv("PIP_TRUSTED_HOST", marker)
    assert marker in build.index_settings(tmp_path)["pip.conf"].read_text()
    image = build.build("package", tag="marked", options=["--no-cache"])
    try:
        copy = tmp_path / "copy"
        subprocess.run(["buildah", "push", "--quiet", "--disable-compression", image, f"dir:{copy}"], check=True)
        assert sum(path.stat().st_size for path in copy.iterdir()) > 100e6
        assert not [path.name for path in copy.iterdir() if marker.encode() in path.read_bytes()]
    finally:
        subprocess.run(["buildah", "rmi", image], check=True, capture_output=True)


def test_the_bases_certificates_are_there_and_no_others(image: str) -> None:
    bundle = build.CERTIFICATES.relative_to("/")
    with container.files(build.local_base()) as base, container.files(image) as root:
        assert (root / bundle).read_bytes() == (base / bundle).read_bytes()
        assert not list((root / "run").rglob("*.pem")) + list((root / "run").rglob("pip.conf"))


def test_history_names_no_address_and_no_folder_of_this_machine(image: str) -> None:
    history = json.dumps(container.config(image)["history"])
    assert "requirements/install.py" in history
    assert not re.search(r"://|@|index-url", history)
    assert str(build.ROOT) not in history


def test_transformer_has_no_torch_and_stays_below_600_mb(transformer: str) -> None:
    assert size(transformer) < 600e6
    done = container.run(transformer, PYTHON, "-c", "import torch", entrypoint=False)
    assert "No module named 'torch'" in done.stdout
    print(f"\ntransformer: {size(transformer) / 1e6:.0f} MB")


def test_transformer_is_ready_within_ten_seconds_of_work(transformer: str) -> None:
    """By the processor's time: the clock's is printed, but on a machine busy with other tests says little."""
    rest, grpc = free_port(), free_port()
    with Container(transformer, "transformer", *flags(rest=rest, grpc=grpc), "--predictor_host=127.0.0.1:1") as server:
        seconds = wait_ready(server, f"http://127.0.0.1:{rest}")
        used = server.usage().cpu_s
    print(f"\ntransformer ready after {seconds:.1f} s, {used:.1f} s of them on the processor")
    assert used < 10


def test_predictor_refuses_cuda_without_a_gpu(predictor: str) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    rest, grpc = free_port(), free_port()
    done = container.run(predictor, "predictor", *flags(rest=rest, grpc=grpc), "--device=cuda")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("error: device 'cuda' was asked for, but no GPU is visible")


def test_predictor_can_compile(predictor: str) -> None:
    """What torch.compile takes on CPU, and what Triton builds on a GPU before it first uses it."""
    done = container.run(predictor, PYTHON, "-c", COMPILE, entrypoint=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "built True"), done.stdout


@pytest.fixture(scope="module")
def service(transformer: str, predictor: str) -> Iterator[tuple[str, str]]:
    """Both, as two containers; REST URL and gRPC address."""
    ports = [free_port() for _ in range(4)]
    back = Container(predictor, "predictor", *flags(rest=ports[0], grpc=ports[1]), "--device=cpu")
    front = Container(
        transformer, "transformer", *flags(rest=ports[2], grpc=ports[3]), f"--predictor_host=127.0.0.1:{ports[1]}"
    )
    with back, front:
        wait_ready(front, f"http://127.0.0.1:{ports[2]}")
        seconds = wait_ready(back, f"http://127.0.0.1:{ports[0]}")
        print(f"\npredictor ready after {seconds:.1f} s")
        yield f"http://127.0.0.1:{ports[2]}", f"127.0.0.1:{ports[3]}"


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_transformer_and_predictor_answer(service: tuple[str, str], transformer: str, protocol: str) -> None:
    options = ["--url", service[0]] if protocol == "rest" else ["--url", f"grpc://{service[1]}"]
    done = container.run(transformer, "check", *options)
    assert done.returncode == 0, done.stdout


def test_tools_run_java_and_the_caption_scorers(tools: str) -> None:
    done = container.run(tools, "java", "-version", entrypoint=False)
    assert done.returncode == 0, done.stdout
    assert "openjdk version" in done.stdout.lower()
    done = container.run(tools, PYTHON, "-c", CAPTIONS, entrypoint=False)
    assert done.stdout.splitlines()[-2:] == ["{1: ['a red circle and a blue star']}", "1.0"]


def test_tools_reach_a_service(tools: str, service: tuple[str, str]) -> None:
    done = container.run(tools, "check", "--url", service[0])
    assert done.returncode == 0, done.stdout
