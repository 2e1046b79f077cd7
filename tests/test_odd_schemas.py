"""Kept columns of every legal type: report and read_captions give a page and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from caption_data import Dataset, rewrite, write_dataset

from framecap import read_captions, report, show
from framecap.errors import SettingsError
from framecap.row_values import rows_of, values_of

TORN = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", "дом".encode()]).buffers())
ODD = {
    "string_view": pa.array(["а", "б"], pa.string_view()),
    "far timestamps": pa.array([2**62, 0], pa.timestamp("us")),
    "no such zone": pa.array([0, None], pa.timestamp("us", "Mars/Olympus")),
    "nanoseconds": pa.array([1, 2], pa.time64("ns")),
    "far dates": pa.array([2**30, 0], pa.date32()),
    "not UTF-8": TORN,
    "not UTF-8 within": pa.StructArray.from_arrays([TORN, pa.ListArray.from_arrays([0, 1, 2], TORN)], ["a", "b"]),
    "map": pa.array([[("а", 1)], []], pa.map_(pa.string(), pa.int32())),
    "decimal": pa.array([1, None], pa.decimal128(30, 2)),
    "large_binary": pa.array([b"\xff", b""], pa.large_binary()),
    "dictionary": pa.array(["а", "б"]).dictionary_encode(),
}


def with_column(data: Dataset, name: str, values: pa.Array) -> None:
    """Column ``name`` of the first caption shard: the first two of its rows have ``values``, the others null."""
    path = sorted(data.captions.rglob("day-*/*.parquet"))[0]
    table = pq.read_table(path)
    values = pa.chunked_array([values, pa.nulls(table.num_rows - 2, values.type)])
    if name in table.column_names:
        table = table.drop_columns([name])
    rewrite(path, table.append_column(name, values))


@pytest.mark.parametrize("kind", ODD)
def test_a_kept_column_of_any_type_is_in_the_table_and_costs_no_page(tmp_path: Path, kind: str) -> None:
    data = write_dataset(tmp_path, frames=12, per_video=4)
    with_column(data, "odd", ODD[kind])
    written = report.write_report(str(data.captions), str(tmp_path / "r.html"), str(data.frames))
    assert (written.shown, written.unreadable) == (12, ())
    table = read_captions(str(data.captions))
    assert table["odd"].null_count >= 10
    assert len(values_of(table["odd"])) == 12


@pytest.mark.parametrize("column", ["frame_id", "video_id", "timestamp_ms"])
@pytest.mark.parametrize("kind", ["string_view", "far timestamps", "not UTF-8", "dictionary"])
def test_a_column_that_the_page_shows_may_be_of_any_type(tmp_path: Path, kind: str, column: str) -> None:
    data = write_dataset(tmp_path, frames=12, per_video=4)
    with_column(data, column, ODD[kind])
    written = report.write_report(str(data.captions), str(tmp_path / "r.html"), str(data.frames))
    assert (written.shown, written.unreadable) == (12, ())


@pytest.mark.parametrize(
    ("kind", "together"),
    [
        (pa.large_string(), pa.large_string()),
        (pa.string_view(), pa.large_string()),
        (pa.dictionary(pa.int32(), pa.string()), pa.large_string()),
        (pa.null(), pa.string()),
    ],
)
def test_shards_of_several_writers_are_one_table_in_shard_order(tmp_path: Path, kind: Any, together: Any) -> None:
    data = write_dataset(tmp_path, frames=12, per_video=4)
    paths = sorted(data.captions.rglob("day-*/*.parquet"))
    before = read_captions(str(data.captions))["frame_id"].to_pylist()
    table = pq.read_table(paths[1])
    values = table["video_id"].cast(kind) if not pa.types.is_null(kind) else pa.nulls(len(table))
    rewrite(paths[1], table.set_column(table.column_names.index("video_id"), "video_id", values))
    both = read_captions(str(data.captions))
    assert both.schema.field("video_id").type == together
    assert both["frame_id"].to_pylist() == before
    assert isinstance(both.to_pandas(), pd.DataFrame)
    one = read_captions(str(data.captions), ["video_id"], pc.field("frame_id") == before[0])
    assert one.to_pylist() == [{"video_id": "video-000"}]


def test_a_column_that_is_text_here_and_a_number_there_is_named_with_its_shards(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, frames=12, per_video=4)
    with_column(data, "frame_index", pa.array(["а", "б"]))
    with pytest.raises(SettingsError, match=r"column 'frame_index' is .*string in day-0.* and int32 in .*columns="):
        read_captions(str(data.captions))
    assert read_captions(str(data.captions), ["frame_id", "caption"]).num_rows == 12


def test_a_torn_summary_of_a_run_costs_no_page(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, frames=12, per_video=4)
    for path in data.captions.rglob("summary.json"):
        path.write_text('{"run_id": ')
    assert report.write_report(str(data.captions), str(tmp_path / "r.html")).shown == 12


def test_captions_that_are_not_utf8_are_shown(tmp_path: Path) -> None:
    table = pa.table({"image": [None, None], "caption": TORN, "frame_id": TORN})
    assert "дом" in show(table)._repr_html_()


def test_values_that_python_has_no_word_for_become_texts() -> None:
    rows = rows_of(pa.table({name: ODD[name] for name in ("far timestamps", "not UTF-8 within", "no such zone")}))
    assert rows[0]["not UTF-8 within"] == {"a": "\ufffd\ufffd", "b": ["\ufffd\ufffd"]}
    assert str(2**62) in rows[0]["far timestamps"]
    assert rows[1]["no such zone"] is None
    json.dumps(rows[0])
