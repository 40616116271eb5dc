"""What a journal's lines say is done, looked up by hash.

It is a database of its own in a temporary file that nobody else sees, made anew from the lines at
each start: a million of them cost no memory, and nothing can disagree with them.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import orjson

from florence2_kserve.batch.identity import Asked, Question, short, slot

_TABLES = """
CREATE TABLE newest (slot BLOB PRIMARY KEY, key BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE refused (line BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE answers (key BLOB PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE files (address BLOB PRIMARY KEY, state TEXT NOT NULL, content TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE failures (slot BLOB PRIMARY KEY, line TEXT NOT NULL) WITHOUT ROWID;
"""
_LINES_AT_ONCE = 10_000
_CACHE_KIB = 32 * 1024


class Index:
    """Knows by address and key what is answered; may be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # An empty name is a file in SQLite's temporary folder (TMPDIR), gone with the process.
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")  # never ended: there is nobody to share it with

    def add_answers(self, records: Iterable[tuple[int, dict[str, Any]]]) -> int:
        """Takes in lines of the output.

        Args:
            records: Offset and content of each.

        Returns:
            How many they were.
        """
        number = 0
        remaining = iter(records)
        while chunk := list(islice(remaining, _LINES_AT_ONCE)):
            number += len(chunk)
            newest = [(_slot(record), bytes.fromhex(record["key"])) for _, record in chunk]
            answers = [(bytes.fromhex(record["key"]), offset) for offset, record in chunk]
            with self._lock:
                self._database.executemany("INSERT OR REPLACE INTO newest VALUES (?, ?)", newest)
                self._database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", answers)
                self._add_files(record for _, record in chunk)
        return number

    def is_done(self, address: str, question: Question, asked: Asked, key: str) -> bool:
        """Whether the newest line of this question about this address has the answer of that key."""
        query = "SELECT 1 FROM newest WHERE slot = ? AND key = ?"
        return self._has(query, slot(address, question, asked), bytes.fromhex(key))

    def answer_offset(self, key: str) -> int | None:
        """Returns where a line with the answer to the same question lies, of whichever address."""
        found = self._first("SELECT offset FROM answers WHERE key = ?", bytes.fromhex(key))
        return None if found is None else int(found[0])

    def known_content(self, address: str, state: str | None) -> str | None:
        """Returns the hash of a file's content where the file was seen in this very state."""
        if state is None:
            return None
        found = self._first("SELECT content FROM files WHERE address = ? AND state = ?", short(address), state)
        return None if found is None else str(found[0])

    def add_failure(self, record: Mapping[str, Any], *, refused: bool) -> None:
        """Takes in a failure; it stands in for earlier ones of the same address, task and text.

        Args:
            record: Its line.
            refused: Whether asking again would be in vain.
        """
        slot = short(record["address"], record["task"], record["text"])
        with self._lock:
            line = orjson.dumps(record).decode()
            self._database.execute("INSERT OR REPLACE INTO failures VALUES (?, ?)", (slot, line))
            if refused:
                line_hash = short(record["address"], record["key"])
                self._database.execute("INSERT OR IGNORE INTO refused VALUES (?)", (line_hash,))
                self._add_files([record])

    def is_refused(self, address: str, key: str) -> bool:
        """Whether the service refused this question, so that asking again would be in vain."""
        return self._has("SELECT 1 FROM refused WHERE line = ?", short(address, key))

    def forget_failure(self, address: str, task: str, text: str | None) -> None:
        """Drops a failure: the question has been answered."""
        with self._lock:
            self._database.execute("DELETE FROM failures WHERE slot = ?", (short(address, task, text),))

    def forget_stale_failure(self, address: str, task: str, text: str | None, content: str) -> None:
        """Drops a failure that is about other bytes than `content`, or about a file that couldn't be read."""
        query = "DELETE FROM failures WHERE slot = ? AND json_extract(line, '$.content') IS NOT ?"
        with self._lock:
            self._database.execute(query, (short(address, task, text), content))

    def failures(self) -> Iterator[str]:
        """Yields the lines of failures that stand."""
        with self._lock:
            yield from (str(line) for (line,) in self._database.execute("SELECT line FROM failures ORDER BY slot"))

    def failure_count(self) -> int:
        """Returns how many failures stand."""
        found = self._first("SELECT count(*) FROM failures")
        return int(found[0]) if found else 0

    def close(self) -> None:
        """Removes the database."""
        self._database.close()

    def _add_files(self, records: Iterable[Mapping[str, Any]]) -> None:
        rows = (
            (short(record["address"]), record["state"], record["content"])
            for record in records
            if record.get("state") is not None and record.get("content") is not None
        )
        self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)

    def _has(self, query: str, *values: Any) -> bool:
        return self._first(query, *values) is not None

    def _first(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        with self._lock:
            found: tuple[Any, ...] | None = self._database.execute(query, values).fetchone()
            return found


def _slot(record: Mapping[str, Any]) -> bytes:
    asked: list[Any] = [record.get(name) for name in ("model", "platform", "revision", "parameters")]
    return slot(record["address"], Question(record["task"], record.get("text")), Asked(*asked))
