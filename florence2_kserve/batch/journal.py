"""A file of JSON lines that only grows, of which a process that is killed leaves whole lines and at most one torn.

The lines of a batch's output are the only memory of what is done. A line counts when it ends with a
newline. What a kill left behind the last newline is cut off before anything is appended, by one
``ftruncate``: the file has either the torn end or none, never a line glued to half of another.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

_BLOCK = 1 << 16


class JournalError(Exception):
    """The file is no journal of ours, or it is damaged elsewhere than at its end."""


class JournalBusy(JournalError):
    """Another process writes to the file."""


class Journal:
    """Opens a file for appending, alone; the lock goes with the process, however it ends.

    Args:
        path: The file; made where it is missing.
        required: Fields that every line has, by which a file of somebody else's is told.

    Attributes:
        path: As given.
        cut: Bytes of a torn end that were cut off as it was opened.

    Raises:
        JournalBusy: If another process has it open.
        OSError: If it can't be opened.
    """

    def __init__(self, path: Path, *, required: Iterable[str] = ()) -> None:
        self.path, self._required = path, frozenset(required)
        is_new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self.cut = self._cut_torn_end()
            if is_new:
                sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields each line's offset and content; a last line that isn't JSON (a power failure's) is cut off.

        Raises:
            JournalError: If another line is damaged, or isn't one of ours.
        """
        offset = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError:
                    if number > 1 and not lines.read(1):
                        self._truncate(offset)
                        return
                    record = None
                if not isinstance(record, dict) or not self._required <= record.keys():
                    raise JournalError(
                        f"line {number} of {self.path} isn't one that this command writes; name another file, or "
                        "take that line out if the file was damaged"
                    )
                yield offset, record
                offset += len(line)

    def append(self, records: Iterable[dict[str, Any]]) -> list[int]:
        """Writes lines behind the last, all by one call to the system.

        Args:
            records: What the lines hold.

        Returns:
            Their offsets.

        Raises:
            OSError: If they can't be written; what was written of them is taken back.
        """
        lines = [orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records]
        start = os.fstat(self._file).st_size
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            self._truncate(start)
            raise
        offsets = []
        for line in lines:
            offsets.append(start)
            start += len(line)
        return offsets

    def read(self, offset: int) -> dict[str, Any]:
        """Returns the content of the line at an offset."""
        line = b""
        while b"\n" not in line:
            line += os.pread(self._file, _BLOCK, offset + len(line))
        return dict(orjson.loads(line[: line.index(b"\n")]))

    def sync(self) -> None:
        """Has the disk hold what was appended, so that a power failure doesn't take it."""
        os.fsync(self._file)

    def close(self) -> None:
        """Syncs and closes the file; the lock ends."""
        self.sync()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalBusy(f"another run writes to {self.path}; wait for it, or name another output") from None

    def _cut_torn_end(self) -> int:
        size = os.fstat(self._file).st_size
        end = size
        while end > 0:
            start = max(0, end - _BLOCK)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            self._truncate(end)
        return size - end

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)
        os.fsync(self._file)


def replace_file(path: Path, temporary: Path) -> None:
    """Puts a finished file in another's place: readers see the old one or the new one, also after a power failure."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Has the disk hold a folder's names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
