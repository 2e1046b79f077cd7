"""Frames as small pictures inside the page: data URIs that keep to a budget of bytes."""

from __future__ import annotations

import base64
import io

from PIL import Image

from framecap.errors import FrameError
from framecap.model.decoder_process import shared_decoder

LONG_SIDE = 208
_QUALITIES = (62, 45, 30, 18)


def thumbnail(image: bytes, budget: int) -> str | None:
    """A WebP data URI of at most about ``budget`` characters; None if the bytes are no picture.

    The picture is 208 pixels on its long side; quality gives way first, size after.
    """
    try:
        small = Image.fromarray(shared_decoder().fit_within(image, LONG_SIDE))
    except FrameError:
        return None
    side = LONG_SIDE
    while True:
        small.thumbnail((side, side), Image.Resampling.BILINEAR)
        for quality in _QUALITIES:
            data = io.BytesIO()
            small.save(data, "WEBP", quality=quality, method=2)
            if data.tell() * 4 / 3 + 40 <= budget or (side <= 64 and quality == _QUALITIES[-1]):
                return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
        side = side * 3 // 4
