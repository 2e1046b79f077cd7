"""Encoded bytes → pixels, exactly ruCLIP's image transform.

Source: ``ruclip`` 0.0.2, ``processor.py``: RGB, ``RandomResizedCrop(R, scale=(1, 1), ratio=(1, 1))`` (the
centred square of the short side), bilinear resize with antialiasing, /255, normalise. EXIF orientation is
ignored there, hence here. Knows nothing of models.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

IMAGE_TRANSFORM_VERSION = 1
MAX_PIXELS = 178_956_970  # twice Pillow's warning limit: where Pillow itself refuses

Pixels = npt.NDArray[np.uint8]
Frame = bytes | bytearray | memoryview | str | Path | Image.Image | Pixels
Decode = Literal["exact", "fast"]


def open_frame(frame: Frame, max_pixels: int = MAX_PIXELS) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame.convert("RGB")
    if isinstance(frame, np.ndarray):
        return Image.fromarray(frame)
    data = Path(frame).read_bytes() if isinstance(frame, (str, Path)) else bytes(frame)
    return Image.open(io.BytesIO(data)).convert("RGB")


def crop_and_resize(
    frame: Frame, resolution: int, decode: Decode = "exact", max_pixels: int = MAX_PIXELS
) -> Pixels:
    image = open_frame(frame, max_pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR))


def normalise(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 [N, R, R, 3] → ``dtype`` [N, 3, R, R] = (pixels / 255 - mean) / std, on the device of ``pixels``.

    Computed in float32 (torchvision's ``ToTensor`` and ``Normalize``), then rounded to ``dtype``.
    """
    channels_first = (
        pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    )
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1)
    return channels_first.sub_(shift).div_(scale).to(dtype)


def preprocess(
    frames: Sequence[Frame], resolution: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Frames → float32 [N, 3, R, R] on the CPU, as ``RuCLIPProcessor``'s ``pixel_values``. Raises FrameError."""
    pixels = np.empty((len(frames), resolution, resolution, 3), np.uint8)
    for row, frame in zip(pixels, frames, strict=True):
        row[...] = crop_and_resize(frame, resolution)
    return normalise(torch.from_numpy(pixels), mean, std)
