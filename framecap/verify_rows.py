"""Two streams of frame ids side by side: what is missing, doubled, swapped or foreign, in bounded memory.

Knows nothing of storage or of the other columns of a shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

_WINDOW = 1024
_LISTED = 20


@dataclass(frozen=True)
class RowFault:
    """One place where the rows part: ``kind`` is a key of `framecap.verify.FAULTS`."""

    kind: str
    detail: str


class IdStream:
    """Ids of one shard, read batch by batch: equal stretches are skipped as arrays, the rest id by id."""

    def __init__(self, arrays: Iterator[pa.Array]) -> None:
        self._arrays = arrays
        self._array: pa.Array | None = None
        self._ahead: deque[Any] = deque()
        self._recent: deque[Any] = deque(maxlen=_WINDOW)
        self.position = 0

    def array(self) -> pa.Array | None:
        """The rest of the current batch; None at the end, or while ids read ahead are waiting."""
        if self._ahead:
            return None
        while self._array is None or not len(self._array):
            self._array = next(self._arrays, None)
            if self._array is None:
                return None
        return self._array

    def skip(self, count: int) -> None:
        """Pass over ``count`` ids of the current batch, which were found equal."""
        array = self._array
        if array is None or count > len(array):
            raise ValueError(f"cannot skip {count} ids of the current batch")
        self._recent.extend(array[max(0, count - _WINDOW) : count].to_pylist())
        self._array = array[count:]
        self.position += count

    def peek(self, offset: int = 0) -> Any:
        """The id ``offset`` places on; None past the end (a null id reads as ``'null'``)."""
        while len(self._ahead) <= offset:
            if not self._fill():
                return None
        return self._ahead[offset]

    def _fill(self) -> bool:
        while self._array is None or not len(self._array):
            self._array = next(self._arrays, None)
            if self._array is None:
                return False
        part = self._array[:_WINDOW].to_pylist()
        self._ahead.extend("null" if value is None else value for value in part)
        self._array = self._array[_WINDOW:]
        return True

    def take(self) -> Any:
        """The next id, consumed."""
        value = self.peek()
        self._ahead.popleft()
        self._recent.append(value)
        self.position += 1
        return value

    def find(self, value: Any) -> int | None:
        """How far ahead ``value`` is, within the window."""
        for offset in range(_WINDOW):
            here = self.peek(offset)
            if here is None:
                return None
            if here == value:
                return offset
        return None

    def passed(self, value: Any) -> bool:
        """Whether ``value`` was among the last ids consumed."""
        return value in self._recent


@dataclass
class _Findings:
    faults: list[RowFault] = field(default_factory=list)
    count: int = 0
    # Positions where an id stands for another; a later one the other way round makes a swap of both.
    replaced: dict[tuple[Any, Any], int] = field(default_factory=dict)

    def add(self, kind: str, detail: str) -> None:
        self.count += 1
        if len(self.faults) < _LISTED:
            self.faults.append(RowFault(kind, detail))

    def replace(self, position: int, expected: Any, found: Any) -> None:
        partner = self.replaced.pop((found, expected), None)
        if partner is not None:
            self.add("swapped_rows", f"rows {partner} and {position}: {found!r} and {expected!r} changed places")
        else:
            self.replaced[expected, found] = position

    @property
    def many(self) -> bool:
        """Whether there is no use in going on: this shard belongs to other frames altogether."""
        return self.count + len(self.replaced) >= _WINDOW

    def finish(self) -> list[RowFault]:
        for (expected, found), position in self.replaced.items():
            self.add("wrong_row", f"row {position}: {found!r} stands for {expected!r}")
        if self.count > len(self.faults):
            kind = self.faults[-1].kind
            self.faults.append(RowFault(kind, f"and {self.count - len(self.faults)} more faults in this shard"))
        return self.faults


def compare_rows(frames: IdStream, captions: IdStream) -> list[RowFault]:
    """What must change for ``captions`` to be ``frames``, id by id; at most 20 faults and a count.

    A shard with more than a thousand faults is left there. A frame that moved further than 1,024 rows reads
    as missing in one place and extra in the other.
    """
    findings = _Findings()
    while not findings.many:
        left, right = frames.array(), captions.array()
        if left is not None and right is not None:
            count = min(len(left), len(right))
            if left[:count].equals(right[:count]):
                frames.skip(count)
                captions.skip(count)
                continue
        expected, found = frames.peek(), captions.peek()
        if expected is None and found is None:
            break
        if expected == found:
            frames.take()
            captions.take()
        else:
            _resolve(frames, captions, findings)
    return findings.finish()


def _resolve(frames: IdStream, captions: IdStream, findings: _Findings) -> None:
    """Name one fault at the current place and step over it."""
    expected, found, position = frames.peek(), captions.peek(), captions.position
    if found is None:
        _missing(frames, findings)
        return
    if expected is None:
        _extra(frames, captions, findings)
        return
    after, after_found = frames.peek(1), captions.peek(1)
    if (after, after_found) == (found, expected) or (after == after_found is not None):
        findings.replace(position, frames.take(), captions.take())
        return
    missing, extra = frames.find(found), captions.find(expected)
    if missing is not None and (extra is None or missing <= extra):
        for _ in range(missing):
            _missing(frames, findings)
    elif extra is not None:
        for _ in range(extra):
            _extra(frames, captions, findings)
    else:
        findings.replace(position, frames.take(), captions.take())


def _missing(frames: IdStream, findings: _Findings) -> None:
    position = frames.position
    findings.add("missing_row", f"row {position} of the frames: {frames.take()!r} has no caption")


def _extra(frames: IdStream, captions: IdStream, findings: _Findings) -> None:
    position, doubled = captions.position, frames.passed(captions.peek())
    value = captions.take()
    if doubled:
        findings.add("doubled_row", f"row {position}: {value!r} is captioned twice")
    else:
        findings.add("extra_row", f"row {position}: {value!r} is no frame of this shard at this place")
