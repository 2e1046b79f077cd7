"""Frame shards and what a captioner says of them: small enough to write thousands, told apart to the row."""

from __future__ import annotations

import functools
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from framecap.schema import caption_schema

SCHEMA = caption_schema()


@functools.lru_cache(maxsize=4096)
def shard_bytes(shard: str, version: int, rows: int, bad: frozenset[int]) -> bytes:
    """A frame shard; what each frame shows names shard, version and row, and whether its captioner may fail."""
    table = pa.table(
        {
            "frame_id": pa.array([f"{shard}#{row}" for row in range(rows)], pa.string()),
            "image": pa.array(
                [f"{shard}#{row}@{version}{'!' if row in bad else ''}".encode() for row in range(rows)], pa.binary()
            ),
            "note": pa.array([version * 100 + row for row in range(rows)], pa.int64()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2, compression="none", write_statistics=False)
    return sink.getvalue()


@functools.lru_cache(maxsize=256)
def other_parquet(number: int) -> bytes:
    """A Parquet file that framecap did not write."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": [number]}), sink)
    return sink.getvalue()


def said(fingerprint: str, picture: bytes) -> str:
    """The caption that a captioner gives a picture: names both."""
    return json.dumps([fingerprint[:12], picture.decode()])


def captions(fingerprint: str, pictures: list[bytes], failed: list[bool]) -> pa.Table:
    """Captions as a caption actor writes them."""
    rows = len(pictures)
    columns = {
        "caption": [None if bad else said(fingerprint, p) for p, bad in zip(pictures, failed, strict=True)],
        "caption_status": ["error" if bad else "ok" for bad in failed],
        "caption_error": ["missing: gone" if bad else None for bad in failed],
        "caption_logprob": [-1.0] * rows,
        "caption_min_logprob": [-2.0] * rows,
        "caption_tokens": [None if bad else 4 for bad in failed],
        "caption_similarity": [None] * rows,
        "caption_reused": [None] * rows,
    }
    return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)
