"""JPEG by libjpeg-turbo's own interface: the same pixels as Pillow's, sooner.

What is odd or damaged is left to Pillow (pictures.py), which decides what the reference would accept.
"""

from __future__ import annotations

import threading

import numpy as np

from framecap.model.picture_limits import DEFAULT_LIMITS, PictureLimits, check_held, check_size
from framecap.model.resample import Pixels

try:
    import simplejpeg
except ImportError:  # Pillow decodes everything then: the same pixels, later
    simplejpeg = None

# "fast" decodes at 1/2, 1/4 or 1/8 as long as the short side stays this much above the target. Measured on
# photographs at 1280x720 … 2560x1440: mean difference 0.2 … 0.6 of 255; other eighths are slower and worse.
FAST_MARGIN = 4 / 3
JPEG_START = b"\xff\xd8\xff"
MAX_SCRATCH_BYTES = 64 << 20
# A JPEG of several scans is decoded once for each of them: beyond so many pixels in all, it is no plain JPEG.
_PLAIN_SCANNED_PIXELS = 200_000_000
_scratch = threading.local()


def decode_jpeg(
    data: bytes, fast_resolution: int | None, limits: PictureLimits = DEFAULT_LIMITS, plain: bool = False
) -> Pixels | None:
    """Decode with libjpeg-turbo's own interface, pixel-identical to Pillow; None where Pillow should do it: what is
    no JPEG, four-channel pictures, and anything damaged or odd, of which Pillow decides what the reference accepts.

    ``plain``: None as well for pictures of so many scans that they take long. With ``fast_resolution`` the decoder
    may make the picture smaller. The pixels, uint8 [H, W, 3], are the thread's scratch memory: to be used up before
    the next call. Raises FrameError of kind empty or too_large.
    """
    if simplejpeg is None or not data.startswith(JPEG_START):
        return None
    scans = _count_scans(data)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # a KeyError for samplings that it does not know, a ValueError for damage
        return None
    if colorspace not in ("YCbCr", "RGB", "Gray") or not scans:
        return None
    check_size(width, height, limits.max_pixels)
    if scans > 1:  # then libjpeg keeps the coefficients of all blocks: int16 of three channels
        check_held(width, height, 9, limits)
        if plain and scans * width * height > _PLAIN_SCANNED_PIXELS:
            return None
    else:
        check_held(width, height, 3, limits)
    shrink = decoder_scale(min(height, width), fast_resolution) if fast_resolution else 1
    rows, columns = -(-height // shrink), -(-width // shrink)
    smaller = {"min_height": rows, "min_width": columns, "min_factor": shrink} if shrink > 1 else {}
    try:
        return simplejpeg.decode_jpeg(data, buffer=_scratch_buffer(3 * rows * columns), strict=True, **smaller)
    except Exception:  # damaged: see above
        return None


def check_jpeg(data: bytes, limits: PictureLimits = DEFAULT_LIMITS) -> tuple[int, int] | None:
    """(width, height) of a JPEG that is whole; None where Pillow should decide. Decodes an eighth of the size.

    Raises FrameError of kind empty or too_large.
    """
    if decode_jpeg(data, 1, limits, plain=True) is None:
        return None
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return width, height


def _count_scans(data: bytes) -> int:
    """Scans of a JPEG: 1 for what cameras and encoders write by default, 0 where its header is not understood.

    Only a JPEG that may have more is searched to its end, which takes a twelfth of the time of decoding it.
    """
    at, frame, channels = 2, 0, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, channels = marker, data[at + 9] if at + 9 < len(data) else 0
        if marker == 0xDA:
            interleaved = frame in (0xC0, 0xC1) and at + 4 < len(data) and data[at + 4] == channels
            return 1 if interleaved else data.count(b"\xff\xda", at)
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return 0


def _scratch_buffer(size: int) -> Pixels:
    """A buffer of this thread that the next decoding overwrites: fresh memory costs a fifth of the decoding."""
    if size > MAX_SCRATCH_BYTES:
        return np.empty(size, np.uint8)
    buffer: Pixels | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _scratch.buffer = np.empty(size, np.uint8)
    return buffer


def decoder_scale(short_side: int, resolution: int) -> int:
    """How many times smaller the decoder may make the picture: 1, 2, 4 or 8."""
    return next((s for s in (8, 4, 2) if short_side // s >= FAST_MARGIN * resolution), 1)
