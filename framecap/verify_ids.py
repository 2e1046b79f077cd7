"""Which frame ids occur more than once, among any number of them and in bounded memory.

Ids are told apart by 64 bits. Those of more than some millions go to files on disk by their uppermost bits, so that
equal ones meet in the same file. Knows nothing of shards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from framecap.scratch import ScratchFolder

_HELD = 4_000_000  # keys in memory: 32 MB
_FILES = 256

Keys = np.ndarray  # uint64 [N]


class IdCensus:
    """``counted`` passes ids on and counts them, for several threads at once; ``repeated`` says which came twice."""

    def __init__(self, held: int = _HELD) -> None:
        self._most, self._held = held, 0
        self._parts: list[Keys] = []
        self._folder: ScratchFolder | None = None
        self._guard = threading.Lock()

    def counted(self, arrays: Iterable[pa.Array]) -> Iterator[pa.Array]:
        """The same arrays; null is no id."""
        for array in arrays:
            keys = keys_of(array.drop_null())
            with self._guard:
                self._parts.append(keys)
                self._held += len(keys)
                if self._held > self._most:
                    self._spill()
            yield array

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = ScratchFolder()
        keys = np.sort(np.concatenate(self._parts))
        bounds = np.searchsorted(keys, np.arange(1, _FILES, dtype=np.uint64) << np.uint64(56))
        for number, part in enumerate(np.split(keys, bounds)):
            with Path(self._folder.name, str(number)).open("ab") as file:
                part.tofile(file)
        self._parts, self._held = [], 0

    def repeated(self) -> Keys:
        """The keys (see ``keys_of``) of ids that were counted more than once, each once; ends the census."""
        if self._folder is None:
            return _repeated(np.concatenate(self._parts)) if self._parts else np.empty(0, np.uint64)
        if self._parts:
            self._spill()
        with self._folder as folder:
            return np.concatenate([_repeated(np.fromfile(file, np.uint64)) for file in sorted(Path(folder).iterdir())])


def _repeated(keys: Keys) -> Keys:
    keys = np.sort(keys)
    return np.unique(keys[1:][keys[1:] == keys[:-1]])


def keys_of(array: pa.Array) -> Keys:
    """64 bits of each id, equal for equal ids within this process."""
    if pa.types.is_integer(array.type):
        return np.asarray(array).astype(np.int64).view(np.uint64)
    return np.fromiter(map(hash, array.to_pylist()), np.int64, len(array)).view(np.uint64)


def find_ids(shards: Iterable[tuple[str, pa.Array]], keys: Keys) -> dict[Any, list[str]]:
    """The ids of ``keys``, each with the first two places where it stands; ``shards``: name and successive ids."""
    places: dict[Any, list[str]] = {}
    row, current = 0, ""
    for name, array in shards:
        row = row if name == current else 0
        current = name
        rows = np.flatnonzero(np.asarray(array.is_valid()))
        for position in rows[np.isin(keys_of(array.drop_null()), keys)].tolist():
            where = places.setdefault(array[position].as_py(), [])
            if len(where) < 2:
                where.append(f"{name} row {row + position}")
        row += len(array)
        if len(places) >= len(keys) and all(len(where) == 2 for where in places.values()):
            break
    return {value: where for value, where in places.items() if len(where) == 2}
