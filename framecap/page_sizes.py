"""Watches the pages of a Parquet file as they are read, so that none unpacks to far more than it takes in the file.

A page of a few bytes may unpack to 2 GB, its size stands in its own header alone, and pyarrow allocates that much
before anybody is asked. `WatchedFile` sees the same bytes as pyarrow, before it: it follows the headers from page to
page and refuses the file at the first one that is too large. Knows nothing of what is in the pages.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from framecap.errors import ShardError

MOST_PAGE_BYTES = 64 << 20  # what a page may unpack to whatever it takes in the file
MOST_RATIO = 16  # and beyond: times its size in the file
_MOST_HEADER = 16 << 20  # as pyarrow
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12  # Thrift's types


@dataclass
class _Chunk:
    """A column chunk: ``header`` is where its next page header begins, ``held`` what was read of it."""

    column: str
    start: int
    stop: int
    header: int
    held: bytes = b""


class WatchedFile(io.RawIOBase):
    """A binary file that is read forward within each column chunk, as pyarrow does without ``pre_buffer``."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._chunks: list[_Chunk] = []
        self._starts: list[int] = []

    def watch(self, metadata: pq.FileMetaData) -> None:
        """Follow the pages that the footer tells of. Raises ShardError if column chunks overlap."""
        for group in range(metadata.num_row_groups):
            columns = metadata.row_group(group)
            for number in range(metadata.num_columns):
                column = columns.column(number)
                if column.num_values < 1:  # no page of it is ever read, and its offsets mean nothing
                    continue
                start = column.data_page_offset
                if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
                    start = column.dictionary_page_offset
                stop = start + column.total_compressed_size
                self._chunks.append(_Chunk(column.path_in_schema, start, stop, start))
        self._chunks.sort(key=lambda chunk: chunk.start)
        self._starts = [chunk.start for chunk in self._chunks]
        for chunk, following in zip(self._chunks, self._chunks[1:], strict=False):
            if chunk.stop > following.start:
                raise ShardError("unreadable", f"its columns {chunk.column!r} and {following.column!r} overlap")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, size: int = -1) -> bytes:
        at = self._file.tell()
        data: bytes = self._file.read(size)
        if self._starts and data:
            self._follow(at, data)
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _follow(self, at: int, data: bytes) -> None:
        """Check the headers of the pages that begin in ``data``, which was read at ``at``."""
        number = max(0, bisect_right(self._starts, at) - 1)
        for chunk in self._chunks[number:]:
            if chunk.start >= at + len(data):
                return
            _follow_chunk(chunk, at, data)


def _follow_chunk(chunk: _Chunk, at: int, data: bytes) -> None:
    end = at + len(data)
    while chunk.header < chunk.stop and at <= chunk.header + len(chunk.held) < end:
        missing = chunk.header + len(chunk.held) - at
        text = chunk.held + data[missing : missing + _MOST_HEADER]
        try:
            length, unpacked, packed = _page_header(text)
        except IndexError:  # it goes on in what is read next
            if len(text) >= _MOST_HEADER:
                raise ShardError("unreadable", f"a page header of {chunk.column!r} does not end") from None
            chunk.held = text
            return
        if unpacked < 0 or packed < 0:
            raise ShardError("unreadable", f"a page of {chunk.column!r} says that it has {min(unpacked, packed)} bytes")
        if unpacked > max(MOST_PAGE_BYTES, MOST_RATIO * packed):
            raise ShardError(
                "too_large",
                f"a page of {chunk.column!r} unpacks from {packed:,} to {unpacked:,} bytes; write smaller pages",
            )
        chunk.header += length + packed
        chunk.held = b""


def _page_header(text: bytes) -> tuple[int, int, int]:
    """(length of the header, bytes of the page unpacked, bytes in the file): fields 2 and 3 of parquet.thrift's
    ``PageHeader`` in Thrift's compact protocol. Raises IndexError if ``text`` ends within it."""
    sizes = {2: 0, 3: 0}
    at, field = 0, 0
    while text[at]:
        kind, field, at = _field(text, at, field)
        if field in sizes and kind == 5:
            sizes[field], at = _number(text, at)
        else:
            at = _skip(text, at, kind)
    return at + 1, sizes[2], sizes[3]


def _field(text: bytes, at: int, before: int) -> tuple[int, int, int]:
    """(type, number, where its value begins) of the field whose head is at ``at``."""
    kind, step = text[at] & 15, text[at] >> 4
    if step:
        return kind, before + step, at + 1
    number, at = _number(text, at + 1)
    return kind, number, at


def _varint(text: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (text[at] & 127) << shift
        at += 1
        if text[at - 1] < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ShardError("unreadable", "a page header is damaged")


def _number(text: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(text, at)
    return value >> 1 ^ -(value & 1), at


def _skip(text: bytes, at: int, kind: int, depth: int = 0) -> int:
    """Where the value of type ``kind`` that begins at ``at`` ends."""
    if depth > 8:
        raise ShardError("unreadable", "a page header is damaged")
    if kind in (_TRUE, _FALSE):
        return at
    if kind in (_BYTE, _DOUBLE):
        return at + (1 if kind == _BYTE else 8)
    if kind < _DOUBLE:
        return _varint(text, at)[1]
    if kind == _BINARY:
        size, at = _varint(text, at)
        return at + size
    if kind in (_LIST, _SET):
        size, element = text[at] >> 4, text[at] & 15
        size, at = _varint(text, at + 1) if size == 15 else (size, at + 1)
        for _ in range(size):
            at = _skip(text, at, _BYTE if element in (_TRUE, _FALSE) else element, depth + 1)
        return at
    if kind == _STRUCT:
        field = 0
        while text[at]:
            inner, field, at = _field(text, at, field)
            at = _skip(text, at, inner, depth + 1)
        return at + 1
    raise ShardError("unreadable", "a page header is damaged")
