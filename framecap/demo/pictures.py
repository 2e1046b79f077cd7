"""Drawn scenes as training material: pixels at the encoder's resolution, captions, and what is where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from framecap.demo.russian import describe
from framecap.demo.scenes import COLOURS, KINDS, RELATIONS, SETTINGS, TIMES, WEATHERS, Scene, Split, draw_scenes
from framecap.demo.world import Placed, draw_frame
from framecap.model.images import crop_and_resize

# What the auxiliary heads of the encoder's pre-training tell apart, and into how many classes.
SCENE_LABELS = {
    "kind": len(KINDS), "colour": len(COLOURS), "relation": len(RELATIONS), "other_kind": len(KINDS) + 1,
    "other_colour": len(COLOURS) + 1, "setting": len(SETTINGS), "time": len(TIMES),
    "weather": len(WEATHERS), "count": 3, "moving": 2,
}  # fmt: skip
PATCH_LABELS = {"patch_kind": len(KINDS) + 1, "patch_colour": len(COLOURS) + 1, "patch_role": 3}


@dataclass(frozen=True)
class Pictures:
    """``pixels`` uint8 [N, R, R, 3]; ``scene_labels`` int64 [N, len(SCENE_LABELS)]; ``patch_labels`` uint8
    [N, grid², len(PATCH_LABELS)], 0 where the ground shows; ``captions`` and ``scenes`` of length N."""

    pixels: npt.NDArray[np.uint8]
    captions: list[str]
    scenes: list[Scene]
    scene_labels: npt.NDArray[np.int64]
    patch_labels: npt.NDArray[np.uint8]


def _scene_labels(scene: Scene) -> tuple[int, ...]:
    main, other = scene.main, scene.other
    return (
        KINDS.index(main.kind),
        COLOURS.index(main.colour),
        RELATIONS.index(scene.relation),
        1 + KINDS.index(other.kind) if other else 0,
        1 + COLOURS.index(other.colour) if other else 0,
        SETTINGS.index(scene.setting),
        TIMES.index(scene.time),
        WEATHERS.index(scene.weather),
        main.count - 1,
        int(main.moving),
    )


def _patch_labels(things: list[Placed], grid: int) -> npt.NDArray[np.uint8]:
    labels = np.zeros((grid, grid, len(PATCH_LABELS)), dtype=np.uint8)
    centres = (np.arange(grid) + 0.5) / grid
    for placed in things:
        left, top, right, bottom = placed.box
        rows = (centres > top) & (centres < bottom)
        columns = (centres > left) & (centres < right)
        label = (
            1 + KINDS.index(placed.thing.kind),
            1 + COLOURS.index(placed.thing.colour),
            1 + int(placed.is_other),
        )
        labels[np.ix_(rows, columns)] = label
    return labels.reshape(grid * grid, -1)


def draw_pictures(count: int, seed: int, split: Split, resolution: int, grid: int) -> Pictures:
    """Draw ``count`` scenes of ``split`` through JPEG and ruCLIP's own image transform."""
    rng = np.random.default_rng((seed, 1))
    scenes = draw_scenes(count, seed, split)
    pixels = np.empty((count, resolution, resolution, 3), dtype=np.uint8)
    patches = np.empty((count, grid * grid, len(PATCH_LABELS)), dtype=np.uint8)
    captions = []
    for row, scene in enumerate(scenes):
        frame, things = draw_frame(scene, rng)
        pixels[row] = crop_and_resize(frame, resolution)
        patches[row] = _patch_labels(things, grid)
        captions.append(describe(scene, rng))
    labels = np.array([_scene_labels(scene) for scene in scenes], dtype=np.int64)
    return Pictures(pixels, captions, scenes, labels, patches)
