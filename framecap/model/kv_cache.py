"""The decoder's memory of what it has read: one static block per layer, a slot per frame.

Knows nothing of captions. A frame's prefix stands once in its slot however many beams read it, and the
tokens of its beams follow step by step, so that beams part and die without a copy: which entries a beam may
see is a matter of the attention mask.

Entries are always finite. A slot keeps those of the frame before, masked, and 0 × NaN is NaN: one frame that
overflows would spoil those that come after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# The cache is read in whole units of so many entries. Sums over them are then made in one order, however long the
# longest caption is: on a CPU, what a frame gets does not depend on its neighbours, to the last bit.
_UNIT = 16


def whole_units(entries: int) -> int:
    """The number of entries that are read for so many that count."""
    return -(-entries // _UNIT) * _UNIT


@dataclass
class Window:
    """Where one pass writes, and how far it reads: slots ``rows``, ``columns`` int64 [n, Q], ``length``."""

    rows: slice
    columns: Tensor | slice
    length: int


@dataclass
class LayerCache:
    """One layer's keys and values [slots, max_len, heads, head_dim] and those of the bridge's memory."""

    keys: Tensor
    values: Tensor
    memory_keys: Tensor | None = None
    memory_values: Tensor | None = None


@dataclass
class KvCache:
    """All layers' caches; slots 0 … n-1 are the live ones."""

    layers: list[LayerCache]
    slots: int
    max_len: int
    window: Window = field(default_factory=lambda: Window(slice(0, 0), slice(0, 0), 0))
    row_index: Tensor = field(default_factory=lambda: torch.empty(0, 1, dtype=torch.long))

    @classmethod
    def allocate(
        cls,
        layers: int,
        slots: int,
        max_len: int,
        heads: int,
        head_dim: int,
        memory_len: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KvCache:
        """Reserve ``layers`` × 2 × [slots, max_len in whole units, heads, head_dim], and as much for a memory."""
        max_len = whole_units(max_len)

        def block(length: int) -> Tensor:
            return torch.zeros(slots, length, heads, head_dim, dtype=dtype, device=device)

        filled = [
            LayerCache(
                block(max_len),
                block(max_len),
                block(memory_len) if memory_len else None,
                block(memory_len) if memory_len else None,
            )
            for _ in range(layers)
        ]
        index = torch.arange(slots, device=device)[:, None]
        return cls(filled, slots, max_len, row_index=index)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [n, Q, heads, head_dim] into the window's rows and columns."""
        keys, values = _finite(keys), _finite(values)
        rows, columns = self.window.rows, self.window.columns
        cache = self.layers[layer]
        if isinstance(columns, slice):
            cache.keys[rows, columns] = keys
            cache.values[rows, columns] = values
        else:
            place = (self.row_index[rows], columns)
            cache.keys.index_put_(place, keys)
            cache.values.index_put_(place, values)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, length, heads, head_dim] of the window, without copying."""
        cache = self.layers[layer]
        rows, length = self.window.rows, self.window.length
        return cache.keys[rows, :length], cache.values[rows, :length]

    def write_memory(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the memory's keys and values [n, M, heads, head_dim] into the window's rows."""
        cache = self.layers[layer]
        if cache.memory_keys is None or cache.memory_values is None:
            raise ValueError("this cache was allocated without room for a memory")
        cache.memory_keys[self.window.rows] = _finite(keys)
        cache.memory_values[self.window.rows] = _finite(values)

    def read_memory(self, layer: int) -> tuple[Tensor, Tensor]:
        """The memory's keys and values [n, M, heads, head_dim] of the window's rows."""
        cache = self.layers[layer]
        if cache.memory_keys is None or cache.memory_values is None:
            raise ValueError("this cache was allocated without room for a memory")
        return cache.memory_keys[self.window.rows], cache.memory_values[self.window.rows]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy slots ``source`` int64 [n] over ``target`` (their first ``length`` entries, and their memory)."""
        for layer in self.layers:
            for block in (layer.keys, layer.values):
                block[target, :length] = block[source, :length]
            for memory in (layer.memory_keys, layer.memory_values):
                if memory is not None:
                    memory[target] = memory[source]


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
