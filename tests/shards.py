"""Frame shards for the pipeline's tests, small and the same every time."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from framecap.pipeline.job import Job, Resources
from framecap.pipeline.plan import Chunk
from framecap.pipeline.read import read_units
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.run import run
from framecap.pipeline.settings import CaptionSettings
from framecap.pipeline.stages import CaptionActor
from framecap.pipeline.stops import Stops
from framecap.pipeline.summary import Summary


def jpeg(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A small picture of random tiles."""
    tiles = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST).save(sink, "JPEG")
    return sink.getvalue()


def shard_table(name: str, rows: int, seed: int = 0) -> pa.Table:
    """Frames ``name-0`` … with a video id, a position and a picture each."""
    return pa.table(
        {
            "frame_id": pa.array([f"{name}-{row}" for row in range(rows)], pa.string()),
            "video_id": pa.array([f"video-{name}"] * rows, pa.string()),
            "timestamp_ms": pa.array(range(0, 40 * rows, 40), pa.int64()),
            "image": pa.array([jpeg(seed + row) for row in range(rows)], pa.binary()),
        }
    )


def write_shards(folder: Path, shards: int, rows: int, row_group_size: int = 16) -> list[str]:
    """``shards`` frame shards, every other one in a sub-folder; returns their relative paths."""
    names = []
    for number in range(shards):
        name = f"{'day/' if number % 2 else ''}s{number:03d}.parquet"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(shard_table(f"s{number}", rows, 1000 * number), path, row_group_size=row_group_size)
        names.append(name)
    return sorted(names)


def caption(source: Path | str, out: Path | str, captioner: Path | str, **settings: Any) -> Summary:
    """Run the job in this process, with small batches and short captions unless told otherwise."""
    values = {"batch_size": 8, "max_new_tokens": 4, "similarity": True, "max_actors": 1, **settings}
    return run(CaptionSettings(input_uri=str(source), output_uri=str(out), captioner=str(captioner), **values))


def start_nothing(settings: CaptionSettings, *_: object) -> Resources:
    """What ``start_ray`` would say of a single core, without starting Ray."""
    return Resources(0, 1, 0.25, actors=1, min_actors=1, batch_size=settings.batch_size or 8)


def caption_in_process(
    job: Job, units: list[tuple[Chunk, ...]], resources: Resources, stops: Stops
) -> Iterator[ChunkRecord]:
    """The real stages one after the other in this process: for tests that are not about distribution."""
    actor = CaptionActor.from_options(job.actor_options())
    for unit in units:
        for chunk in read_units(pa.table({"unit": [pickle.dumps(unit)]}), job.read_options()):
            stops.check()
            yield pickle.loads(actor(chunk).column("record")[0].as_py())


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test go through ``caption_in_process``: milliseconds instead of an actor's start."""
    skip_ray(monkeypatch)


def skip_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs go through ``caption_in_process`` while the patch lasts."""
    monkeypatch.setattr("framecap.pipeline.caption.start_ray", start_nothing)
    monkeypatch.setattr("framecap.pipeline.caption.caption_units", caption_in_process)


def read_output(out: Path) -> dict[str, pa.Table]:
    """Relative path → rows of each caption shard."""
    paths = sorted(path for path in out.rglob("*.parquet"))
    return {path.relative_to(out).as_posix(): pq.ParquetFile(path).read() for path in paths}


def assert_same_captions(found: Path, expected: Path) -> None:
    """The same shards, rows and texts; scores within 1e-4. On a CPU the kernels that add up a sum depend on how many
    rows stand beside each other, and an interrupted run cuts them otherwise."""
    mine, theirs = read_output(found), read_output(expected)
    assert list(mine) == list(theirs)
    for name, table in theirs.items():
        scores = [field.name for field in table.schema if pa.types.is_floating(field.type)]
        assert mine[name].drop_columns(scores).equals(table.drop_columns(scores)), name
        for score in scores:
            pair = [np.array(part[score].to_pylist(), np.float64) for part in (mine[name], table)]
            np.testing.assert_allclose(*pair, rtol=0, atol=1e-4, err_msg=f"{name}: {score}")


def state_files(out: Path) -> list[str]:
    """What lies under OUT beside caption shards, ledger, record of the input and summaries."""
    left = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    kept = ("_framecap/ledger.jsonl", "_framecap/input.json")
    return [name for name in left if not name.endswith((".parquet", "/summary.json")) and name not in kept]
