"""The whole job on an S3 endpoint: frames, captioner, captions, fragments, ledger and lock."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import caption, jpeg, shard_table

from framecap import Captioner
from framecap.errors import LockedError
from framecap.pipeline.lock import OutputLock
from framecap.storage import join, open_fs, read_bytes, write_bytes_atomic
from framecap.training.run import train_captioner
from framecap.training.settings import TrainSettings

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
        "_framecap/input.json", "_framecap/ledger.jsonl", "a.parquet", "deep/b.parquet",
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


def test_a_captioner_is_trained_from_s3_to_s3(bucket: str, data: Path, tmp_path: Path) -> None:
    fs, _ = open_fs(bucket)
    for name in ("ruclip-vit-b32-tiny", "rugpt3-tiny"):
        for file in (data / name).iterdir():
            if file.is_file():
                fs.put_file(str(file), f"frames/parts/{name}/{file.name}")
    sink = io.BytesIO()
    table = shard_table("p", 12).append_column("caption", pa.array([f"Кадр номер {row}." for row in range(12)]))
    pq.write_table(table, sink, row_group_size=6)
    write_bytes_atomic(f"{bucket}/pairs/a.parquet", sink.getvalue())
    train_captioner(
        TrainSettings(
            encoder=f"{bucket}/parts/ruclip-vit-b32-tiny",
            decoder=f"{bucket}/parts/rugpt3-tiny",
            pairs=f"{bucket}/pairs",
            out=f"{bucket}/trained",
            work_dir=str(tmp_path / "run"),
            steps=2,
            batch_size=4,
        )
    )
    assert (tmp_path / "run" / "curve.csv").is_file()
    said = Captioner.from_pretrained(f"{bucket}/trained", device="cpu").caption([jpeg(0)])
    assert said[0].status in ("ok", "truncated")
