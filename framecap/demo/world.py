"""Scenes drawn as pictures: a ground, weather, time of day, things in perspective, clutter, noise, JPEG.

Everything that matters lies inside the centred square, which is what ruCLIP's image transform keeps.
The same scene, size and random generator state give the same bytes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from framecap.demo.canvas import Canvas, Colour, mix, uniform
from framecap.demo.grounds import draw_ground, draw_weather, sky_colour
from framecap.demo.scenes import FLYING_KINDS, Scene, Thing
from framecap.demo.silhouettes import ASPECT, SILHOUETTES

FRAME_SIZES = ((160, 120), (240, 180), (320, 240), (256, 144), (180, 240), (200, 200))
RGB: dict[str, Colour] = {
    "red": (214, 24, 34), "orange": (255, 136, 0), "yellow": (252, 224, 24), "green": (22, 140, 50),
    "blue": (24, 80, 220), "violet": (146, 40, 186), "white": (250, 250, 250), "black": (24, 24, 26),
}  # fmt: skip
PAINTS: dict[str, Colour] = {
    "k": (58, 58, 62), "w": (190, 226, 240), "b": (124, 84, 48), "s": (232, 190, 156),
    "g": (70, 130, 60), "y": (236, 170, 60), "v": (236, 230, 214),
}  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """A thing at a place: centre ``x``, base ``y`` and ``height`` in units of the centred square."""

    thing: Thing
    x: float
    y: float
    height: float
    flipped: bool
    is_other: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in units of the centred square."""
        half = self.height * ASPECT[self.thing.kind] / 2
        return (self.x - half, self.y - self.height, self.x + half, self.y)


def _fit(kind: str, height: float, width: float) -> float:
    return min(height, width / ASPECT[kind])


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Where each thing of the scene stands, farthest first."""

    def put(thing: Thing, x: float, y: float, height: float, width: float, other: bool = False) -> Placed:
        tall = _fit(thing.kind, height, width)
        half = tall * ASPECT[thing.kind] / 2
        x = min(max(x, half + 0.01), 0.99 - half)
        return Placed(thing, x, max(y, tall + 0.01), tall, bool(rng.random() < 0.5), other)

    main, other = scene.main, scene.other
    if other is None:
        flying = main.kind in FLYING_KINDS
        base = uniform(rng, 0.45, 0.7) if flying else uniform(rng, 0.78, 0.95)
        if main.count == 1:
            return [put(main, uniform(rng, 0.3, 0.7), base, uniform(rng, 0.42, 0.58), 0.78)]
        step = 0.94 / main.count
        height = uniform(rng, 0.34, 0.46)
        return [
            put(main, 0.03 + step * (i + 0.5), base + uniform(rng, -0.05, 0.04), height, step * 0.9)
            for i in range(main.count)
        ]
    if scene.relation in ("left", "right"):
        x, aside = uniform(rng, 0.62, 0.7), uniform(rng, 0.15, 0.2)
        if scene.relation == "right":
            x, aside = 1 - x, 1 - aside
        base = uniform(rng, 0.82, 0.95)
        return [
            put(other, aside, base - uniform(rng, 0.0, 0.1), uniform(rng, 0.3, 0.4), 0.33, True),
            put(main, x, base, uniform(rng, 0.46, 0.58), 0.58),
        ]
    if scene.relation == "above":
        x = uniform(rng, 0.36, 0.64)
        return [
            put(other, x + uniform(rng, -0.12, 0.12), uniform(rng, 0.3, 0.36), uniform(rng, 0.26, 0.31), 0.46, True),
            put(main, x, uniform(rng, 0.88, 0.96), uniform(rng, 0.42, 0.5), 0.7),
        ]
    x = uniform(rng, 0.36, 0.64)
    return [
        put(main, x, uniform(rng, 0.68, 0.74), uniform(rng, 0.5, 0.58), 0.8),
        put(other, x + uniform(rng, -0.16, 0.16), uniform(rng, 0.94, 0.985), uniform(rng, 0.28, 0.34), 0.42, True),
    ]


def _paints(thing: Thing, night: bool) -> dict[str, Colour]:
    colour = RGB[thing.colour]
    table = dict(PAINTS)
    table["c"] = colour
    table["d"] = mix(colour, (0, 0, 0), 0.28) if thing.colour != "black" else (48, 48, 52)
    table["l"] = mix(colour, (255, 255, 255), 0.35) if thing.colour != "black" else (66, 66, 70)
    table["outline"] = (168, 168, 168) if thing.colour == "black" else mix(colour, (0, 0, 0), 0.6)
    if night:
        table = {name: mix(paint, (10, 10, 50), 0.14) for name, paint in table.items()}
    return table


def draw_thing(canvas: Canvas, placed: Placed, night: bool) -> None:
    """Draw one thing: its shadow, traces of motion, and its silhouette."""
    paints = _paints(placed.thing, night)
    left, top, right, bottom = placed.box
    w, h = right - left, bottom - top

    def to_square(flat: tuple[float, ...]) -> tuple[float, ...]:
        out: list[float] = []
        for i in range(0, len(flat), 2):
            x = 1 - flat[i] if placed.flipped else flat[i]
            out += [left + x * w, top + flat[i + 1] * h]
        return tuple(out)

    def to_box(flat: tuple[float, ...]) -> tuple[float, ...]:
        x0, y0, x1, y1 = to_square(flat)
        return (min(x0, x1), y0, max(x0, x1), y1)

    if placed.thing.moving:
        for y in (0.55, 0.72, 0.9):
            canvas.line(to_square((-0.26, y, -0.03, y)), (240, 240, 240), 0.014)
    thick = 0.05 * min(w, h) ** 0.5 * max(w, h) ** 0.5 / 0.5
    for shape, paint, flat in SILHOUETTES[placed.thing.kind]:
        fill = paints[paint]
        outline = paints["outline"] if paint in "cdl" else None
        if shape == "p":
            canvas.polygon(to_square(flat), fill, outline)
        elif shape == "r":
            x0, y0, x1, y1 = to_box(flat)
            canvas.polygon((x0, y0, x1, y0, x1, y1, x0, y1), fill, outline)
        elif shape == "e":
            canvas.ellipse(to_box(flat), fill, outline)
        elif shape == "o":
            canvas.ellipse(to_box(flat), None, fill, max(2, round(thick * 0.6 * canvas.side)))
        else:
            if outline is not None:
                canvas.line(to_square(flat), outline, thick + 2 / canvas.side)
            canvas.line(to_square(flat), fill, thick)


_NOISE = np.random.default_rng(7).normal(0.0, 1.0, (512, 512, 3)).astype(np.float32)


def _with_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with sensor noise and a change of brightness, both mild."""
    width, height = image.size
    x, y = (int(rng.integers(max(1, len(_NOISE) - side + 1))) for side in (width, height))
    columns, rows = (np.arange(start, start + side) % len(_NOISE) for start, side in ((x, width), (y, height)))
    strength, gain = uniform(rng, 0.0, 7.0), uniform(rng, 0.93, 1.06)
    pixels = np.asarray(image, dtype=np.float32) * gain + strength * _NOISE[np.ix_(rows, columns)]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def paint(
    scene: Scene,
    things: list[Placed],
    size: tuple[int, int],
    rng: np.random.Generator,
    moment: np.random.Generator | None = None,
) -> Image.Image:
    """The scene as an RGB picture of ``size`` (width, height) with its things where ``things`` says.

    ``moment`` draws what changes from frame to frame, drops and noise; by default ``rng`` draws everything.
    """
    moment = moment or rng
    canvas = Canvas(size, sky_colour(scene))
    draw_ground(canvas, scene, rng)
    for placed in things:
        draw_thing(canvas, placed, scene.time == "night")
    draw_weather(canvas, scene, moment)
    return _with_noise(canvas.image, moment)


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """The picture as JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def draw_frame(
    scene: Scene, rng: np.random.Generator, size: tuple[int, int] | None = None
) -> tuple[bytes, list[Placed]]:
    """JPEG bytes of the scene, and where its things are. Without ``size``, one of FRAME_SIZES by lot."""
    size = size or FRAME_SIZES[int(rng.integers(len(FRAME_SIZES)))]
    things = place(scene, rng)
    image = paint(scene, things, size, rng)
    return to_jpeg(image, int(rng.integers(60, 93))), things
