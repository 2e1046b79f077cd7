"""The setting of a scene: sky, ground, the clutter that belongs to it, and the weather in front of it all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from framecap.demo.canvas import Canvas, Colour, mix, uniform
from framecap.demo.scenes import Scene

SKY: dict[str, Colour] = {"clear": (150, 200, 236), "rain": (150, 160, 170), "snowfall": (186, 192, 200)}
NIGHT_SKY: dict[str, Colour] = {"clear": (20, 26, 62), "rain": (34, 38, 54), "snowfall": (48, 52, 74)}
GROUND: dict[str, Colour] = {
    "road": (104, 168, 84), "field": (196, 200, 92), "beach": (232, 206, 150), "snow": (232, 238, 246),
    "bridge": (70, 130, 180), "city": (170, 164, 160),
}  # fmt: skip
LEFT, RIGHT, BOTTOM = -1.0, 2.0, 2.0  # beyond the edges of any frame, in units of the centred square
Light = Callable[[Colour], Colour]


def sky_colour(scene: Scene) -> Colour:
    """The sky by time of day and weather."""
    return (NIGHT_SKY if scene.time == "night" else SKY)[scene.weather]


def draw_ground(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Draw moon and stars, horizon, ground and clutter."""
    night = scene.time == "night"

    def light(colour: Colour) -> Colour:
        return mix(colour, (14, 16, 44), 0.55) if night else colour

    horizon = uniform(rng, 0.44, 0.56)
    if night and scene.weather == "clear":
        for _ in range(12):
            x, y = uniform(rng, -0.3, 1.3), uniform(rng, 0.0, 0.35)
            canvas.ellipse((x, y, x + 0.012, y + 0.012), (240, 240, 220))
    elif scene.weather == "clear":
        x, y = uniform(rng, -0.1, 1.0), uniform(rng, 0.02, 0.2)
        canvas.ellipse((x, y, x + 0.3, y + 0.07), (214, 230, 242))
    if scene.setting in ("field", "road", "snow"):
        x = uniform(rng, -0.2, 0.2)
        hill = (206, 214, 228) if scene.setting == "snow" else (120, 150, 110)
        canvas.ellipse((x - 0.6, horizon - 0.1, x + 0.6, horizon + 0.2), light(hill))
        canvas.ellipse((x + 0.3, horizon - 0.06, x + 1.5, horizon + 0.2), light(mix(hill, (90, 110, 110), 0.2)))
    fill = light(GROUND[scene.setting])
    canvas.polygon((LEFT, horizon, RIGHT, horizon, RIGHT, BOTTOM, LEFT, BOTTOM), fill)
    DETAILS[scene.setting](canvas, horizon, light, rng)


def _road(canvas: Canvas, horizon: float, light: Light, rng: np.random.Generator) -> None:
    top = horizon + 0.1
    canvas.polygon((LEFT, top + 0.05, RIGHT, top, RIGHT, 0.97, LEFT, 1.0), light((96, 96, 100)))
    middle, start = (top + 0.98) / 2, uniform(rng, 0.0, 0.2)
    for i in range(-4, 10):
        x = start + i * 0.2
        canvas.line((x, middle, x + 0.11, middle), light((236, 236, 230)), 0.022)


def _field(canvas: Canvas, horizon: float, light: Light, rng: np.random.Generator) -> None:
    for _ in range(26):
        depth = float(rng.random())
        x, y = uniform(rng, -0.3, 1.3), horizon + 0.04 + (0.96 - horizon) * depth
        tall = 0.02 + 0.035 * depth
        canvas.line((x, y, x - 0.4 * tall, y - tall), light((140, 160, 50)), 0.008)
        canvas.line((x, y, x + 0.5 * tall, y - tall), light((150, 150, 60)), 0.008)


def _beach(canvas: Canvas, horizon: float, light: Light, rng: np.random.Generator) -> None:
    shore = horizon + uniform(rng, 0.1, 0.16)
    canvas.polygon((LEFT, horizon, RIGHT, horizon, RIGHT, shore, LEFT, shore + 0.02), light((50, 140, 190)))
    canvas.line((LEFT, shore + 0.02, RIGHT, shore), light((240, 244, 246)), 0.014)
    for _ in range(14):
        x, y = uniform(rng, -0.3, 1.3), uniform(rng, shore + 0.05, 1.0)
        canvas.ellipse((x, y, x + 0.025, y + 0.012), light((204, 176, 124)))


def _snow(canvas: Canvas, horizon: float, light: Light, rng: np.random.Generator) -> None:
    for _ in range(5):
        x, tall = uniform(rng, -0.4, 1.3), uniform(rng, 0.1, 0.16)
        y = horizon + 0.02
        canvas.polygon((x, y, x + tall * 0.3, y - tall, x + tall * 0.6, y), light((96, 120, 116)))
    for _ in range(6):
        x, y, wide = uniform(rng, -0.3, 1.0), uniform(rng, horizon + 0.1, 0.95), uniform(rng, 0.2, 0.5)
        canvas.ellipse((x, y, x + wide, y + 0.06), light((214, 222, 236)))


def _bridge(canvas: Canvas, horizon: float, light: Light, rng: np.random.Generator) -> None:
    steel, deck = light((146, 92, 78)), light((160, 150, 138))
    x = uniform(rng, 0.1, 0.3)
    for pylon in (x - 0.7, x, x + 0.65, x + 1.35):
        canvas.line((pylon, 0.1, pylon, 0.9), steel, 0.03)
        canvas.line((pylon - 0.35, horizon + 0.04, pylon, 0.1, pylon + 0.35, horizon + 0.04), steel, 0.01)
    canvas.polygon((LEFT, horizon + 0.12, RIGHT, horizon + 0.12, RIGHT, 0.97, LEFT, 0.97), deck)
    canvas.line((LEFT, horizon + 0.06, RIGHT, horizon + 0.06), steel, 0.018)
    start = uniform(rng, 0.0, 0.12)
    for i in range(-8, 18):
        post = start + i * 0.12
        canvas.line((post, horizon + 0.06, post, horizon + 0.13), steel, 0.012)
    canvas.line((LEFT, 0.975, RIGHT, 0.975), steel, 0.016)


def _city(canvas: Canvas, horizon: float, light: Light, rng: np.random.Generator) -> None:
    x = LEFT - uniform(rng, 0.0, 0.1)
    while x < RIGHT:
        wide, tall = uniform(rng, 0.1, 0.2), uniform(rng, 0.12, 0.36)
        wall = light(mix((120, 116, 124), (170, 150, 140), float(rng.random())))
        top = horizon - tall
        canvas.polygon((x, top, x + wide, top, x + wide, horizon, x, horizon), wall)
        for storey in np.arange(top + 0.03, horizon - 0.02, 0.06):
            y = float(storey)
            canvas.line((x + 0.02, y, x + wide - 0.02, y), light((230, 220, 170)), 0.016)
        x += wide + 0.01
    for y in (horizon + 0.12, horizon + 0.24, horizon + 0.38):
        canvas.line((LEFT, y, RIGHT, y), light((140, 134, 130)), 0.008)
    start = uniform(rng, 0.0, 0.2)
    for i in range(-5, 10):
        x = start + i * 0.2
        canvas.line((x, horizon + 0.01, x + (x - 0.5) * 0.6, 1.0), light((140, 134, 130)), 0.008)


DETAILS: dict[str, Callable[[Canvas, float, Light, np.random.Generator], None]] = {
    "road": _road, "field": _field, "beach": _beach, "snow": _snow, "bridge": _bridge, "city": _city,
}  # fmt: skip


def draw_weather(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Draw rain or snowflakes over everything."""
    if scene.weather == "clear":
        return
    tones: tuple[Colour, Colour] = ((120, 136, 160), (200, 214, 230))
    tone = tones[scene.time == "night"]
    for _ in range(46):
        x, y = uniform(rng, -0.4, 1.4), uniform(rng, -0.4, 1.3)
        if scene.weather == "rain":
            canvas.line((x, y, x - 0.025, y + 0.09), tone, 0.006)
        else:
            canvas.ellipse((x, y, x + 0.02, y + 0.02), (252, 252, 255))
