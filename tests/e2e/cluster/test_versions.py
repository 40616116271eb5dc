"""Quick checks, without a cluster: one file says every version, and what is built is what was published."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from .build import BINARIES, MODULES, STORAGE_INITIALIZER
from .config import VERSIONS

Directives = dict[str, list[str]]


def parsed(go_mod: str) -> Directives:
    """The lines of a go.mod by their directive: ``require``, ``replace``, ``tool``."""
    found: Directives = defaultdict(list)
    block = ""
    for line in filter(None, map(str.strip, go_mod.splitlines())):
        if line.endswith("("):
            block = line.split()[0]
        elif line == ")":
            block = ""
        elif block:
            found[block].append(line)
        else:
            directive, _, rest = line.partition(" ")
            found[directive].append(rest)
    return found


def required(module: Directives, *, indirect: bool) -> dict[str, str]:
    """The versions that a module asks for, without or with those that only its requirements need."""
    lines = [line for line in module["require"] if indirect or not line.endswith("// indirect")]
    return {path: version for path, version, *_ in map(str.split, lines)}


@pytest.fixture(scope="module")
def modules() -> dict[str, Directives]:
    """Each go.mod by the name of its folder."""
    return {path.parent.name: parsed(path.read_text()) for path in sorted(MODULES.glob("*/go.mod"))}


def test_versions_are_those_of_the_go_mod_files(modules: dict[str, Directives]) -> None:
    kubernetes = VERSIONS["go"]["k8s.io/kubernetes"]
    libraries = {"k8s.io/component-base", "k8s.io/kubectl"}  # Kubernetes' own, numbered v0.x.y
    for name, module in modules.items():
        for path, version in required(module, indirect=False).items():
            if path in libraries:
                assert version == kubernetes.replace("v1.", "v0."), f"{name}: {path}"
            elif path != "github.com/spf13/cobra":  # its version is what Kubernetes asks for
                assert VERSIONS["go"].get(path) == version, f"{name}: {path}"


def test_every_version_named_is_used(modules: dict[str, Directives]) -> None:
    for path, version in VERSIONS["go"].items():
        assert any(required(module, indirect=True).get(path) == version for module in modules.values()), path


def test_modules_are_built_as_published(modules: dict[str, Directives]) -> None:
    for name, module in modules.items():
        for line in module["replace"]:
            old, _, new = line.partition(" => ")
            assert old.split()[0] == new.split()[0], f"{name} replaces {line}"  # only by another version


def test_a_module_lists_the_programs_that_are_built_from_it(modules: dict[str, Directives]) -> None:
    built = {(binary.module, binary.package) for binary in BINARIES.values() if not binary.package.startswith(".")}
    assert built == {(name, program) for name, module in modules.items() for program in module["tool"]}


def test_the_storage_initializer_is_the_one_named() -> None:
    locked = (STORAGE_INITIALIZER / "requirements.txt").read_text()
    found = re.search(r"^kserve-storage==(\S+) ", locked, re.MULTILINE)
    assert found is not None
    assert found[1] == VERSIONS["python"]["kserve-storage"]
    assert "://" not in locked
