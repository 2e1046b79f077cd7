"""Rows of Arrow data as Python values, whatever a legal file holds.

``to_pylist`` fails on a whole batch for one string that is not UTF-8 or one date that Python has no word for. Knows
nothing of columns and their meaning.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def values_of(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """``array.to_pylist()``, with U+FFFD for bytes that are not UTF-8, and a text for times beyond Python's."""
    try:
        values: list[Any] = array.to_pylist()
    except (ValueError, OverflowError, LookupError, pa.ArrowException):
        values = [_value(scalar) for scalar in array]
    return values


def rows_of(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """The rows of ``batch`` as dicts, with the values of `values_of`."""
    columns = [values_of(column) for column in batch.columns]
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if columns else []


def _value(scalar: Any) -> Any:
    """One value, in which everything that cannot be converted as it is has been replaced."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar):
        return _value(scalar.value)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return scalar.as_buffer().to_pybytes().decode("utf-8", errors="replace")
    if pa.types.is_struct(kind):
        return {kind.field(place).name: _value(scalar[place]) for place in range(kind.num_fields)}
    if pa.types.is_map(kind):
        return [tuple(_value(entry[place]) for place in (0, 1)) for entry in scalar.values]
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_value(element) for element in scalar.values]
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, LookupError):  # a year beyond 9999, nanoseconds, an unknown time zone
        return _as_text(scalar)


def _as_text(scalar: Any) -> str:
    try:
        return str(scalar.cast(pa.string()).as_py())
    except (ValueError, pa.ArrowException):
        return f"{scalar.value} ({scalar.type})"
