"""Encoded pictures from anywhere → RGB pixels: a closed list of formats, limits known from the header.

Every fault of a picture is a ``FrameError``, whatever its decoder raises. See decoder_process.py for the limits of
time and memory that hold even where a decoder never returns. Imports no torch, so that the child process of
decoder_process.py starts quickly. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from framecap.errors import FrameError
from framecap.model.jpeg import JPEG_START, decode_jpeg
from framecap.model.picture_limits import DEFAULT_LIMITS, PictureLimits, check_bytes, check_held, check_size
from framecap.model.resample import Pixels, resize_square

# Formats that Pillow decodes itself, in this process ("JPEG" includes the MPO of phones). EPS is not among them:
# Pillow would start Ghostscript on it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")

Frame = bytes | bytearray | memoryview | str | Path | Image.Image | Pixels
Decode = Literal["exact", "fast"]
IMAGE_TRANSFORM_VERSION = 1  # part of the fingerprint

_SIGNATURES = (JPEG_START, b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # pictures in the container of MP4
_VIDEO_STARTS = (b"\x1aE\xdf\xa3", b"FLV\x01", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75")  # Matroska, FLV, MPEG, WMV
_CUT_MARKS = (
    "truncat",
    "eof",
    "broken data stream",
    "unexpected end",
    "not enough",
    "could not create decoder",
    "expected to read",
)
# Bytes that Pillow holds per pixel at the peak, from file to RGB array; measured with Pillow 13 on 25-megapixel
# pictures. WebP's decoder keeps two RGBA canvases and a copy, OpenJPEG an int32 per channel.
_HELD_PER_PIXEL = {"WEBP": 16, "AVIF": 16, "JPEG2000": 24}
_HELD_OTHERWISE = 8
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags
_BAND_PIXELS = 4 << 20
_quiet_lock = threading.Lock()


def open_frame(frame: Frame | None, limits: PictureLimits = DEFAULT_LIMITS) -> Image.Image:
    """Return a frame as an RGB picture in memory; EXIF orientation is ignored, of an animation the first
    picture counts.

    ``frame``: encoded bytes, a path, a PIL image, or a uint8 array [H, W, 3]. Pictures beyond ``limits`` are refused
    from their header, before any decoding (Pillow's own limit, which may be lower, holds as well).
    Raises FrameError of kind missing, empty, truncated, not_an_image or too_large.
    """
    if isinstance(frame, Image.Image):
        return _decode(frame, limits)
    if isinstance(frame, np.ndarray):
        return Image.fromarray(_check_array(frame, limits))
    return _open_bytes(_read(frame, limits), limits)


def crop_and_resize(
    frame: Frame | None, resolution: int, decode: Decode = "exact", limits: PictureLimits = DEFAULT_LIMITS
) -> Pixels:
    """Return uint8 [R, R, 3]: the centred square of the short side, resized (bilinear, antialiased).

    "exact" gives the pixels of ruCLIP's transform, bit for bit. "fast" lets the JPEG decoder scale (mean
    difference below 1/255 of full scale); it equals "exact" for other formats and for small pictures.
    Raises FrameError, see ``open_frame``.
    """
    if isinstance(frame, np.ndarray):
        return resize(_check_array(frame, limits), resolution)
    if isinstance(frame, Image.Image):
        return resize(_to_array(_decode(frame, limits)), resolution)
    data = _read(frame, limits)
    pixels = decode_jpeg(data, resolution if decode == "fast" else None, limits)
    return resize(decode_with_pillow(data, limits) if pixels is None else pixels, resolution)


def decode_with_pillow(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> Pixels:
    """Encoded bytes of any format of ``FORMATS`` → uint8 [H, W, 3]. Raises FrameError, see ``open_frame``."""
    return _to_array(_open_bytes(data, limits))


def fit_within(pixels: Pixels, side: int) -> Pixels:
    """uint8 [H, W, 3] → the whole picture in its proportions, at most ``side`` pixels long."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return np.array(image)


def resize(pixels: Pixels, resolution: int) -> Pixels:
    """uint8 [H, W, 3] → [R, R, 3]. Cropped first: Pillow's resize(box=…) would let pixels from outside the
    square into its edges."""
    height, width = pixels.shape[:2]
    left, top, side = _centre_square(width, height)
    return resize_square(pixels, left, top, side, resolution)


def _read(frame: object, limits: PictureLimits) -> bytes:
    """The encoded bytes of a frame given as bytes or as a path."""
    if frame is None:
        raise FrameError("missing", "the frame is null; give encoded bytes, a path, a PIL image or an array.")
    if isinstance(frame, (str, Path)):
        try:
            data = _read_file(frame, limits)
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or error
            raise FrameError("missing", f"{frame} cannot be read ({cause}); check the path.") from error
    elif isinstance(frame, (bytes, bytearray, memoryview)):
        data = bytes(frame)
    else:
        raise FrameError(
            "not_an_image",
            f"a {type(frame).__name__} is no frame; give encoded bytes, a path, a PIL image or an array.",
        )
    check_bytes(len(data), limits)
    return data


def _read_file(path: str | Path, limits: PictureLimits) -> bytes:
    """A regular file; a device or a pipe, which may never end, is refused unread."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(0, "it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no regular file")
        head = file.read(12)
        _check_video(head)  # first: most videos are larger than a picture may be
        check_bytes(status.st_size, limits)
        return head + file.read(limits.max_bytes + 1)


def _check_array(array: npt.NDArray[np.generic], limits: PictureLimits) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise FrameError(
            "not_an_image",
            f"an array of {array.dtype} {list(array.shape)} is no frame; give uint8 [H, W, 3].",
        )
    check_size(array.shape[1], array.shape[0], limits.max_pixels)
    return array.astype(np.uint8, copy=False)


def _check_video(head: bytes) -> None:
    """Raise FrameError if a file that begins with these 12 bytes is a video."""
    mp4 = head[4:8] == b"ftyp" and head[8:12] not in _STILL_BRANDS
    if mp4 or head.startswith(_VIDEO_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        raise FrameError("not_an_image", "this is a video; `framecap pack VIDEO --out frames` takes pictures from it.")


def _open_bytes(data: bytes, limits: PictureLimits) -> Image.Image:
    _check_video(data[:12])
    try:
        with _quietly():
            image = Image.open(io.BytesIO(data), formats=installed_formats())
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES) or data[4:8] == b"ftyp":  # AVIF
            raise FrameError("truncated", f"{len(data)} bytes that end within the header.") from error
        raise FrameError(
            "not_an_image", f"these {len(data)} bytes are none of {', '.join(FORMATS)}; convert the picture."
        ) from error
    except Exception as error:
        raise _damaged(error) from error
    return _decode(image, limits)


@functools.cache
def installed_formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow was built with; it has AVIF since 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(image: Image.Image, limits: PictureLimits) -> Image.Image:
    check_size(image.width, image.height, limits.max_pixels)
    check_held(image.width, image.height, _HELD_PER_PIXEL.get(image.format or "", _HELD_OTHERWISE), limits)
    try:
        _check_tile(image, limits)
        image.load()
        if image.mode == "RGB":
            return image
        with _quietly() if image.mode == "P" else contextlib.nullcontext():
            return image.convert("RGB")
    except FrameError:
        raise
    except Exception as error:
        raise _damaged(error) from error


def _check_tile(image: Image.Image, limits: PictureLimits) -> None:
    """A TIFF's tile may be larger than the picture, and is decoded whole."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    if tags is not None:
        width, length = (int(tags.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        check_held(width, length, _HELD_OTHERWISE, limits)


def _damaged(error: Exception) -> FrameError:
    """The ``FrameError`` for whatever a decoder raised: most raise OSError, some nearly anything."""
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return FrameError("too_large", f"{str(error) or 'out of memory.'} Scale the picture down.")
    cut = isinstance(error, EOFError) or any(mark in str(error).lower() for mark in _CUT_MARKS)
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return FrameError("truncated" if cut else "not_an_image", f"the picture is damaged ({text}); fetch it again.")


def _to_array(image: Image.Image) -> Pixels:
    """The pixels of an RGB picture; in bands, since numpy's own conversion holds a large picture twice more."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        return np.asarray(image)
    pixels: Pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep Pillow's warnings (bombs below the limit, odd palettes, odd metadata) out of the caller's log.

    Under a lock, since ``catch_warnings`` swaps a process-wide list; only headers are read inside.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _centre_square(width: int, height: int) -> tuple[int, int, int]:
    """(left, top, side) of the centred square; offsets round down, as torchvision's."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side
