"""Where a batch's pictures come from: folders, globs, lists, object stores and columns of Parquet files.

Everything is enumerated lazily and in an order that stays the same from run to run: names sorted
folder by folder, lists in their own order, rows by their number. At any moment the names of one
folder are held for each level, and no file is open but the Parquet file that is being read.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO, cast

SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff".split())
PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
EXTRA = "pip install 'florence2-kserve[batch]'"
_ROWS_AT_ONCE = 16  # of a Parquet column that holds pictures
_BUFFER = 1 << 20  # bytes; without one, pyarrow reads a row group's whole column at once
# What file systems call a file's state, the most telling first; a size alone doesn't tell.
_VERSIONS = ("ETag", "etag", "VersionId", "md5", "md5Hash", "Content-MD5", "Digest", "content_hash", "checksum", "CRC")
_ROOTED = frozenset({"file", "local"})  # schemes whose paths begin with a slash
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "Last-Modified", "created")


class SourceError(ValueError):
    """A source isn't there or can't be read as what it was named as; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture, not read yet.

    Attributes:
        address: Where it is: an absolute path, an fsspec address, or either with ``#row``; names it in the output.
        read: Returns its bytes; may be called from any thread, raises OSError where it can't be read.
        state: Changes when the file does (size with ETag or modification time); None where nothing tells.
        look: Returns `state` where finding it out takes a call to a store; None where it is known or can't be.
        text: Text or region of its own; None takes the run's.
    """

    address: str
    read: Callable[[], bytes]
    state: str | None = None
    look: Callable[[], str | None] | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` disjoint parts of all pictures, chosen by a hash of their addresses.

    Attributes:
        index: From 0.
        count: How many parts there are.
    """

    index: int
    count: int

    def holds(self, address: str) -> bool:
        """Whether the picture of that address belongs to this part."""
        digest = hashlib.blake2b(address.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.index


WHOLE = Shard(0, 1)


@dataclass(slots=True)
class Sources:
    """All of a batch's pictures.

    Attributes:
        names: Folders, globs, addresses, Parquet files, and lists of them as ``@list.txt`` (``@-``: standard input).
        column: Column of Parquet files that holds pictures; None where the sources are pictures.
        text_column: Column that holds a text for each.
        shard: The part that is asked for.
        say: Takes a line about what is passed over.
        skipped: Files in folders passed over until now because of their suffix.
        unlisted: Folders below others passed over until now because they can't be listed.
    """

    names: Sequence[str]
    column: str | None = None
    text_column: str | None = None
    shard: Shard = WHOLE
    say: Callable[[str], None] = lambda line: None
    skipped: int = field(default=0, init=False)
    unlisted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.text_column is not None and self.column is None:
            raise SourceError("--text-column names a column of Parquet files, so --column is needed too")

    def __iter__(self) -> Iterator[Picture]:
        """Yields the pictures of this shard.

        Raises:
            SourceError: If a source isn't there.
        """
        self.skipped = self.unlisted = 0
        return (picture for picture in self._pictures() if self.shard.holds(picture.address))

    def count(self, stopped: threading.Event) -> int | None:
        """Returns how many pictures there are, or None where only a store or standard input could tell.

        Args:
            stopped: Ends the counting, whose result nobody needs then.
        """
        if any("://" in name or name == "@-" for name in self.names):
            return None
        others = Sources(self.names, self.column, self.text_column, self.shard)
        return sum(1 for _ in takewhile(lambda _: not stopped.is_set(), others))

    def _pictures(self) -> Iterator[Picture]:
        suffixes = SUFFIXES if self.column is None else PARQUET_SUFFIXES
        for name in _flatten(self.names):
            for picture in _find(name, suffixes, self._skip, self._pass_over):
                if self.column is None:
                    yield picture
                else:
                    yield from _rows(picture, self.column, self.text_column)

    def _skip(self) -> None:
        self.skipped += 1

    def _pass_over(self, folder: str, error: OSError) -> None:
        self.unlisted += 1
        self.say(f"skipping {_printable(folder)}: it can't be listed: {error.strerror}")


def read_one(name: str) -> bytes:
    """Returns the bytes of one picture: a path, an fsspec address, or ``-`` for standard input.

    Raises:
        OSError: If it can't be read.
        SourceError: If `name` names no single file.
    """
    if name == "-":
        return sys.stdin.buffer.read()
    if "://" not in name:
        return Path(name).read_bytes()
    file_system, path = _file_system(name)
    with _as_os_error():
        return cast(bytes, file_system.cat_file(path))


def _flatten(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if name.startswith("@"):
            yield from _listed(name[1:])
        else:
            yield name


def _listed(path: str) -> Iterator[str]:
    if path == "-":
        yield from _lines(sys.stdin)
        return
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            yield from _lines(file)
    except OSError as error:
        raise SourceError(f"list {path!r} can't be read: {error.strerror}") from None


def _lines(file: TextIO) -> Iterator[str]:
    return (name for line in file if (name := line.rstrip("\r\n")))


def _find(
    name: str, suffixes: frozenset[str], skip: Callable[[], None], pass_over: Callable[[str, OSError], None]
) -> Iterator[Picture]:
    if "://" in name:
        yield from _find_remote(name, suffixes, skip)
    elif os.path.isdir(name):
        for path in _walk(os.path.abspath(name), (), pass_over):
            if _suffix(path) in suffixes:
                yield _local(path)
            else:
                skip()
    elif os.path.lexists(name) or not glob.has_magic(name):
        # A listed file that isn't there is that picture's failure, found when it is read.
        yield _local(os.path.abspath(name))
    else:
        paths = sorted(path for path in glob.iglob(name, recursive=True) if not os.path.isdir(path))
        if not paths:
            raise SourceError(f"nothing matches {name!r}")
        yield from (_local(os.path.abspath(path)) for path in paths)


def check_named(names: Iterable[str]) -> None:
    """Refuses local sources that aren't there, before anything is begun.

    Raises:
        SourceError: Naming the first that isn't.
    """
    for name in names:
        path = name.removeprefix("@")
        if "://" in name or name == "@-" or os.path.lexists(path):
            continue
        if name.startswith("@") or not glob.has_magic(name):
            raise SourceError(f"{path!r} isn't there")
        if next(glob.iglob(name, recursive=True), None) is None:
            raise SourceError(f"nothing matches {name!r}")


def _walk(folder: str, above: tuple[tuple[int, int], ...], pass_over: Callable[[str, OSError], None]) -> Iterator[str]:
    """Yields all files below `folder`; `above` are the folders it lies in, so that a loop of links is left."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        if not above:  # it was named itself
            raise
        pass_over(folder, error)
        return
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, (*above, here), pass_over)
        else:
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link to where we may not look
        return entry.is_dir()
    return False


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _local(path: str) -> Picture:
    return Picture(_printable(path), lambda: Path(path).read_bytes(), _local_state(path))


def _local_state(path: str) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{status.st_size}-{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else None


def _printable(path: str) -> str:
    """Returns a path as valid Unicode: what isn't (Linux allows any bytes) is written as ``\\xff``."""
    return os.fsencode(path).decode(errors="backslashreplace")


# --- fsspec ----------------------------------------------------------------------------------------------------------


def _file_system(address: str) -> tuple[Any, str]:
    """Returns fsspec's file system of an address and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise SourceError(f"{address!r} is read by fsspec, which isn't installed: {EXTRA}") from None
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(address))
    except ImportError as error:  # its message names the package of that scheme
        raise SourceError(f"{address!r} can't be read: {error}") from None
    except ValueError as error:
        raise SourceError(f"{address!r} is no address that fsspec knows: {error}") from None


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Has whatever a store's library raises come out as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _find_remote(address: str, suffixes: frozenset[str], skip: Callable[[], None]) -> Iterator[Picture]:
    file_system, path = _file_system(address)
    scheme, _, rest = address.partition("://")
    chain = f"::{rest.split('::', 1)[1]}" if "::" in rest else ""

    def named(found: str) -> str:
        # File systems give names with or without their scheme, and with or without a slash before them.
        local = found if "://" in found or scheme in _ROOTED else found.lstrip("/")
        return (local if "://" in local else f"{scheme}://{local}") + chain

    try:
        if _is_remote_glob(file_system, scheme, path):
            found = file_system.glob(path, detail=True)
            if not found:
                raise SourceError(f"nothing matches {address!r}")
            for name in sorted(name for name, info in found.items() if info["type"] == "file"):
                yield _remote(file_system, named(name), name, found[name])
        elif _suffix(path) not in suffixes and not scheme.startswith("http") and file_system.isdir(path):
            for name, info in _walk_remote(file_system, path):
                if _suffix(name) in suffixes:
                    yield _remote(file_system, named(name), name, info)
                else:
                    skip()
        else:
            yield _remote(file_system, address, path, None)
    except SourceError:
        raise
    except Exception as error:  # whatever the store's library raises, e.g. for missing credentials
        raise SourceError(f"{address!r} can't be listed: {type(error).__name__}: {error}") from error


def _is_remote_glob(file_system: Any, scheme: str, path: str) -> bool:
    if scheme.startswith("http"):  # a question mark begins a query there
        return "*" in path
    return glob.has_magic(path) and not file_system.exists(path)


def _walk_remote(file_system: Any, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries = {entry["name"].rstrip("/"): entry for entry in file_system.ls(folder, detail=True)}
    # fsspec keeps listings; of a bucket of millions they would be most of our memory.
    file_system.invalidate_cache(folder)
    for name in sorted(entries):
        if name == folder.rstrip("/"):  # object stores may hold an empty object in the folder's place
            continue
        if entries[name]["type"] == "directory":
            yield from _walk_remote(file_system, name)
        else:
            yield name, entries[name]


def _remote(file_system: Any, address: str, path: str, info: Mapping[str, Any] | None) -> Picture:
    def read() -> bytes:
        with _as_os_error():
            return cast(bytes, file_system.cat_file(path))

    def look() -> str | None:
        with _as_os_error():
            return _remote_state(file_system.info(path))

    if info is not None:
        return Picture(address, read, _remote_state(info))
    return Picture(address, read, look=look)


def _remote_state(info: Mapping[str, Any]) -> str | None:
    for key in (*_VERSIONS, *_TIMES):
        value = info.get(key)
        if value is not None:
            # The same file system may give a time as a datetime in one call and as seconds in the other.
            value = value.timestamp() if isinstance(value, datetime) else str(value).strip('"')
            return f"{info.get('size')}-{value}"
    return None


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _rows(table: Picture, column: str, text_column: str | None) -> Iterator[Picture]:
    """Yields the pictures in a column of a Parquet file."""
    opened = _open_table(table.address)
    state = table.state if table.look is None else table.look()
    names = opened.schema_arrow.names
    for name in (column, text_column):
        if name is not None and name not in names:
            raise SourceError(f"{table.address} has no column {name!r}; it has {', '.join(names)}")
    reading = threading.Lock()
    number = 0
    for index in range(opened.num_row_groups):
        group = _RowGroup(opened, index, column, reading)
        for row, text in enumerate(group.texts(text_column)):
            yield Picture(f"{table.address}#{number}", group.row(row).read, state, text=text)
            number += 1


def _open_table(address: str) -> Any:
    """Returns pyarrow's view of a file; it is closed when the last picture of it is forgotten."""
    try:
        import pyarrow.lib
        import pyarrow.parquet as parquet
    except ImportError:
        raise SourceError(f"Parquet files are read by pyarrow, which isn't installed: {EXTRA}") from None
    try:
        if "://" not in address:
            return parquet.ParquetFile(address, buffer_size=_BUFFER)
        file_system, path = _file_system(address)
        return parquet.ParquetFile(file_system.open(path, "rb"), buffer_size=_BUFFER)
    except (OSError, pyarrow.lib.ArrowException) as error:
        raise SourceError(f"{address!r} can't be read as Parquet: {error}") from None


class _RowGroup:
    """The pictures of one row group, decoded in order and a few at a time, from when the first is asked for.

    What is decoded is kept for rows that somebody may still ask for, until they are read: those that are held as
    pictures, and those of the last few rows that weren't enumerated yet.

    Args:
        opened: The Parquet file.
        index: The row group's.
        column: Name of the column.
        reading: Held while the file is read.
    """

    def __init__(self, opened: Any, index: int, column: str, reading: threading.Lock) -> None:
        self._opened, self._index, self._column, self._reading = opened, index, column, reading
        self._batches: Iterator[Any] | None = None
        self._decoded = 0  # rows
        self._enumerated = 0
        self._rows: weakref.WeakValueDictionary[int, _Row] = weakref.WeakValueDictionary()
        self._ahead: dict[int, Any] = {}  # values of rows that were decoded before they were enumerated

    def texts(self, column: str | None) -> Iterable[str | None]:
        """Returns the text that goes with each row, all None without a column of them."""
        if column is None:
            return (None for _ in range(self._opened.metadata.row_group(self._index).num_rows))
        with self._reading:
            values = self._opened.read_row_group(self._index, columns=[column]).column(0).to_pylist()
        return (None if value is None else str(value) for value in values)

    def row(self, number: int) -> _Row:
        """Returns a row, counted from the group's first; they are to be asked for in their order."""
        row = _Row(self, number)
        with self._reading:
            self._rows[number] = row
            self._enumerated = number + 1
            if number in self._ahead:
                row.values.append(self._ahead.pop(number))
        return row

    def read(self, row: _Row) -> bytes:
        """Returns the picture in a row.

        Raises:
            OSError: If the row holds none, or the address that it holds can't be read.
        """
        with self._reading, _as_os_error():
            value = self._value(row)
        if isinstance(value, Mapping):  # as Hugging Face's datasets store pictures
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise OSError("the row holds no picture")
        return read_one(value) if isinstance(value, str) else bytes(value)

    def _value(self, row: _Row) -> Any:
        if not row.values and row.number < self._decoded:  # it is read once more
            self._batches = None
        if self._batches is None:
            self._batches = self._opened.iter_batches(
                batch_size=_ROWS_AT_ONCE, row_groups=[self._index], columns=[self._column]
            )
            self._decoded = 0
            self._ahead.clear()
        while not row.values:
            self._decode(next(self._batches).column(0).to_pylist())
        return row.values.pop()

    def _decode(self, values: list[Any]) -> None:
        for number, value in enumerate(values, self._decoded):
            if number >= self._enumerated:
                self._ahead[number] = value
            elif (row := self._rows.get(number)) is not None:
                row.values[:] = [value]
        self._decoded += len(values)


class _Row:
    """One row of a row group.

    Attributes:
        number: Counted from the group's first.
        values: Its value, between decoding and reading; else nothing.
    """

    __slots__ = ("__weakref__", "_group", "number", "values")

    def __init__(self, group: _RowGroup, number: int) -> None:
        self._group, self.number = group, number
        self.values: list[Any] = []

    def read(self) -> bytes:
        """Returns its picture, as `_RowGroup.read`."""
        return self._group.read(self)
