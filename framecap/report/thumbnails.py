"""Frames as small pictures inside the page: data URIs that keep to a budget of bytes."""

from __future__ import annotations

import base64
import io

from PIL import Image

LONG_SIDE = 208
_QUALITIES = (62, 45, 30, 18)


def thumbnail(image: bytes, budget: int) -> str | None:
    """A WebP data URI of at most about ``budget`` characters; None if the bytes are no picture.

    The picture is 208 pixels on its long side; quality gives way first, size after.
    """
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.draft("RGB", (LONG_SIDE, LONG_SIDE))
            small = opened.convert("RGB")
    except Exception:  # whatever a decoder raises: the page has a gap there, as it has for a lost picture
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
