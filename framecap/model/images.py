"""Frames → the tensor that the encoder takes, exactly ruCLIP's image transform.

Source: ``ruclip`` 0.0.2, ``processor.py``: RGB, ``RandomResizedCrop(R, scale=(1, 1), ratio=(1, 1))`` (the
centred square of the short side), bilinear resize with antialiasing, /255, normalise. EXIF orientation is
ignored there, hence here. See pictures.py for decoding. Knows nothing of models.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from framecap.errors import SettingsError
from framecap.model.pictures import IMAGE_TRANSFORM_VERSION, Decode, Frame, crop_and_resize, open_frame
from framecap.model.resample import Pixels


def normalise(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 [N, R, R, 3] → ``dtype`` [N, 3, R, R] = (pixels / 255 - mean) / std, on the device of ``pixels``.

    Computed in float32 (torchvision's ``ToTensor`` and ``Normalize``), then rounded to ``dtype``.
    """
    scaled = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(_channels(tuple(mean), pixels.device)).div_(_channels(tuple(std), pixels.device)).to(dtype)


@functools.lru_cache(maxsize=32)
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """[1, 3, 1, 1], made once for a device: on a GPU each copy from the host would wait for what is running."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def check_list(items: object, name: str) -> None:
    """Raise SettingsError if ``items``, the argument called ``name``, is a single frame or text instead of a list.

    A string would be read letter by letter, an array [H, W, 3] row by row.
    """
    one = isinstance(items, str | bytes | bytearray | memoryview | os.PathLike | Image.Image)
    if one or (isinstance(items, np.ndarray) and items.ndim == 3):
        kind = type(items).__name__
        raise SettingsError(f"{name} is one {kind}, and a list is needed; put it in brackets: [{name.rstrip('s')}]")


def preprocess(frames: Sequence[Frame], resolution: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Frames → float32 [N, 3, R, R] on the CPU, ``RuCLIPProcessor``'s ``pixel_values``.

    Raises FrameError for a bad frame, SettingsError for one frame instead of a list.
    """
    check_list(frames, "frames")
    pixels = np.empty((len(frames), resolution, resolution, 3), np.uint8)
    for row, frame in zip(pixels, frames, strict=True):
        row[...] = crop_and_resize(frame, resolution)
    return normalise(torch.from_numpy(pixels), mean, std)


__all__ = [
    "IMAGE_TRANSFORM_VERSION",
    "Decode",
    "Frame",
    "Pixels",
    "check_list",
    "crop_and_resize",
    "normalise",
    "open_frame",
    "preprocess",
]
