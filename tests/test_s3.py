"""The whole job on an S3 endpoint: frames, captioner, captions, fragments, ledger and lock."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shards import caption, shard_table

from framecap.errors import LockedError
from framecap.pipeline.lock import OutputLock
from framecap.storage import join, open_fs, read_bytes, write_bytes_atomic

pytestmark = pytest.mark.usefixtures("ray_cluster")


def put_shard(uri: str, name: str, rows: int, seed: int) -> None:
    sink = io.BytesIO()
    pq.write_table(shard_table(name, rows, seed), sink, row_group_size=4)
    write_bytes_atomic(uri, sink.getvalue())


def test_frames_captioner_and_captions_may_all_be_on_s3(bucket: str, tiny_captioner_dir: Path) -> None:
    fs, _ = open_fs(bucket)
    fs.put(str(tiny_captioner_dir) + "/", "frames/captioner/", recursive=True)
    put_shard(f"{bucket}/in/a.parquet", "a", 10, 1)
    put_shard(f"{bucket}/in/deep/b.parquet", "b", 3, 50)
    places = (f"{bucket}/in", f"{bucket}/out", f"{bucket}/captioner")
    summary = caption(*places)
    assert (summary.exit_code, summary.captioned_rows, summary.published_shards) == (0, 13, 2)
    table = pq.read_table(io.BytesIO(read_bytes(f"{bucket}/out/a.parquet")))
    assert table.column("frame_id").to_pylist() == [f"a-{row}" for row in range(10)]
    assert table.column("caption_status").to_pylist() == ["truncated"] * 10
    again = caption(*places)
    assert (again.captioned_rows, again.shards_done_before) == (0, 2)
    put_shard(f"{bucket}/in/a.parquet", "a", 10, 2)
    assert caption(*places, dry_run=True).shards_by_reason == {"changed": 1}
    left = [name.partition("/out/")[2] for name in open_fs(bucket)[0].find("frames/out", withdirs=False)]
    assert sorted(name for name in left if not name.endswith("summary.json")) == [
        "_framecap/ledger.jsonl", "a.parquet", "deep/b.parquet",
    ]  # fmt: skip


def test_the_lock_holds_on_s3_as_well(bucket: str) -> None:
    uri = join(bucket, "locked", "_framecap", "lock")
    with (
        OutputLock(uri, "first", 60),
        pytest.raises(LockedError, match="held by run first"),
        OutputLock(uri, "second", 60),
    ):
        pass
    assert not open_fs(uri)[0].exists(open_fs(uri)[1])
