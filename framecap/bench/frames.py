"""JPEG frames to measure with: drawn ones with the detail of photographs, or one's own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from framecap.errors import SettingsError

JPEG_QUALITY = 85
PICTURES = 64  # different ones; drawing one takes as long as decoding twenty
SIZES = {"720p": (1280, 720), "1080p": (1920, 1080)}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def make_frames(count: int, size: tuple[int, int], folder: str | None = None, seed: int = 0) -> list[bytes]:
    """``count`` JPEG frames of ``size`` (width, height), whose bytes all differ; at most ``PICTURES`` pictures.

    Pictures come from ``folder`` (cut to the shape and scaled), or are drawn as noise of many scales, of
    about the same bytes per pixel as a photograph at this quality. Raises SettingsError for an empty folder.
    """
    paths = _pictures(folder) if folder else []
    pictures = []
    for number in range(min(count, len(paths) or PICTURES, PICTURES)):
        picture = _fit(paths[number], size) if paths else _draw(size, seed + number)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        pictures.append(buffer.getvalue())
    return [_with_comment(pictures[number % len(pictures)], str(number).encode()) for number in range(count)]


def _with_comment(jpeg: bytes, comment: bytes) -> bytes:
    """The same picture in other bytes: a comment segment behind the first segment, which is JFIF's header."""
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:end] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + jpeg[end:]


def _pictures(folder: str) -> list[Path]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise SettingsError(f"--pictures {folder} holds no pictures ({', '.join(_SUFFIXES)}).")
    return paths


def _fit(path: Path, size: tuple[int, int]) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    scale = max(size[0] / picture.width, size[1] / picture.height)
    box = (size[0] / scale, size[1] / scale)
    left, top = (picture.width - box[0]) / 2, (picture.height - box[1]) / 2
    whole = (left, top, left + box[0], top + box[1])
    return picture.resize(size, Image.Resampling.BICUBIC, box=whole)


def _draw(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as in photographs, with colours of its own."""
    random = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for cell, strength in ((320, 60), (120, 40), (48, 26), (20, 15), (8, 8), (4, 4), (2, 3)):
        shape = (size[1] // cell + 2, size[0] // cell + 2, 3)
        grain = random.normal(0, strength, shape).astype(np.float32)
        grain = grain.mean(axis=2, keepdims=True) * 1.4 + grain * 0.35
        layers = [Image.fromarray(grain[..., i]).resize(size, Image.Resampling.BICUBIC) for i in range(3)]
        total += np.stack([np.asarray(layer) for layer in layers], axis=2)
    return Image.fromarray(np.clip(total + random.uniform(90, 160, 3), 0, 255).astype(np.uint8))
