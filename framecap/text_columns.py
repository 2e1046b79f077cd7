"""Columns of texts in Parquet: one text or a list of them a row, also in a field of a struct (``caption.ru``).

For captions and references that people bring. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from framecap.errors import SettingsError
from framecap.schema import is_text


def find_texts(schema: pa.Schema, name: str, flag: str, source: str) -> tuple[str, ...] | None:
    """Where the texts called ``name`` are: a column, and the fields below it; None if there is no such column.

    Raises SettingsError, naming ``flag`` and ``source``, if what is there is no text.
    """
    parts = name.split(".")
    column = next((c for n in range(len(parts), 0, -1) if (c := ".".join(parts[:n])) in schema.names), None)
    if column is None:
        return None
    fields = tuple(name[len(column) + 1 :].split(".")) if name != column else ()
    kind = _element(schema.field(column).type)
    for field in fields:
        known = [kind.field(place).name for place in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if field not in known:
            raise SettingsError(f"{flag} {name}: {column!r} of {source} is {kind}; it has no field {field!r}")
        kind = _element(kind.field(known.index(field)).type)
    if is_text(kind) or pa.types.is_null(kind):
        return (column, *fields)
    if pa.types.is_struct(kind) and kind.num_fields:
        example = f"{flag} {name}.{kind.field(kind.num_fields - 1).name}"
        raise SettingsError(f"{flag} {name}: in {source} it is {kind}; name the field that holds the text: {example}")
    raise SettingsError(f"{flag} {name}: in {source} it is {kind}; it must be text or a list of texts")


def _element(kind: Any) -> Any:
    """The type within lists."""
    while (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    ):
        kind = kind.value_type
    return kind


def texts_in(value: Any, fields: Sequence[str] = ()) -> list[str]:
    """The texts of one row's ``value``: of its ``fields``, where it is a dict or a list of such; nulls are left out.

    Raises ``TypeError`` for what is no text.
    """
    if value is None:
        return []
    if isinstance(value, list):
        return [text for element in value for text in texts_in(element, fields)]
    if isinstance(value, dict) and fields:
        return texts_in(value.get(fields[0]), fields[1:])
    if isinstance(value, str) and not fields:
        return [value]
    raise TypeError(f"{value!r:.60} is no text")
