"""A picture being drawn in units of its centred square, and the few ways to mix colours and draw lots.

Knows nothing of scenes.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]


def mix(colour: Colour, towards: Colour, share: float) -> Colour:
    """``colour`` moved by ``share`` (0…1) towards another."""
    r, g, b = (round(c + (t - c) * share) for c, t in zip(colour, towards, strict=True))
    return (r, g, b)


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number drawn evenly from ``low`` to ``high``."""
    return float(low + (high - low) * rng.random())


class Canvas:
    """A picture being drawn; coordinates are units of the centred square, which starts at ``(0, 0)``."""

    def __init__(self, size: tuple[int, int], background: Colour) -> None:
        self.size = size
        self.side = min(size)
        self.left = (size[0] - self.side) / 2
        self.top = (size[1] - self.side) / 2
        self.image = Image.new("RGB", size, background)
        self.draw = ImageDraw.Draw(self.image)

    def points(self, flat: tuple[float, ...]) -> list[tuple[float, float]]:
        """Pixel positions of ``x0, y0, x1, y1, …``."""
        return [(self.left + flat[i] * self.side, self.top + flat[i + 1] * self.side) for i in range(0, len(flat), 2)]

    def polygon(self, flat: tuple[float, ...], fill: Colour, outline: Colour | None = None) -> None:
        self.draw.polygon(self.points(flat), fill=fill, outline=outline)

    def line(self, flat: tuple[float, ...], fill: Colour, width: float) -> None:
        self.draw.line(self.points(flat), fill=fill, width=max(1, round(width * self.side)), joint="curve")

    def ellipse(
        self, box: tuple[float, ...], fill: Colour | None, outline: Colour | None = None, width: int = 1
    ) -> None:
        (x0, y0), (x1, y1) = self.points(box)
        self.draw.ellipse((x0, y0, x1, y1), fill=fill, outline=outline, width=width)
