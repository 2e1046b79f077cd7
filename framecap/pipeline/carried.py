"""The input's own columns on their way into the output: every value and type as it was, or an error.

Knows nothing of captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from framecap.errors import ShardError
from framecap.row_batches import read_batches
from framecap.shards import as_shard_error, open_shard


class CarriedRows:
    """Successive rows of a shard's columns, ``take`` by ``take``."""

    def __init__(self, root: str, shard: str, columns: Sequence[str]) -> None:
        self._batches = read_batches(root, shard, columns)
        self._held: pa.RecordBatch | None = None

    def take(self, rows: int) -> Iterator[pa.Table]:
        """The next ``rows`` rows, in tables of bounded size. Raises ``ShardError`` if there are fewer."""
        while rows > 0:
            if self._held is None or not len(self._held):
                try:
                    _, self._held = next(self._batches, (0, None))
                except Exception as error:  # whatever a page holds is that shard's error
                    raise as_shard_error(error) from error
                if self._held is None:
                    raise ShardError("unreadable", f"{rows} rows fewer than its footer promised")
            part = self._held[:rows]
            self._held = self._held[len(part) :]
            rows -= len(part)
            yield pa.Table.from_batches([part]).replace_schema_metadata(None)

    def skip(self, rows: int) -> None:
        """Pass over the next ``rows`` rows."""
        for _ in self.take(rows):
            pass


def check_int96(root: str, shard: str, file: pq.ParquetFile, columns: Sequence[str]) -> None:
    """Raise ``ShardError`` (``wrong_type``) if an INT96 timestamp of ``columns`` is finer than a microsecond, the unit
    in which `open_shard` reads them."""
    names = _int96_columns(file, columns)
    if not names:
        return
    with open_shard(root, shard, int96_unit="ns") as exact:
        pairs = zip(file.iter_batches(columns=names), exact.iter_batches(columns=names), strict=True)
        for micros, nanos in pairs:
            for name in names:
                for left, right in zip(_moments(micros[name]), _moments(nanos[name]), strict=True):
                    if np.any(right - left * 1000):  # both wrap alike outside 1677 to 2262
                        raise ShardError(
                            "wrong_type",
                            f"{name!r} has INT96 timestamps with nanoseconds, which come out in microseconds; write "
                            "it as timestamp[ns] (INT64), or leave it out of --keep-columns",
                        )


def _int96_columns(file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    paths = [
        column.path
        for column in map(file.schema.column, range(file.metadata.num_columns))
        if column.physical_type == "INT96"
    ]
    return [name for name in columns if any(path == name or path.startswith(f"{name}.") for path in paths)]


def _moments(array: Any) -> Iterator[np.ndarray]:
    """The timestamps in ``array`` and its children as int64, one array for each leaf; nulls are left out."""
    kind = array.type
    if pa.types.is_timestamp(kind):
        yield np.asarray(array.drop_null().view(pa.int64()))
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            yield from _moments(child)
    elif pa.types.is_map(kind):
        yield from _moments(array.keys)
        yield from _moments(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _moments(array.flatten())
