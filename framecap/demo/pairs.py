"""Drawn scenes as training pairs for ``train_captioner``: Parquet with image, caption and split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from framecap.demo.russian import describe
from framecap.demo.scenes import draw_scenes
from framecap.demo.world import draw_frame

ROW_GROUP = 2_000
SCHEMA = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("split", pa.string())])


def write_pairs(path: Path, training: int, validation: int, seed: int) -> None:
    """Draw scenes of training compositions only, in both splits: what is held out stays unseen here too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for number, (split, count) in enumerate((("train", training), ("validation", validation))):
            for group in _drawn(count, seed + number, split):
                writer.write_table(group)


def _drawn(count: int, seed: int, split: str) -> Iterator[pa.Table]:
    rng = np.random.default_rng((seed, 1))
    scenes = draw_scenes(count, seed, "train")
    for start in range(0, count, ROW_GROUP):
        group = scenes[start : start + ROW_GROUP]
        images = [draw_frame(scene, rng)[0] for scene in group]
        captions = [describe(scene, rng) for scene in group]
        yield pa.table([images, captions, [split] * len(group)], schema=SCHEMA)
