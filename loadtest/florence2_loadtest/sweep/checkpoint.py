"""The file in which a sweep notes each trial as it ends, so that it can go on after it was killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from florence2_loadtest.results import Trial

_MOST_NAMED = 6


class CheckpointError(Exception):
    """The file can't be gone on with."""


class Checkpoint:
    """A line of JSON that says whose trials these are, then one for each trial, as a context manager.

    A line is on the disk when `add` returns. What a killed sweep had half written is dropped.

    Args:
        path: The file; made if it isn't there.
        fingerprint: What trials depend on; a file with another one is refused.

    Attributes:
        trials: Those in the file.

    Raises:
        CheckpointError: When entered, if the file is another sweep's, is no checkpoint, or is being written to.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self._path = path
        # As it will be read again: tuples become lists.
        self._fingerprint: dict[str, Any] = orjson.loads(orjson.dumps(fingerprint))
        self.trials: list[Trial] = []

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{self._path}: another sweep is writing to it") from None
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, trial: Trial) -> None:
        """Notes a trial that has ended."""
        self._append(trial.model_dump(mode="json"))
        self.trials.append(trial)

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rpartition(b"\n")[0]
        if len(content) > (kept := len(whole) + 1 if whole else 0):
            self._file.truncate(kept)
        if not whole:
            self._append({"sweep": self._fingerprint})
            return
        head, *lines = whole.split(b"\n")
        try:
            self._check(orjson.loads(head)["sweep"])
            self.trials = [Trial.model_validate(orjson.loads(line)) for line in lines]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._path}: no checkpoint of a sweep: {error}") from None

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        was, now = _flat(fingerprint), _flat(self._fingerprint)
        differing = [name for name in {**now, **was} if was.get(name) != now.get(name)]
        if differing:
            named = ", ".join(differing[:_MOST_NAMED]) + (", …" if len(differing) > _MOST_NAMED else "")
            first = differing[0]
            raise CheckpointError(
                f"{self._path} is another sweep's, with another {named} ({first} was {_brief(was.get(first))}, is "
                f"{_brief(now.get(first))}): name another --output, or delete that file"
            )

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()
        os.fsync(self._file.fileno())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns what is in mappings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _brief(value: Any) -> str:
    if value is None:
        return "unset"
    text = orjson.dumps(value).decode()
    return text if len(text) <= 80 else f"{text[:80]}…"
