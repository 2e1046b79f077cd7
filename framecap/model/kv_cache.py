"""The decoder's memory of what it has read: keys and values in slots, one slot per frame.

Knows nothing of captions. A frame's prefix stands once in its slot however many beams read it. The tokens of its beams
follow step by step, so beams part and die without a copy: which entries a beam sees is a matter of masks.

Entries are always finite. A slot keeps those of the frame before, masked, and 0 × NaN is NaN: one frame that overflows
would spoil those that come after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framecap.model.attention import attend

_UNIT = 16  # entries; attention over whole units is faster on a CPU


class KvCache:
    """Keys and values of all layers, [layers, slots, entries, heads, head_dim] each, and those of a memory.

    ``start_prefill`` or ``start_step`` announces a pass; then each layer calls ``attend``.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        entries: int,
        heads: int,
        head_dim: int,
        memory_len: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        def block(length: int) -> Tensor:
            return torch.zeros(layers, slots, length, heads, head_dim, dtype=dtype, device=device)

        entries = _whole_units(entries)
        self.keys, self.values = block(entries), block(entries)
        self.memory_keys, self.memory_values = block(memory_len), block(memory_len)
        self._slots = torch.arange(slots, device=device)[:, None]
        self._rows = slice(0, 0)
        self._columns: Tensor | None = None
        self._mask: Tensor | None = None

    def start_prefill(self, rows: slice) -> None:
        """Prefixes are read into slots ``rows``, from their first entry on."""
        self._rows, self._columns, self._mask = rows, None, None

    def start_step(self, rows: slice, prefix_len: int, steps: Tensor, ancestors: Tensor | None, tokens: int) -> None:
        """Each of slots ``rows`` is fed the last of its ``steps`` int64 [n] tokens, at most ``tokens``.

        ``ancestors`` bool [n, K, ≥ tokens · K]: which generated entries each of its K beams sees; entry s · K + k is
        the token of beam k in step s. None: one beam, which sees all of its own.
        """
        fed = (steps - 1).clamp_min_(0)[:, None]
        if ancestors is None:
            columns = fed
            seen = (torch.arange(tokens, device=steps.device) <= fed)[:, None]
        else:
            beams = ancestors.shape[1]
            columns = fed * beams + torch.arange(beams, device=steps.device)
            seen = ancestors[:, :, : tokens * beams]
        length = prefix_len + seen.shape[2]
        mask = self.keys.new_zeros(*seen.shape[:2], _whole_units(length))
        mask[:, :, prefix_len:length].masked_fill_(~seen, float("-inf"))
        mask[:, :, length:] = float("-inf")
        self._rows, self._columns, self._mask = rows, prefix_len + columns, mask[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of this pass's tokens, whose keys and values it keeps: [n, Q, heads, head_dim] each → [n, Q, E]."""
        keys, values, rows = self.keys[layer], self.values[layer], self._rows
        if self._columns is None or self._mask is None:
            count, length = rows.stop - rows.start, key.shape[1]  # rows beyond only fill up a shape
            keys[rows, :length] = _finite(key[:count])
            values[rows, :length] = _finite(value[:count])
            return attend(query, key, value, scale, causal=True)
        place = (self._slots[rows], self._columns)
        keys.index_put_(place, _finite(key))
        values.index_put_(place, _finite(value))
        length = self._mask.shape[-1]
        return attend(query, keys[rows, :length], values[rows, :length], scale, self._mask)

    def keep_memory(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the memory's keys and values [n, M, heads, head_dim] into this pass's slots."""
        count = self._rows.stop - self._rows.start
        self.memory_keys[layer, self._rows] = _finite(key[:count])
        self.memory_values[layer, self._rows] = _finite(value[:count])

    def memory(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, M, heads, head_dim] of the memories of this pass's slots."""
        return self.memory_keys[layer, self._rows], self.memory_values[layer, self._rows]

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy slots ``source`` int64 [n] over ``target``: their first ``length`` entries, and their memory."""
        for block in (self.keys[:, :, :length], self.values[:, :, :length], self.memory_keys, self.memory_values):
            if block.shape[2]:
                block[:, target] = block[:, source]


def _whole_units(entries: int) -> int:
    """The number of entries that are read for so many that count."""
    return -(-entries // _UNIT) * _UNIT


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
