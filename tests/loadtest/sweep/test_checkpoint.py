"""The checkpoint: what a killed sweep leaves can be gone on with, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from florence2_loadtest.results import Trial
from florence2_loadtest.sweep.checkpoint import Checkpoint, CheckpointError
from tests.loadtest.sweep.trials import level

FINGERPRINT = {"target": "both", "space": {"max_batch_size": (6, 12)}, "host": {"cpus": "2"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sweep" / "checkpoint.jsonl"


def trial(number: int) -> Trial:
    return Trial.model_validate({"number": number, "settings": {"max_batch_size": number}, "levels": [level()]})


def write(path: Path, count: int, fingerprint: dict[str, Any] = FINGERPRINT) -> None:
    with Checkpoint(path, fingerprint) as checkpoint:
        for number in range(count):
            checkpoint.add(trial(number))


def test_trials_come_back_as_they_were(path: Path) -> None:
    write(path, 2)
    with Checkpoint(path, FINGERPRINT) as again:
        assert again.trials == [trial(0), trial(1)]


def test_a_trial_is_on_the_disk_once_it_was_added(path: Path) -> None:
    with Checkpoint(path, FINGERPRINT) as checkpoint:
        checkpoint.add(trial(0))
        assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("kept", [1, 7, -1])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on_behind_the_whole_ones(path: Path, kept: int) -> None:
    write(path, 2)
    content = path.read_bytes()
    whole, last = content[: content[:-1].rindex(b"\n") + 1], content.splitlines(keepends=True)[-1]
    path.write_bytes(whole + last[:kept])
    with Checkpoint(path, FINGERPRINT) as again:
        assert again.trials == [trial(0)]
        again.add(trial(1))
    assert path.read_bytes() == content


def test_a_sweep_killed_in_its_first_write_begins_anew(path: Path) -> None:
    write(path, 0)
    head = path.read_bytes()
    path.write_bytes(head[:5])
    write(path, 1)
    assert path.read_bytes().startswith(head)
    with Checkpoint(path, FINGERPRINT) as again:
        assert again.trials == [trial(0)]


def test_another_sweeps_file_is_refused_and_the_difference_named(path: Path) -> None:
    write(path, 1)
    before = path.read_bytes()
    other = {**FINGERPRINT, "host": {"cpus": "64"}}
    with pytest.raises(
        CheckpointError, match=r'another sweep\'s, with another host\.cpus \(host\.cpus was "2", is "64"\)'
    ):
        Checkpoint(path, other).__enter__()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello\n", b"[]\n", b"{}\n", b'{"sweep": 3}\n'])
def test_a_file_that_is_no_checkpoint_is_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.jsonl"):
        Checkpoint(path, FINGERPRINT).__enter__()
    assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_not_passed_over(path: Path) -> None:
    write(path, 2)
    head, first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + first[:9] + b"\n" + second)
    with pytest.raises(CheckpointError, match="no checkpoint of a sweep"):
        Checkpoint(path, FINGERPRINT).__enter__()


def test_two_sweeps_do_not_write_to_one_file(path: Path) -> None:
    with (
        Checkpoint(path, FINGERPRINT),
        pytest.raises(CheckpointError, match="another sweep is writing to it"),
        Checkpoint(path, FINGERPRINT),
    ):
        pass
    write(path, 1)
