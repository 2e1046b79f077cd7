"""Pillow's antialiased bilinear resize of a square, faster and to the same byte.

The arithmetic is Pillow's (``src/libImaging/Resample.c``: triangle filter, 22-bit fixed-point weights, rounding
to bytes between the passes). ``_resample.c`` does it with AVX2 where there is a C compiler at installation;
elsewhere Pillow itself is called, with the same result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

_WEIGHT_BITS = 22
_LOW_BITS = 11


class Weights(NamedTuple):
    """``starts`` int32 [R]; ``high`` and ``low`` int32 [R, taps/2]: pairs of 16-bit halves of the weights."""

    taps: int
    starts: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    low: npt.NDArray[np.int32]


def resize_square(pixels: Pixels, left: int, top: int, side: int, resolution: int, plain: bool = False) -> Pixels:
    """Crop the square at (left, top) out of uint8 [H, W, 3] and resize it: uint8 [R, R, 3], Pillow's bytes.

    ``plain`` leaves the vector code out.
    """
    height, width, channels = pixels.shape
    if channels != 3 or left < 0 or top < 0 or side < 1 or left + side > width or top + side > height:
        raise ValueError(f"no square of {side} at ({left}, {top}) in pixels of shape {list(pixels.shape)}.")
    square = pixels[top : top + side, left : left + side]
    if _native is None or side == resolution:
        return _resize_with_pillow(square, resolution)
    if square.strides[1:] != (3, 1) or square.strides[0] < 0:
        square = np.ascontiguousarray(square)
    weights = triangle_weights(side, resolution)
    target = np.empty((resolution, resolution, 3), np.uint8)
    failed = _native(
        square.ctypes.data,
        square.strides[0],
        side,
        target.ctypes.data,
        resolution,
        weights.taps,
        weights.starts.ctypes.data,
        weights.high.ctypes.data,
        weights.low.ctypes.data,
        int(plain),
    )
    if failed:
        raise MemoryError(f"no memory to resize {side}x{side} pixels to {resolution}x{resolution}.")
    return target


@lru_cache(maxsize=64)
def triangle_weights(side: int, resolution: int) -> Weights:
    """Weights of ``side`` inputs in each of ``resolution`` outputs, as Pillow computes them in float64."""
    scale = side / resolution
    support = max(scale, 1.0)
    centre = (np.arange(resolution) + 0.5) * scale
    starts = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centre + support + 0.5).astype(np.int64), side) - starts
    taps = -(-int(counts.max()) // 4) * 4
    tap = np.arange(taps)
    distance = np.abs((tap + starts[:, None] - centre[:, None] + 0.5) * (1.0 / support))
    exact = np.where((tap < counts[:, None]) & (distance < 1.0), 1.0 - distance, 0.0)
    total = np.zeros(resolution)
    for column in exact.T:  # one after the other, as Pillow sums
        total += column
    fixed = (0.5 + exact / total[:, None] * (1 << _WEIGHT_BITS)).astype(np.int64)
    fixed[tap >= counts[:, None]] = 0
    halves = fixed >> _LOW_BITS, fixed & ((1 << _LOW_BITS) - 1)
    high, low = (np.ascontiguousarray(h[:, 0::2] | h[:, 1::2] << 16).astype(np.int32) for h in halves)
    return Weights(taps, starts.astype(np.int32), high, low)


def _resize_with_pillow(square: Pixels, resolution: int) -> Pixels:
    resized = Image.fromarray(square).resize((resolution, resolution), Image.Resampling.BILINEAR)
    return np.array(resized)


def _load_native() -> Callable[..., int] | None:
    spec = find_spec("framecap.model._resample")
    if spec is None or spec.origin is None or not spec.origin.endswith((".so", ".pyd", ".dylib")):
        return None
    try:
        function = ctypes.CDLL(spec.origin).framecap_resample_square
    except (OSError, AttributeError):  # built for another machine
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, ctypes.c_int64, number, pointer, number, number, pointer, pointer, pointer, number]
    function.restype = ctypes.c_int
    return function


_native = _load_native()
