"""Rows of a Parquet file in record batches that are bounded by bytes, whatever its pages inflate to.

A batch of a fixed number of rows has no bound: a row may hold megabytes, and a dictionary names one value of
100 MB from a million rows in a few bytes. So the rows of a batch follow from the sizes in the footer, and strings and
binaries that are dictionary-encoded stay so until their decoded size is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framecap.errors import ShardError
from framecap.shards import open_shard

BATCH_BYTES = 8 << 20
BATCH_ROWS = 1024
# What the columns of a shard may unpack to, all in all, whatever they take in the file; and beyond, times that.
MOST_UNPACKED = 256 << 20
MOST_RATIO = 10_000
# Bytes of a value in Arrow's memory, by Parquet's physical type; the other two depend on the column.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8}
_DECIMAL_WIDTH = 32
_TEXT_OR_BINARY = ("NONE", "STRING", "ENUM", "JSON", "BSON")
_OFFSET = 4  # bytes per value of a string, a binary or a list


@dataclass(frozen=True)
class _Leaf:
    """A column of the Parquet file below one of the wanted columns."""

    number: int
    path: str
    width: int | None  # bytes of a value; None for strings and binaries
    is_repeated: bool
    by_dictionary: bool  # read as Arrow dictionaries, see ``read_batches``


def read_batches(
    root: str,
    shard: str,
    columns: Sequence[str] | Callable[[pa.Schema], Sequence[str]],
    start: int = 0,
    most_rows: int = BATCH_ROWS,
    most_bytes: int = BATCH_BYTES,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows from ``start`` on as (number of the first row, batch of ``columns``), in order.

    A batch has at most ``most_rows`` rows and about ``most_bytes`` bytes, or a single row. Batches do not span row
    groups, and the first may begin before ``start``. ``columns``: their names, or which of a schema's they are.
    Raises ``ShardError`` if the shard cannot be opened or unpacks to too much, and pyarrow's errors, or ``OSError``,
    if a page is damaged.
    """
    with open_shard(root, shard) as file:
        columns = columns(file.schema_arrow) if callable(columns) else columns
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        leaves = _leaves(file, columns)
        metadata = file.metadata
        dictionaries = [leaf.path for leaf in leaves if leaf.by_dictionary]
        if not dictionaries:
            yield from _batches(file, schema, leaves, start, most_rows, most_bytes)
            return
    with open_shard(root, shard, metadata, dictionaries) as file:
        yield from _batches(file, schema, leaves, start, most_rows, most_bytes)


def _batches(
    file: pq.ParquetFile, schema: pa.Schema, leaves: Sequence[_Leaf], start: int, most_rows: int, most_bytes: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    offset = 0
    left = MOST_UNPACKED + MOST_RATIO * sum(_packed_bytes(file.metadata, leaves))
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        if offset + group.num_rows <= start:
            offset += group.num_rows
            continue
        _check_lists(group, leaves)
        rows = max(1, min(most_rows, int(most_bytes / max(1.0, _row_bytes(group, leaves)))))
        for batch in file.iter_batches(rows, row_groups=[number], columns=schema.names):
            if offset + len(batch) > start:
                for first, part in _decoded(batch.select(schema.names), offset, schema, most_bytes):
                    left -= part.nbytes
                    if left < 0:
                        raise _bomb(file.metadata, leaves)
                    yield first, part
            offset += len(batch)


def _decoded(
    batch: pa.RecordBatch, offset: int, schema: pa.Schema, most_bytes: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """``batch`` in ``schema``'s types; in halves, while its dictionaries would inflate to more than ``most_bytes``."""
    if len(batch) > 1 and sum(_decoded_bytes(column) for column in batch.columns) > most_bytes:
        middle = len(batch) // 2
        yield from _decoded(batch[:middle], offset, schema, most_bytes)
        yield from _decoded(batch[middle:], offset + middle, schema, most_bytes)
        return
    arrays = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    yield offset, pa.RecordBatch.from_arrays(arrays, schema=schema)


def _packed_bytes(metadata: pq.FileMetaData, leaves: Sequence[_Leaf]) -> Iterator[int]:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        yield from (group.column(leaf.number).total_compressed_size for leaf in leaves)


def _bomb(metadata: pq.FileMetaData, leaves: Sequence[_Leaf]) -> ShardError:
    """A dictionary may name one value from any number of rows in a few bytes."""
    packed = sum(_packed_bytes(metadata, leaves))
    return ShardError("too_large", f"its columns unpack from {packed:,} bytes to more than {MOST_RATIO:,} times that")


def _check_lists(group: pq.RowGroupMetaData, leaves: Sequence[_Leaf]) -> None:
    """Raise ShardError for lists that grow out of nothing: equal values, or nulls, of one row take no space in a page,
    and a row cannot be read in parts."""
    for leaf in leaves:
        chunk = group.column(leaf.number)
        unpacked = chunk.num_values * ((leaf.width or 0) + _OFFSET)
        if leaf.is_repeated and unpacked > max(MOST_UNPACKED, 1000 * chunk.total_compressed_size):
            raise ShardError(
                "too_large", f"lists of {leaf.path!r} unpack from {chunk.total_compressed_size:,} to {unpacked:,} bytes"
            )


def _row_bytes(group: pq.RowGroupMetaData, leaves: Sequence[_Leaf]) -> float:
    """Bytes of an average row of the wanted columns as they are read; at worst, where a page may inflate."""
    total = 0.0
    for leaf in leaves:
        chunk = group.column(leaf.number)
        if leaf.width is not None:
            total += chunk.num_values * (leaf.width + _OFFSET) / max(1, group.num_rows)
        elif "DELTA_BYTE_ARRAY" in chunk.encodings or (chunk.has_dictionary_page and not leaf.by_dictionary):
            total += chunk.total_uncompressed_size
        else:
            total += (chunk.total_uncompressed_size + _OFFSET * chunk.num_values) / max(1, group.num_rows)
    return total


def _leaves(file: pq.ParquetFile, columns: Sequence[str]) -> list[_Leaf]:
    """The columns of the file that reading ``columns`` touches; pyarrow takes all that begin with ``name.`` too."""
    wanted = set(columns)
    schema, metadata = file.schema, file.metadata
    views = {field.name for field in file.schema_arrow if _has_views(field.type)}
    leaves = []
    for number in range(metadata.num_columns):
        column = schema.column(number)
        parts = column.path.split(".")
        tops = {".".join(parts[: length + 1]) for length in range(len(parts))} & wanted
        if not tops:
            continue
        width = _width(column)
        text = width is None and column.logical_type.type in _TEXT_OR_BINARY
        encoded = any(
            metadata.row_group(group).column(number).has_dictionary_page for group in range(metadata.num_row_groups)
        )
        leaves.append(
            _Leaf(number, column.path, width, column.max_repetition_level > 0, text and encoded and not tops & views)
        )
    return leaves


def _width(column: Any) -> int | None:
    if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
        return int(column.length)
    if column.logical_type.type == "DECIMAL":
        return _DECIMAL_WIDTH
    return _WIDTHS.get(column.physical_type)


def _has_views(kind: Any) -> bool:
    """Whether a type holds views, to which Arrow cannot cast dictionaries."""
    views = (pa.types.is_string_view, pa.types.is_binary_view, pa.types.is_list_view, pa.types.is_large_list_view)
    if any(is_view(kind) for is_view in views):
        return True
    return any(_has_views(kind.field(child).type) for child in range(kind.num_fields))


def _decoded_bytes(array: pa.Array) -> int:
    """Bytes that ``array`` takes with its dictionaries decoded."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        sizes = pc.binary_length(array.dictionary) if _has_length(kind.value_type) else None
        if sizes is None:
            return int(array.nbytes)
        return int(pc.sum(pc.take(sizes, array.indices)).as_py() or 0) + _OFFSET * len(array)
    if pa.types.is_struct(kind):
        return sum(_decoded_bytes(child) for child in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _decoded_bytes(array.flatten()) + _OFFSET * len(array)
    if pa.types.is_map(kind):
        entries = pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
        return _decoded_bytes(pa.ListArray.from_arrays(array.offsets, entries))
    if isinstance(array, pa.ExtensionArray):
        return _decoded_bytes(array.storage)
    return int(array.nbytes)


def _has_length(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_large_binary(kind)
    )
