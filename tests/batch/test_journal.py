from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from florence2_kserve.batch.journal import Journal, JournalBusy, JournalError

RECORDS = [{"key": f"{number:032x}", "text": "Straße ✓ \n" * number} for number in range(3)]


def write(path: Path, records: list[dict[str, str]]) -> None:
    with Journal(path) as journal:
        journal.append(records)


def read(path: Path) -> list[dict[str, str]]:
    with Journal(path) as journal:
        return [record for _, record in journal.records()]


def test_lines_are_read_as_written_and_by_their_offset(tmp_path):
    with Journal(tmp_path / "j") as journal:
        offsets = journal.append(RECORDS[:1]) + journal.append(RECORDS[1:])
        assert list(journal.records()) == list(zip(offsets, RECORDS, strict=True))
        assert [journal.read(offset) for offset in offsets] == RECORDS
    assert [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()] == RECORDS


def test_a_line_longer_than_a_block_is_read_by_its_offset(tmp_path):
    long = {"text": "x" * 300_000}
    with Journal(tmp_path / "j") as journal:
        offsets = journal.append([*RECORDS, long])
        assert journal.read(offsets[-1]) == long


def test_a_last_line_torn_at_any_byte_is_cut_off_and_the_next_is_whole(tmp_path):
    path = tmp_path / "j"
    write(path, RECORDS)
    whole = path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for end in range(last, len(whole) + 1):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            survivors = RECORDS if end == len(whole) else RECORDS[:2]
            assert [record for _, record in journal.records()] == survivors, end
            assert journal.cut == (0 if end == len(whole) else end - last)
            journal.append(RECORDS[2:])
        assert read(path) == [*survivors, RECORDS[2]], end


def test_a_torn_first_line_leaves_nothing(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"key": "0')
    assert read(path) == []
    assert path.read_bytes() == b""


def test_a_torn_end_longer_than_a_block_is_cut_off(tmp_path):
    path = tmp_path / "j"
    write(path, RECORDS)
    with path.open("ab") as file:
        file.write(b'{"text": "' + b"x" * 200_000)
    assert read(path) == RECORDS


def test_zeros_that_a_power_failure_left_are_cut_off(tmp_path):
    path = tmp_path / "j"
    write(path, RECORDS)
    with path.open("ab") as file:
        file.write(bytes(5000) + b"\n")
    assert read(path) == RECORDS
    write(path, RECORDS[:1])
    assert read(path) == [*RECORDS, RECORDS[0]]


def test_a_damaged_line_in_the_middle_is_refused_and_named(tmp_path):
    path = tmp_path / "j"
    write(path, RECORDS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"{]\n", lines[2]]))
    with pytest.raises(JournalError, match=r"line 2 of .* take that line out"):
        read(path)
    assert path.read_bytes().count(b"\n") == 3, "it was changed though it was refused"


@pytest.mark.parametrize("content", ["a,b\n1,2\n", '{"other": 1}\n{"other": 2}\n', "[1]\n", "one line of a text\n"])
def test_a_file_of_somebody_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "j"
    path.write_text(content)
    with pytest.raises(JournalError, match="line 1"), Journal(path, required=("key",)) as journal:
        list(journal.records())
    assert path.read_text() == content


def test_two_at_once_are_refused_also_in_one_process(tmp_path):
    with Journal(tmp_path / "j"), pytest.raises(JournalBusy, match="another run writes to"):
        Journal(tmp_path / "j")
    read(tmp_path / "j")


def test_the_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from florence2_kserve.batch.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(JournalBusy):
        Journal(tmp_path / "j")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    read(tmp_path / "j")


def test_what_a_full_disk_took_half_of_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "j"
    write(path, RECORDS)
    before = path.read_bytes()
    write_whole = os.write

    def write_some(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write_whole(file, data[:10])

    with Journal(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_some)
            with pytest.raises(OSError, match="No space left"):
                journal.append(RECORDS)
        assert path.read_bytes() == before
        journal.append(RECORDS[:1])
    assert read(path) == [*RECORDS, RECORDS[0]]


def test_a_process_killed_while_it_appends_leaves_whole_lines(tmp_path):
    path = tmp_path / "j"
    code = (
        "import sys; from pathlib import Path; from florence2_kserve.batch.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for number in range(10**9): journal.append([{'key': number, 'text': 'x' * (number % 5000)}])"
    )
    for round_number in range(1, 4):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        size = path.stat().st_size if path.exists() else 0
        end = time.monotonic() + 60
        while not path.exists() or path.stat().st_size < size + 100_000:
            assert writer.poll() is None
            assert time.monotonic() < end
            time.sleep(0.001)
        writer.kill()
        writer.wait()
        keys = [record["key"] for record in read(path)]
        assert keys.count(0) == round_number
