"""What a drawn scene consists of, how scenes are drawn by lot, and which of them are held out for testing.

Knows nothing of pixels (``world.py``) nor of language (``russian.py``).

A *composition* is (kind, colour, role): the role is the relation of the scene and whether the thing is its
main one or the other one. One composition in ten is held out. Every thing of a training scene has a training
composition and every thing of a test scene a held-out one, so the two splits share none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

GROUND_KINDS = (
    "bus", "car", "truck", "bicycle", "boat", "house", "tree", "flower", "dog", "cat", "horse",
    "duck", "ball", "umbrella", "armchair", "tent", "person", "flag", "bucket", "mushroom", "suitcase",
)  # fmt: skip
FLYING_KINDS = ("bird", "plane", "balloon", "kite", "rocket")
KINDS = GROUND_KINDS + FLYING_KINDS
MOVING_KINDS = ("bus", "car", "truck", "dog", "horse", "duck", "person")
COLOURS = ("red", "orange", "yellow", "green", "blue", "violet", "white", "black")
SETTINGS = ("road", "field", "beach", "snow", "bridge", "city")
RELATIONS = ("alone", "left", "right", "above", "front")
TIMES = ("day", "night")
WEATHERS = ("clear", "rain", "snowfall")
ROLES = ("alone", "left", "right", "above", "front", "left:other", "right:other", "above:other", "front:other")

Split = Literal["train", "test"]
Composition = tuple[str, str, str]


@dataclass(frozen=True)
class Thing:
    """One kind of thing in one colour, ``count`` times; ``moving`` things are drawn in motion."""

    kind: str
    colour: str
    count: int = 1
    moving: bool = False


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``other`` stands to the left of ``main``, to its right, above or before it."""

    main: Thing
    relation: str
    other: Thing | None
    setting: str
    time: str
    weather: str

    def compositions(self) -> tuple[Composition, ...]:
        """(kind, colour, role) of each thing in the scene."""
        mine = (self.main.kind, self.main.colour, self.relation)
        if self.other is None:
            return (mine,)
        return (mine, (self.other.kind, self.other.colour, f"{self.relation}:other"))


def composition_split(composition: Composition) -> Split:
    """``test`` for one composition in ten, the same everywhere: a Latin square, no randomness.

    Not more: with one in five held out, training learns which kinds a colour in a role never goes with.
    """
    kind, colour, role = (names.index(name) for names, name in zip((KINDS, COLOURS, ROLES), composition, strict=True))
    held_out = (kind + 2 * colour + 3 * role) % 5 == 0 and (kind + colour + role) % 2 == 0
    return "test" if held_out else "train"


def _lot(rng: np.random.Generator, choices: tuple[str, ...], p: tuple[float, ...] | None = None) -> str:
    return str(rng.choice(choices, p=p)) if p else choices[int(rng.integers(len(choices)))]


def _draw_thing(
    rng: np.random.Generator, kinds: tuple[str, ...], role: str, split: Split, taken: Thing | None = None
) -> Thing:
    """A thing whose composition belongs to ``split`` and whose kind differs from that of ``taken``."""
    while True:
        kind, colour = _lot(rng, kinds), _lot(rng, COLOURS)
        if composition_split((kind, colour, role)) == split and (taken is None or kind != taken.kind):
            return Thing(kind, colour)


def draw_scene(rng: np.random.Generator, split: Split) -> Scene:
    """A scene drawn by lot, all of whose compositions belong to ``split``."""
    relation = _lot(rng, RELATIONS, (0.32, 0.17, 0.17, 0.17, 0.17))
    main = _draw_thing(rng, KINDS if relation == "alone" else GROUND_KINDS, relation, split)
    count = int(rng.choice((1, 2, 3), p=(0.5, 0.28, 0.22))) if relation == "alone" else 1
    moving = main.kind in MOVING_KINDS and bool(rng.random() < 0.5)
    other = None
    if relation != "alone":
        kinds = FLYING_KINDS if relation == "above" else GROUND_KINDS
        other = _draw_thing(rng, kinds, f"{relation}:other", split, main)
    return Scene(
        Thing(main.kind, main.colour, count, moving),
        relation,
        other,
        _lot(rng, SETTINGS),
        _lot(rng, TIMES, (0.65, 0.35)),
        _lot(rng, WEATHERS, (0.5, 0.25, 0.25)),
    )


def draw_scenes(count: int, seed: int, split: Split) -> list[Scene]:
    """``count`` scenes of ``split``; the same seed gives the same scenes."""
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, split) for _ in range(count)]
