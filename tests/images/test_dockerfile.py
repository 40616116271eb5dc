"""What the Dockerfile and the lock files promise, read off them: nothing is built here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import pytest

from tests.images.build import ROOT, TARGETS

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
REQUIREMENT = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ]+)(?: ; (?P<marker>[^\\]+?))?(?: --hash=sha256:[0-9a-f]{64})+"
)


@dataclass
class Stage:
    """One stage of the Dockerfile: what it stands on, and its instructions."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [rest for name, rest in self.instructions if name == word]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by name."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(base)
        elif word and found:
            found[name].instructions.append((word, rest))
    return found


def inherited(stages: dict[str, Stage], target: str, word: str) -> list[str]:
    """The rests of a target's instructions called `word`, from the base upwards."""
    stage = stages[target]
    return (inherited(stages, stage.base, word) if stage.base in stages else []) + stage.all(word)


def pins(name: str) -> set[tuple[str, str]]:
    """Names and versions in a lock file."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    return {(match["name"], match["version"]) for match in REQUIREMENT.finditer(re.sub(r" \\\n\s+", " ", text))}


def test_every_stage_stands_on_the_one_base(stages: dict[str, Stage]) -> None:
    assert set(TARGETS) < set(stages)
    assert {stage.base for stage in stages.values()} - set(stages) == {"${BASE_IMAGE}"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_without_root_and_without_a_shell(stages: dict[str, Stage], target: str) -> None:
    assert inherited(stages, target, "USER") == ["65532:65532"]
    assert json.loads(inherited(stages, target, "ENTRYPOINT")[-1]) == ["/opt/florence2/bin/florence2"]
    assert json.loads(inherited(stages, target, "CMD")[-1]) == {"tools": ["--help"]}.get(target, [target])


@pytest.mark.parametrize("word", ["HEALTHCHECK", "VOLUME", "ADD", "SHELL", "ONBUILD"])
def test_no_stage_uses(stages: dict[str, Stage], word: str) -> None:
    assert not any(stage.all(word) for stage in stages.values())


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_labelled(stages: dict[str, Stage], target: str) -> None:
    labels = " ".join(inherited(stages, target, "LABEL"))
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


@pytest.mark.parametrize("target", TARGETS)
def test_the_package_is_the_last_layer(stages: dict[str, Stage], target: str) -> None:
    """So that a change to it costs neither an installation nor the transfer of one."""
    layers = [(word, rest) for word, rest in stages[target].instructions if word in ("COPY", "RUN")]
    assert layers[-1] == ("COPY", "--from=package /opt/florence2 /opt/florence2")
    assert not any("florence2_kserve" in rest for word, rest in layers)


def test_secrets_stay_where_nothing_else_is(stages: dict[str, Stage]) -> None:
    """Mounted over a file of the image, buildah takes that file away with the secret when the step ends."""
    runs = [rest for stage in stages.values() for rest in stage.all("RUN")]
    mounts = {mount for rest in runs for mount in re.findall(r"--mount=(\S+)", rest)}
    assert mounts == {"type=secret,id=pip.conf", "type=secret,id=ca.pem"}


def test_torch_is_installed_below_whatever_else_changes(stages: dict[str, Stage]) -> None:
    copied = [
        name for rest in inherited(stages, "predictor", "COPY") for name in rest.split() if name.endswith(".txt")
    ]
    assert copied == ["requirements/torch.txt", "requirements/predictor.txt"]


def test_every_installation_is_from_a_lock_with_the_index_mounted(stages: dict[str, Stage]) -> None:
    runs = [rest for stage in stages.values() for rest in stage.all("RUN")]
    installing = [rest for rest in runs if "install.py" in rest or ("pip " in rest and "--no-index" not in rest)]
    assert len(installing) == 5
    for rest in installing:
        assert "--mount=type=secret,id=ca.pem" in rest
        assert "--mount=type=secret,id=pip.conf" in rest
        assert "PIP_CONFIG_FILE=/run/secrets/pip.conf" in rest
        assert "install.py" in rest or "--require-hashes" in rest
    assert '"--require-hashes"' in (ROOT / "requirements" / "install.py").read_text()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_file_holds_names_versions_and_hashes_only(lock: object) -> None:
    lines = re.sub(r" \\\n\s+", " ", lock.read_text()).splitlines()  # type: ignore[attr-defined]
    assert lines
    assert [line for line in lines if not REQUIREMENT.fullmatch(line)] == []


@pytest.mark.parametrize("part", ["base", "predictor", "torch", "tools"])
def test_the_images_hold_the_versions_that_are_tested(part: str) -> None:
    assert pins(part)
    assert pins(part) <= pins("dev")


def test_torch_is_in_the_predictor_alone() -> None:
    assert pins("torch") <= pins("predictor")
    for name in ("base", "tools"):
        assert not [pin for pin, _ in pins(name) if pin.startswith(("torch", "nvidia-", "triton", "transformers"))]
    assert {name for name, _ in pins("torch")} >= {"torch", "torchvision", "triton", "nvidia-cudnn-cu13"}


def test_the_build_sees_what_it_copies_and_no_more(stages: dict[str, Stage]) -> None:
    patterns = [p for p in (ROOT / ".dockerignore").read_text().splitlines() if p and not p.startswith("#")]
    assert patterns[0] == "*"
    let_through = {p[1:] for p in patterns if p.startswith("!")}
    sources = [
        source
        for stage in stages.values()
        for rest in stage.all("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert {source.split("/")[0] for source in sources} == {path.split("/")[0] for path in let_through}
    assert "loadtest" not in let_through, "Triton's baseline is no part of the package"
    for source in sources:
        assert (ROOT / source).exists(), source
