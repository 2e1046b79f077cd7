"""Shards that unpack to far more than they are: refused before the memory is taken, whatever way they do it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from framecap import page_sizes, row_batches
from framecap.errors import ShardError
from framecap.pipeline.plan import Piece
from framecap.pipeline.read import ReadOptions, read_chunks
from framecap.row_batches import read_batches
from framecap.schema import InputColumns
from framecap.shards import mark_of, open_shard

MOST_GROWTH = 200e6  # bytes of Arrow's memory


def read_all(folder: Path, *columns: str) -> int:
    return sum(len(batch) for _, batch in read_batches(str(folder), "a.parquet", columns))


def dictionary_bomb(path: Path, size: int, rows: int) -> None:
    """One value of ``size`` bytes that every row names."""
    value = pa.array([b"\xff\xd8\xff" + bytes(size)], pa.binary())
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), value)
    table = pa.table({"frame_id": [str(row) for row in range(rows)], "image": images})
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30)


def test_a_shard_that_is_a_bomb_is_named_and_its_neighbour_is_read(tmp_path: Path) -> None:
    dictionary_bomb(tmp_path / "a.parquet", 100_000_000, 64)
    pq.write_table(pa.table({"frame_id": ["x"], "image": [b"no picture"]}), tmp_path / "b.parquet")
    chunk = tuple(
        Piece(name, mark_of(str(tmp_path / name)), 0, rows) for name, rows in (("a.parquet", 64), ("b.parquet", 1))
    )
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    [(frames, _)] = read_chunks(((chunk),), ReadOptions(str(tmp_path), InputColumns(), resolution=8, seed=0))
    assert {name: error.kind for name, error in frames.failed.items()} == {"a.parquet": "too_large"}
    assert "100,000,007" in str(frames.failed["a.parquet"])
    assert frames.rows() == 1
    assert pool.bytes_allocated() - before < MOST_GROWTH


def test_one_value_named_by_many_rows_is_bounded_over_the_whole_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_batches, "MOST_UNPACKED", 1 << 20)
    monkeypatch.setattr(row_batches, "MOST_RATIO", 100)
    dictionary_bomb(tmp_path / "a.parquet", 10_000, 20_000)
    with pytest.raises(ShardError, match="too_large"):
        read_all(tmp_path, "image")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["zstd", "gzip", "snappy", "brotli"])
def test_a_page_that_unpacks_to_far_more_than_it_takes_is_refused(
    tmp_path: Path, codec: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_sizes, "MOST_PAGE_BYTES", 1 << 20)
    images = [b"\xff\xd8\xff" + bytes(300_000)] * 10
    table = pa.table({"frame_id": range(10), "image": images})
    pq.write_table(table, tmp_path / "a.parquet", compression=codec, use_dictionary=False, data_page_version=version)
    with pytest.raises(ShardError, match=r"too_large: a page of 'image' unpacks"):
        read_all(tmp_path, "frame_id", "image")
    assert read_all(tmp_path, "frame_id") == 10


def test_large_pages_that_are_in_the_file_and_many_small_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_sizes, "MOST_PAGE_BYTES", 1 << 16)
    images = [np.random.default_rng(row).bytes(100_000) for row in range(40)]
    table = pa.table({"frame_id": [f"{row:050d}" for row in range(40)], "image": images})
    for options in (
        {},
        {"use_dictionary": False},
        {"write_batch_size": 1, "data_page_size": 10},
        {"row_group_size": 7},
    ):
        pq.write_table(table, tmp_path / "a.parquet", **options)
        batches = [batch for _, batch in read_batches(str(tmp_path), "a.parquet", ["frame_id", "image"])]
        assert pa.Table.from_batches(batches).equals(table), options


def test_a_list_of_two_thousand_million_nulls_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_batches, "MOST_UNPACKED", 1 << 20)
    table = pa.table({"frame_id": ["x"], "list": pa.array([[None] * 3_000_000], pa.list_(pa.int8()))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ShardError, match="too_large: lists of 'list"):
        read_all(tmp_path, "list")


def test_a_footer_that_promises_too_many_rows_is_refused(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("image", pa.null())])) as writer:
        writer.write_table(pa.table({"image": pa.nulls(100_000_001)}), row_group_size=200_000_000)
    with pytest.raises(ShardError, match="100,000,001 rows"):
        open_shard(str(tmp_path), "a.parquet")


def test_damaged_page_headers_end_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"frame_id": [str(row) for row in range(1000)]}), path)
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        data[start + int(rng.integers(40))] = int(rng.integers(256))
        path.write_bytes(data)
        thread = threading.Thread(target=_swallow, args=(tmp_path,))
        thread.start()
        thread.join(30)
        assert not thread.is_alive()


def _swallow(folder: Path) -> None:
    try:
        read_all(folder, "frame_id")
    except (ShardError, pa.ArrowException, OSError):
        return
