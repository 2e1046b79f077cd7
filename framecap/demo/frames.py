"""Demo videos, drawn at first use: short sequences in which something moves, as frame shards.

    python -m framecap.demo.frames --out DIR [--videos 6] [--length 10]

A shard holds two videos. Columns: ``frame_id`` string, ``video_id`` string, ``frame_index`` int32,
``timestamp_ms`` int64, ``width`` and ``height`` int32 (pixels), ``image`` binary (JPEG).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from framecap.demo.scenes import FLYING_KINDS, MOVING_KINDS, Scene, draw_scene
from framecap.demo.world import FRAME_SIZES, Placed, paint, place, to_jpeg

VIDEOS_PER_SHARD = 2
FRAME_PERIOD_MS = 400


def _moves(scene: Scene) -> bool:
    things = [scene.main] + ([scene.other] if scene.other else [])
    return any(thing.kind in FLYING_KINDS or thing.moving for thing in things)


def draw_moving_scene(rng: np.random.Generator) -> Scene:
    """A scene of unseen compositions in which something drives, runs or flies."""
    while True:
        scene = draw_scene(rng, "test")
        if scene.main.kind in MOVING_KINDS:
            scene = replace(scene, main=replace(scene.main, moving=True))
        if _moves(scene) and scene.main.count == 1:
            return scene


def _moved(placed: Placed, share: float, reach: float) -> Placed:
    """Where a moving thing is after ``share`` (0…1) of the video; it goes where it looks."""
    if not (placed.thing.moving or placed.thing.kind in FLYING_KINDS):
        return placed
    way = -1.0 if placed.flipped else 1.0
    return replace(placed, x=placed.x + way * reach * (share - 0.5))


def draw_video(seed: int, length: int) -> tuple[Scene, list[bytes], tuple[int, int]]:
    """One video: its scene, ``length`` JPEG frames, and their size (width, height)."""
    rng = np.random.default_rng((seed, 3))
    scene = draw_moving_scene(rng)
    size = FRAME_SIZES[int(rng.integers(len(FRAME_SIZES)))]
    size = (size[0] * 2, size[1] * 2)
    things = place(scene, rng)
    reach = 0.24 if scene.other is None else 0.1
    frames = []
    for index in range(length):
        share = index / max(1, length - 1)
        ground, moment = np.random.default_rng((seed, 4)), np.random.default_rng((seed, 5, index))
        moved = [_moved(placed, share, reach) for placed in things]
        frames.append(to_jpeg(paint(scene, moved, size, ground, moment), 88))
    return scene, frames, size


def _rows(video: int, length: int) -> Iterator[dict[str, object]]:
    _, frames, (width, height) = draw_video(video, length)
    for index, image in enumerate(frames):
        yield {
            "frame_id": f"video-{video:02d}/{index:04d}",
            "video_id": f"video-{video:02d}",
            "frame_index": index,
            "timestamp_ms": index * FRAME_PERIOD_MS,
            "width": width,
            "height": height,
            "image": image,
        }


def write_demo_frames(out: str | Path, videos: int = 6, length: int = 10) -> list[Path]:
    """Draw ``videos`` videos of ``length`` frames into ``out`` as Parquet frame shards; their paths.

    The same arguments give the same rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("frame_id", pa.string()), ("video_id", pa.string()), ("frame_index", pa.int32()),
            ("timestamp_ms", pa.int64()), ("width", pa.int32()), ("height", pa.int32()), ("image", pa.binary()),
        ]
    )  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for first in range(0, videos, VIDEOS_PER_SHARD):
        numbers = range(first, min(videos, first + VIDEOS_PER_SHARD))
        rows = [row for video in numbers for row in _rows(video, length)]
        path = folder / f"frames-{first // VIDEOS_PER_SHARD:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
        paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--length", type=int, default=10, help="frames per video")
    args = parser.parse_args(argv)
    for path in write_demo_frames(args.out, args.videos, args.length):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
