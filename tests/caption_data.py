"""Frame shards and caption shards as the job leaves them, drawn and worded without a captioner."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from framecap import schema
from framecap.pack import FRAME_SHARD_SCHEMA
from framecap.shards import mark_of

FINGERPRINT = "f" * 64
COLOURS = {
    "красный": "#c0392b",
    "синий": "#2e6fb7",
    "зелёный": "#3c8d40",
    "жёлтый": "#d9a514",
    "белый": "#e8e8e8",
}
SHAPES = {"круг": "ellipse", "квадрат": "rectangle"}
PLACES = ("на траве", "у реки", "перед домом", "на столе", "в снегу", "под мостом")


@dataclass(frozen=True)
class Dataset:
    """Where the frame shards and the caption shards lie."""

    frames: Path
    captions: Path


def picture(index: int, size: tuple[int, int]) -> bytes:
    """A drawn frame, JPEG; neighbours differ."""
    colours, shapes = list(COLOURS.values()), list(SHAPES.values())
    image = Image.new("RGB", size, ("#87b5d9", "#d8c9a3", "#9db98a", "#c8ced6")[index // 7 % 4])
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, size[1] * 2 // 3, size[0], size[1]), fill=("#58764a", "#8a7a58", "#6f6f78")[index // 11 % 3])
    left, top, side = size[0] * (index * 37 % 60) // 100, size[1] // 4, size[1] // 2
    getattr(draw, shapes[index % 2])((left, top, left + side, top + side), fill=colours[index % 5])
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88)
    return data.getvalue()


def caption(index: int) -> dict[str, Any]:
    """Caption columns of frame ``index``; a few are truncated, repeated, in Latin letters, or errors."""
    row: dict[str, Any] = {
        "caption": f"{list(COLOURS)[index % 5]} {list(SHAPES)[index % 2]} {PLACES[index // 7 % 6]}",
        "caption_status": "ok",
        "caption_error": None,
        "caption_logprob": -0.2 - index * 13 % 50 / 40,
        "caption_min_logprob": -1.5,
        "caption_tokens": 6 + index % 4,
        "caption_similarity": 0.15 + index * 29 % 100 / 400,
        "caption_reused": None,
    }
    if index % 41 == 5:
        row |= {
            "caption": "человек идёт по дороге мимо дома и",
            "caption_status": "truncated",
            "caption_tokens": 40,
        }
    elif index % 43 == 6:
        row |= {"caption": "круг и круг и круг и круг и круг"}
    elif index % 47 == 7:
        row |= {"caption": "the red circle on grass"}
    elif index % 53 == 8:
        row |= dict.fromkeys(row, None) | {
            "caption_status": "error",
            "caption_error": "truncated: the JPEG ends early",
        }
    return row


def write_dataset(
    root: Path, frames: int = 60, shards: int = 3, per_video: int = 20, size: tuple[int, int] = (160, 90)
) -> Dataset:
    """``root/frames`` and ``root/captions`` with a run's summary, as the caption job would leave them."""
    data = Dataset(root / "frames", root / "captions")
    edges = [frames * shard // shards for shard in range(shards + 1)]
    for shard, (start, stop) in enumerate(pairwise(edges)):
        name = f"day-{shard % 2}/frames-{shard:05d}.parquet"
        write_shard(data.frames / name, [frame_row(index, per_video, size) for index in range(start, stop)])
        caption_shard(data, name)
    write_summary(data.captions, frames)
    return data


def frame_row(index: int, per_video: int, size: tuple[int, int]) -> dict[str, Any]:
    """One row of a frame shard."""
    video, place = f"video-{index // per_video:03d}", index % per_video
    values = (f"{video}/{place:06d}", video, place, place * 2000, *size, picture(index, size))
    return dict(zip(FRAME_SHARD_SCHEMA.names, values, strict=True))


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, FRAME_SHARD_SCHEMA), path, row_group_size=64)


def caption_shard(data: Dataset, name: str) -> None:
    """The caption shard of one frame shard."""
    source = pq.read_table(data.frames / name)
    first = int(name[-13:-8])
    columns = schema.InputColumns()
    rows = [caption(first * 1000 + index) for index in range(source.num_rows)]
    added = pa.Table.from_pylist(rows, schema.caption_schema())
    table = source.select(columns.kept(source.schema))
    for field in added.schema:
        table = table.append_column(field, added[field.name])
    errors = sum(row["caption_status"] == "error" for row in rows)
    rewrite(
        data.captions / name,
        table,
        schema.output_metadata(name, mark_of(str(data.frames / name)), FINGERPRINT, errors),
    )


def rewrite(path: Path, table: pa.Table, metadata: dict[bytes, bytes] | None = None) -> None:
    """Write a caption shard; ``metadata`` is the present file's unless given."""
    metadata = metadata or pq.read_schema(path).metadata
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd", row_group_size=64)


def write_summary(captions: Path, frames: int) -> None:
    path = captions / schema.STATE_FOLDER / "runs/20260101-000000-abcd/summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"run_id": path.parent.name, "frames": frames}))
