"""Encoded bytes → pixels, exactly ruCLIP's image transform.

Source: ``ruclip`` 0.0.2, ``processor.py``: RGB, ``RandomResizedCrop(R, scale=(1, 1), ratio=(1, 1))`` (the
centred square of the short side), bilinear resize with antialiasing, /255, normalise. EXIF orientation is
ignored there, hence here. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from framecap.errors import FrameError, SettingsError
from framecap.model.resample import Pixels, resize_square

try:
    import simplejpeg
except ImportError:  # Pillow decodes everything then: the same pixels, later
    simplejpeg = None

IMAGE_TRANSFORM_VERSION = 1
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: twice Image.MAX_IMAGE_PIXELS

Frame = bytes | bytearray | memoryview | str | Path | Image.Image | Pixels
Decode = Literal["exact", "fast"]

# "fast" decodes at 1/2, 1/4 or 1/8 as long as the short side stays this much above the target. Measured on
# photographs at 1280x720 … 2560x1440: mean difference 0.2 … 0.6 of 255; other eighths are slower and worse.
FAST_MARGIN = 4 / 3
_JPEG_START = b"\xff\xd8\xff"
_SIGNATURES = (_JPEG_START, b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
# What Pillow's decoders raise on damaged data, beside OSError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)
_CUT_MARKS = (
    "truncat",
    "eof",
    "broken data stream",
    "unexpected end",
    "not enough",
    "could not create decoder",
    "expected to read",
)
MAX_SCRATCH_BYTES = 64 << 20
_quiet_lock = threading.Lock()
_scratch = threading.local()


def open_frame(frame: Frame | None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a frame as an RGB picture in memory; EXIF orientation is ignored, of an animation the first
    picture counts.

    ``frame``: encoded bytes, a path, a PIL image, or a uint8 array [H, W, 3]. Pictures of more than
    ``max_pixels`` are refused from their header, before any decoding (Pillow's own limit, which may be lower,
    holds as well). Raises FrameError of kind missing, empty, truncated, not_an_image or too_large.
    """
    if isinstance(frame, Image.Image):
        return _decode(frame, max_pixels)
    if isinstance(frame, np.ndarray):
        return Image.fromarray(_check_array(frame, max_pixels))
    return _open_bytes(_read(frame), max_pixels)


def crop_and_resize(
    frame: Frame | None, resolution: int, decode: Decode = "exact", max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Return uint8 [R, R, 3]: the centred square of the short side, resized (bilinear, antialiased).

    "exact" gives the pixels of ruCLIP's transform, bit for bit. "fast" lets the JPEG decoder scale (mean
    difference below 1/255 of full scale); it equals "exact" for other formats and for small pictures.
    Raises FrameError, see ``open_frame``.
    """
    if isinstance(frame, np.ndarray):
        return _resize(_check_array(frame, max_pixels), resolution)
    if isinstance(frame, Image.Image):
        return _resize(np.asarray(_decode(frame, max_pixels)), resolution)
    data = _read(frame)
    if data.startswith(_JPEG_START) and simplejpeg is not None:
        pixels = _decode_jpeg(data, resolution if decode == "fast" else None, max_pixels)
        if pixels is not None:
            return _resize(pixels, resolution)
    return _resize(np.asarray(_open_bytes(data, max_pixels)), resolution)


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


def _read(frame: object) -> bytes:
    """The encoded bytes of a frame given as bytes or as a path."""
    if frame is None:
        raise FrameError("missing", "the frame is null; give encoded bytes, a path, a PIL image or an array.")
    if isinstance(frame, (str, Path)):
        try:
            data = Path(frame).read_bytes()
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
    if not data:
        raise FrameError("empty", "the frame has no bytes; write it again.")
    return data


def _check_array(array: npt.NDArray[np.generic], max_pixels: int) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise FrameError(
            "not_an_image",
            f"an array of {array.dtype} {list(array.shape)} is no frame; give uint8 [H, W, 3].",
        )
    _check_size(array.shape[1], array.shape[0], max_pixels)
    return array.astype(np.uint8, copy=False)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise FrameError("empty", f"the picture is {width}x{height}: it has no pixels.")
    if width * height > max_pixels:
        raise FrameError(
            "too_large",
            f"{width}x{height} is more than {max_pixels} pixels; scale it down or raise the limit.",
        )


def _decode_jpeg(data: bytes, fast_resolution: int | None, max_pixels: int) -> Pixels | None:
    """Decode with libjpeg-turbo's own interface, pixel-identical to Pillow; None where Pillow should do it:
    four-channel pictures, and anything damaged, of which Pillow decides what the reference would accept.

    The pixels are the thread's scratch memory: to be used up before the next call."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    _check_size(width, height, max_pixels)
    shrink = _decoder_scale(min(height, width), fast_resolution) if fast_resolution else 1
    rows, columns = -(-height // shrink), -(-width // shrink)
    smaller = {"min_height": rows, "min_width": columns, "min_factor": shrink} if shrink > 1 else {}
    try:
        return simplejpeg.decode_jpeg(data, buffer=_scratch_buffer(3 * rows * columns), strict=True, **smaller)
    except ValueError:
        return None


def _scratch_buffer(size: int) -> Pixels:
    """A buffer of this thread that the next decoding overwrites: fresh memory costs a fifth of the decoding."""
    if size > MAX_SCRATCH_BYTES:
        return np.empty(size, np.uint8)
    buffer: Pixels | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _scratch.buffer = np.empty(size, np.uint8)
    return buffer


def _decoder_scale(short_side: int, resolution: int) -> int:
    """How many times smaller the decoder may make the picture: 1, 2, 4 or 8."""
    return next((s for s in (8, 4, 2) if short_side // s >= FAST_MARGIN * resolution), 1)


def _open_bytes(data: bytes, max_pixels: int) -> Image.Image:
    try:
        with _quietly():
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise FrameError("too_large", f"{error} Scale the picture down.") from error
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES) or data[4:8] == b"ftyp":  # AVIF
            raise FrameError("truncated", f"{len(data)} bytes that end within the header.") from error
        raise FrameError("not_an_image", f"no decoder knows these {len(data)} bytes.") from error
    except _DECODER_ERRORS as error:
        raise _damaged(error) from error
    return _decode(image, max_pixels)


def _decode(image: Image.Image, max_pixels: int) -> Image.Image:
    _check_size(image.width, image.height, max_pixels)
    try:
        image.load()
        if image.mode == "RGB":
            return image
        with _quietly() if image.mode == "P" else contextlib.nullcontext():
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise FrameError("too_large", f"{error} Scale the picture down.") from error
    except _DECODER_ERRORS as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> FrameError:
    cut = isinstance(error, EOFError) or any(mark in str(error).lower() for mark in _CUT_MARKS)
    return FrameError("truncated" if cut else "not_an_image", f"the picture is damaged ({error}); fetch it again.")


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


def _resize(pixels: Pixels, resolution: int) -> Pixels:
    """uint8 [H, W, 3] → [R, R, 3]. Cropped first: Pillow's resize(box=…) would let pixels from outside the
    square into its edges."""
    height, width = pixels.shape[:2]
    left, top, side = _centre_square(width, height)
    return resize_square(pixels, left, top, side, resolution)
