"""Pictures that are whole and do harm, each of a few kilobytes; and whole ones of every format, to mutate."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from framecap.model.pictures import FORMATS

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"
ENDLESS_EPS = EPS + b"{} loop\n%%EOF\n"


def picture(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """Random tiles, so that every decoder has something to do."""
    tiles = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, name, **options)
    return sink.getvalue()


def of_every_format(seed: int = 0) -> dict[str, bytes]:
    """A picture in each format that framecap takes, and in the odd shapes that some of them have."""
    image = picture(seed=seed)
    Image.init()
    found = {name: encoded(image, name) for name in FORMATS if name in Image.SAVE}
    found["progressive JPEG"] = encoded(image, "JPEG", progressive=True)
    found["CMYK JPEG"] = encoded(image.convert("CMYK"), "JPEG")
    found["palette PNG"] = encoded(image.convert("P"), "PNG")
    found["16-bit PNG"] = encoded(Image.fromarray(np.arange(1920, dtype=np.uint16).reshape(40, 48)), "PNG")
    found["animated GIF"] = encoded(image, "GIF", save_all=True, append_images=[picture(seed=seed + 1)])
    found["animated WEBP"] = encoded(image, "WEBP", save_all=True, append_images=[picture(seed=seed + 1)])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found[f"{compression} TIFF"] = encoded(image, "TIFF", compression=compression)
    return found


def huge_gif() -> bytes:
    """35 bytes whose canvas has 177 million pixels."""
    head = b"GIF89a" + struct.pack("<HHBBB", 65535, 2700, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00;"


def jpeg_of_many_scans(scans: int, side: int = 2000) -> bytes:
    """A progressive JPEG that repeats a scan: some ten milliseconds of decoding for each."""
    data = encoded(Image.new("RGB", (side, side), (9, 80, 200)), "JPEG", progressive=True, quality=50)
    start = data.index(b"\xff\xda")
    stop = data.index(b"\xff\xc4", start)
    return data[:start] + data[start:stop] * scans + data[start:]


def jpeg_441() -> bytes:
    """A JPEG whose chroma has a quarter of the rows, as jpegtran makes of a turned 4:1:1 picture."""
    data = bytearray(encoded(picture(64, 64), "JPEG", subsampling="4:2:0"))
    data[data.index(b"\xff\xc0") + 11] = 0x14  # sampling of luma: 1 across, 4 down
    return bytes(data)


def tiff_of_large_tile() -> bytes:
    """A TIFF of 10 x 10 pixels in one tile of 60,000 x 60,000."""
    tags = [(256, 4, 1, 10), (257, 4, 1, 10), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 200), (325, 4, 1, 64)]
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
    return (head + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)).ljust(300, b"\x80")
