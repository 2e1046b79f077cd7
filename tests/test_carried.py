"""The input's own columns come out with every value and type as it was, or the shard is refused."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from framecap.errors import ShardError
from framecap.pipeline.carried import check_int96
from framecap.pipeline.fragments import write_fragment
from framecap.pipeline.plan import Piece, ShardPlan
from framecap.pipeline.publish import Places, _FragmentCache, _Span, publish_shard
from framecap.row_batches import read_batches
from framecap.schema import InputColumns, caption_schema
from framecap.shards import mark_of, open_shard

MB = 1 << 20
FAR = [dt.datetime(9999, 12, 31), dt.datetime(1, 1, 1), None, dt.datetime(2024, 1, 1, 12, 30, 0, 125)]
COLUMNS: dict[str, pa.Array] = {
    "far times": pa.array(FAR, pa.timestamp("us")),
    "nanoseconds": pa.array([1, 2, None, 3], pa.timestamp("ns", "Europe/Moscow")),
    "string_view": pa.array(["а", None, "б", "в" * 40], pa.string_view()),
    "large_string": pa.array(["а", None, "б", ""], pa.large_string()),
    "not UTF-8": pa.Array.from_buffers(pa.string(), 4, pa.array([b"\xff", b"\xd0", b"", b"a"]).buffers()),
    "dictionary": pa.array(["а", "б", None, "а"]).dictionary_encode(),
    "struct": pa.array([{"bytes": b"x", "path": "a"}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}]),
    "list": pa.array([[1], [], None, [2, None]], pa.list_(pa.int16())),
    "map": pa.array([[("a", 1)], None, [], [("b", None)]], pa.map_(pa.string(), pa.int64())),
    "fixed": pa.array([[1.0, 2.0], None, [3.0, 4.0], [0.0, 0.0]], pa.list_(pa.float16(), 2)),
    "decimal": pa.array([1, None, 2, 3], pa.decimal128(38, 10)),
    "time": pa.array([1, 2, None, 86_399_999_999_999], pa.time64("ns")),
    "null": pa.nulls(4),
    "bool": pa.array([True, None, False, True]),
    "dotted.name": pa.array([1, 2, 3, None], pa.uint8()),
}


def published(folder: Path, table: pa.Table, **options: Any) -> pa.Table:
    """What becomes of a frame shard with the columns of ``table``, of which every row is captioned."""
    source = folder / "in" / "s.parquet"
    source.parent.mkdir(parents=True)
    rows = table.num_rows
    pq.write_table(table.append_column("frame_id", pa.array([f"f{row}" for row in range(rows)])), source, **options)
    publish(folder, rows)
    return pq.read_table(folder / "out" / "s.parquet")


def publish(folder: Path, rows: int) -> None:
    source = folder / "in" / "s.parquet"
    added = caption_schema()
    captions = pa.table(
        [pa.nulls(rows, f.type) if f.nullable else pa.array(["ok"] * rows) for f in added], schema=added
    )
    mark = mark_of(str(source))
    fragments = str(folder / "fragments")
    name = write_fragment(fragments, (Piece("s.parquet", mark, 0, rows),), "f", captions)
    places = Places(str(folder / "in"), str(folder / "out"), fragments, InputColumns(), added, "f")
    plan = ShardPlan("s.parquet", mark, rows, "new", ((0, rows),))
    publish_shard(places, plan, [_Span(0, rows, name, 0)], _FragmentCache(fragments))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_carried_column_keeps_its_values_and_its_type(name: str, tmp_path: Path) -> None:
    table = pa.table({name: COLUMNS[name]})
    out = published(tmp_path, table, row_group_size=3)
    assert out.schema.field(name).type == table.schema.field(name).type
    assert out.column(name).combine_chunks().equals(COLUMNS[name])


def test_int96_timestamps_of_every_year_are_carried_over(tmp_path: Path) -> None:
    out = published(tmp_path, pa.table({"at": COLUMNS["far times"]}), use_deprecated_int96_timestamps=True)
    assert out["at"].to_pylist() == FAR


@pytest.mark.parametrize("nested", [False, True])
def test_int96_finer_than_a_microsecond_is_refused(tmp_path: Path, nested: bool) -> None:
    at = pa.array([1_000, 1_001], pa.timestamp("ns"))
    column = pa.StructArray.from_arrays([at], ["when"]) if nested else at
    pq.write_table(pa.table({"at": column}), tmp_path / "s.parquet", use_deprecated_int96_timestamps=True)
    with (
        open_shard(str(tmp_path), "s.parquet") as file,
        pytest.raises(ShardError, match=r"'at' has INT96 .*nanoseconds"),
    ):
        check_int96(str(tmp_path), "s.parquet", file, ["at"])


def test_a_value_that_a_dictionary_repeats_does_not_inflate(tmp_path: Path) -> None:
    table = pa.table({"note": ["x" * MB] * 200})
    pq.write_table(table, tmp_path / "s.parquet", use_dictionary=True)
    sizes = [batch.nbytes for _, batch in read_batches(str(tmp_path), "s.parquet", ["note"])]
    assert max(sizes) <= 16 * MB
