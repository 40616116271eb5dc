"""A journal's lines as one Parquet file, put in its place in one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from florence2_kserve.batch.journal import replace_file
from florence2_kserve.batch.sources import EXTRA, SourceError

# Of these, which differ from task to task, the column holds the JSON.
_AS_JSON = frozenset({"answer", "scores", "parameters"})
_NUMBERS = frozenset({"score", "seconds"})
_ROWS_AT_ONCE = 10_000


def check_installed() -> None:
    """Refuses to begin where the end can't be written.

    Raises:
        SourceError: If pyarrow isn't installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise SourceError(f"Parquet files are written by pyarrow, which isn't installed: {EXTRA}") from None


def write_table(records: Iterable[Mapping[str, Any]], path: Path, fields: Iterable[str]) -> None:
    """Writes a Parquet file from a journal's lines, a few thousand at a time.

    Args:
        records: The lines.
        path: The file; what lies there is replaced when the new one is whole.
        fields: The lines' fields, which become columns.

    Raises:
        OSError: If it can't be written.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    names = list(fields)
    schema = pyarrow.schema([(name, pyarrow.float64() if name in _NUMBERS else pyarrow.string()) for name in names])
    temporary = path.with_name(f".{path.name}.tmp")
    with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for rows in _chunks(records):
            columns = {name: [_cell(name, row.get(name)) for row in rows] for name in names}
            writer.write_table(pyarrow.table(columns, schema=schema))
    replace_file(path, temporary)


def _cell(name: str, value: Any) -> Any:
    return orjson.dumps(value).decode() if name in _AS_JSON and value is not None else value


def _chunks(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    remaining = iter(records)
    while rows := list(islice(remaining, _ROWS_AT_ONCE)):
        yield rows
