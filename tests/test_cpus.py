"""Counting processors under affinity and cgroup quotas; the cgroup trees are folders of the layout the kernel has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from florence2_kserve.cpus import available_cpus, cpu_quota

ALLOWED = len(os.sched_getaffinity(0))


def count(tmp_path: Path, own: str, files: dict[str, str]) -> int:
    """Counts in a cgroup tree of `files`, for a process that is in the cgroups that `own` lists."""
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "own").write_text(own)
    return available_cpus(tmp_path / "cgroup", tmp_path / "own")


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}),
        ("0::/\n", {"cpu.max": "50000 100000\n"}),
        ("0::/\n", {"cpu.max": "1000 100000\n"}),
        ("0::/pod/container\n", {"pod/container/cpu.max": "100000 100000\n"}),
        ("0::/pod/container\n", {"pod/container/cpu.max": "max 100000\n", "pod/cpu.max": "100000 100000\n"}),
        ("0::/pod\n", {"pod/cpu.max": "900000 100000\n", "cpu.max": "100000 100000\n"}),
        ("0::/../../as/the/node/sees/it\n", {"cpu.max": "100000 100000\n"}),
        (
            "3:memory:/\n2:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        ),
        (
            "2:cpuacct,cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        ),
        (
            "1:cpu:/docker/1a2b\n",
            {"cpu/docker/1a2b/cpu.cfs_quota_us": "20000\n", "cpu/docker/1a2b/cpu.cfs_period_us": "100000\n"},
        ),
        (
            "1:cpu:/docker/1a2b\n0::/elsewhere\n",  # the version 1 tree of a container, mounted as its root
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        ),
    ],
    ids=str,
)
def test_a_quota_of_one_processor_or_less_makes_one(tmp_path: Path, own: str, files: dict[str, str]) -> None:
    assert count(tmp_path, own, files) == 1


@pytest.mark.skipif(ALLOWED < 2, reason="one processor is no more than any quota")
def test_a_part_of_a_processor_counts_as_one(tmp_path: Path) -> None:
    assert count(tmp_path, "0::/\n", {"cpu.max": "110000 100000\n"}) == 2


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {}),
        ("0::/\n", {"cpu.max": "max 100000\n"}),
        ("0::/\n", {"cpu.max": "100000000 100000\n"}),
        ("0::/\n", {"cpu.max": "100000 0\n"}),
        ("0::/\n", {"cpu.max": "nonsense"}),
        ("0::/\n", {"cpu.max": "\xff\x00"}),
        ("0::/other\n", {"elsewhere/cpu.max": "100000 100000\n"}),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}),
        ("1:memory:/\n", {"memory/cpu.max": "100000 100000\n"}),
        ("", {"cpu.max": "100000 100000\n"}),
        ("nonsense\n::\n", {}),
    ],
    ids=str,
)
def test_without_a_quota_the_affinity_counts(tmp_path: Path, own: str, files: dict[str, str]) -> None:
    assert count(tmp_path, own, files) == ALLOWED


def test_nothing_to_read_is_no_limit(tmp_path: Path) -> None:
    assert available_cpus(tmp_path / "no", tmp_path / "neither") == ALLOWED
    assert cpu_quota(tmp_path / "no", tmp_path / "neither") is None


def test_a_quota_is_told_as_it_is(tmp_path: Path) -> None:
    files = {"cpu.max": "250000 100000\n", "pod/cpu.max": "50000 100000\n"}
    count(tmp_path, "0::/pod\n", files)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "own") == 0.5


def test_this_process_has_some() -> None:
    assert 1 <= available_cpus() <= ALLOWED


def test_affinity_narrows() -> None:
    code = """
import os
from florence2_kserve.cpus import available_cpus
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(available_cpus())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "1\n"
