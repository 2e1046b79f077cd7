"""Tensors between host and device without waiting: pinned memory, copies that overlap with compute.

On a CPU there is nothing to transfer and everything here is a plain copy.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which lies on the host, on ``device``; the host does not wait for a GPU's copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def index(places: list[int], device: torch.device) -> Tensor:
    """``places`` as int64 [n] on ``device``."""
    return to_device(torch.tensor(places, dtype=torch.long), device)


def pinned(array: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """``array`` of uint8 in memory from which ``device`` can fetch it by itself; any thread may prepare it so."""
    return _pin(array) if device.type == "cuda" else array


def _pin(array: np.ndarray) -> Tensor:
    tensor = torch.empty(array.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(tensor.numpy(), array)
    return tensor


def ahead(batches: Iterable[np.ndarray | Tensor], device: torch.device) -> Iterator[Tensor]:
    """``batches`` of uint8 on ``device``; prefetches the next batch while the current one is in use.

    Tensors must be pinned (see ``pinned``); arrays are pinned here.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _as_tensor(batch)
        return
    copying, using = _copy_stream(device), torch.cuda.current_stream(device)

    def send(batch: np.ndarray | Tensor) -> tuple[Tensor, torch.cuda.Event]:
        source = _pin(batch) if isinstance(batch, np.ndarray) else batch
        with torch.cuda.stream(copying):
            moved = source.to(device, non_blocking=True)
            return moved, copying.record_event()

    sent: deque[tuple[Tensor, torch.cuda.Event]] = deque()
    for batch in batches:
        sent.append(send(batch))
        if len(sent) > 1:
            yield _arrived(*sent.popleft(), using)
    if sent:
        yield _arrived(*sent.popleft(), using)


def _as_tensor(batch: np.ndarray | Tensor) -> Tensor:
    """``batch`` as it lies there; torch warns of read-only arrays, so these are copied."""
    if isinstance(batch, Tensor):
        return batch
    return torch.from_numpy(batch if batch.flags.writeable else batch.copy())


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device that copies. Torch hands its streams out in turn, from a pool for each priority:
    this priority is nobody else's here, so it is never the stream that captures or computes."""
    return torch.cuda.Stream(device, priority=-1)


def _arrived(moved: Tensor, event: torch.cuda.Event, using: torch.cuda.Stream) -> Tensor:
    using.wait_event(event)
    moved.record_stream(using)  # its memory belongs to the stream that copied
    return moved


class HostCopy:
    """Tensors on their way to the host, as they are at this point of the device's stream."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._tensors = tuple(tensor.clone() for tensor in tensors)
            return
        pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        self._tensors = tuple(
            host.copy_(tensor, non_blocking=True) for host, tensor in zip(pinned, tensors, strict=True)
        )
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> tuple[Tensor, ...]:
        """The tensors, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
