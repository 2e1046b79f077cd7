"""What one picture may cost: pixels, bytes, memory and time.

See decoder_process.py for how time and memory are enforced where a decoder never returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from framecap.errors import FrameError

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: twice Image.MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class PictureLimits:
    """What one picture may cost.

    ``max_pixels``: width x height. ``max_bytes``: of the encoded picture. ``max_held_bytes``: memory for all buffers
    that decoding holds at once, estimated from the header. ``seconds``: of decoding, where decoder_process.py decodes.
    """

    max_pixels: int = MAX_PIXELS
    max_bytes: int = 128 << 20
    max_held_bytes: int = 512 << 20
    seconds: float = 30.0


DEFAULT_LIMITS = PictureLimits()


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise FrameError if a picture of this size has no pixels or too many."""
    if width < 1 or height < 1:
        raise FrameError("empty", f"the picture is {width}x{height}: it has no pixels.")
    if width * height > max_pixels:
        raise FrameError(
            "too_large",
            f"{width}x{height} is more than {max_pixels} pixels; scale it down or raise the limit (--max-pixels).",
        )


def check_bytes(size: int, limits: PictureLimits) -> None:
    """Raise FrameError if an encoded picture of ``size`` bytes is empty or too large."""
    if not size:
        raise FrameError("empty", "the frame has no bytes; write it again.")
    if size > limits.max_bytes:
        raise FrameError(
            "too_large",
            f"{size} bytes are more than the limit of {limits.max_bytes}; raise it (--max-image-bytes) or re-encode.",
        )


def check_held(width: int, height: int, per_pixel: int, limits: PictureLimits) -> None:
    """Raise FrameError if decoding a picture of this size would hold more memory than the limit.

    ``per_pixel``: bytes of all its buffers at the peak.
    """
    if (held := width * height * per_pixel) > limits.max_held_bytes:
        raise FrameError(
            "too_large",
            f"decoding {width}x{height} takes about {held >> 20} MiB, the limit is {limits.max_held_bytes >> 20}; "
            "scale it down or raise the limit (--max-decode-bytes).",
        )
