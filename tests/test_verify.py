"""verify: a whole output passes, and each planted fault is found and named."""

from __future__ import annotations

import argparse
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caption_data import FINGERPRINT, Dataset, rewrite, write_dataset

from framecap import schema, verify
from framecap.errors import SettingsError
from framecap.verify_rows import IdStream, compare_rows

SHARD = "day-1/frames-00001.parquet"


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path)


def found(data: Dataset) -> list[str]:
    return [fault.kind for fault in verify.verify(str(data.frames), str(data.captions)).faults]


def reorder(data: Dataset, rows: list[int]) -> None:
    path = data.captions / SHARD
    rewrite(path, pq.read_table(path).take(rows))


def exit_code(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return verify.run(parser.parse_args(list(argv)))


def test_a_whole_output_passes(data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(str(data.frames), str(data.captions)) == 0
    assert f"3 shards, 60 frames, 2 with status error, fingerprint {FINGERPRINT}" in capsys.readouterr().out


def test_one_file_and_a_glob_are_inputs_too(data: Dataset) -> None:
    assert verify.verify(str(data.frames / SHARD), str(data.captions / "day-1")).ok
    result = verify.verify(f"{data.frames}/day-1/*.parquet", str(data.captions / "day-1"))
    assert result.ok
    assert result.frames == 20


def missing_shard(data: Dataset) -> None:
    (data.captions / SHARD).unlink()


def extra_shard(data: Dataset) -> None:
    shutil.copy(data.captions / SHARD, data.captions / "more.parquet")


def missing_row(data: Dataset) -> None:
    reorder(data, [*range(7), *range(8, 20)])


def missing_last_row(data: Dataset) -> None:
    reorder(data, [*range(19)])


def doubled_row(data: Dataset) -> None:
    reorder(data, [*range(7), 6, *range(7, 20)])


def doubled_first_row_at_the_end(data: Dataset) -> None:
    reorder(data, [*range(20), 0])


def swapped_neighbours(data: Dataset) -> None:
    reorder(data, [*range(4), 5, 4, *range(6, 20)])


def swapped_far_rows(data: Dataset) -> None:
    reorder(data, [18, *range(1, 18), 0, 19])


def row_of_another_shard(data: Dataset) -> None:
    path = data.captions / SHARD
    table, other = pq.read_table(path), pq.read_table(data.captions / "day-0/frames-00000.parquet")
    rewrite(path, pa.concat_tables([table[:5], other[:1], table[6:]]))


def changed_type(data: Dataset) -> None:
    path = data.captions / SHARD
    table = pq.read_table(path)
    position = table.schema.get_field_index("caption_logprob")
    rewrite(path, table.set_column(position, "caption_logprob", table["caption_logprob"].cast(pa.float64())))


def lost_column(data: Dataset) -> None:
    path = data.captions / SHARD
    rewrite(path, pq.read_table(path).drop_columns(["caption_similarity"]))


def columns_out_of_order(data: Dataset) -> None:
    path = data.captions / SHARD
    table = pq.read_table(path)
    rewrite(path, table.select(table.schema.names[::-1]))


def changed_pass_through_type(data: Dataset) -> None:
    path = data.captions / SHARD
    table = pq.read_table(path)
    position = table.schema.get_field_index("timestamp_ms")
    rewrite(path, table.set_column(position, "timestamp_ms", table["timestamp_ms"].cast(pa.float64())))


def other_fingerprint(data: Dataset) -> None:
    path = data.captions / SHARD
    metadata = {**pq.read_schema(path).metadata, schema.META_FINGERPRINT: b"0" * 64}
    rewrite(path, pq.read_table(path), metadata)


def no_metadata(data: Dataset) -> None:
    rewrite(data.captions / SHARD, pq.read_table(data.captions / SHARD), {b"who": b"someone else"})


def left_over_fragment(data: Dataset) -> None:
    fragment = data.captions / schema.STATE_FOLDER / "fragments/day-1/frames-00001/0-20.parquet"
    fragment.parent.mkdir(parents=True)
    shutil.copy(data.captions / SHARD, fragment)


def left_over_lock(data: Dataset) -> None:
    (data.captions / schema.STATE_FOLDER / "lock.json").write_text("{}")


def left_over_temporary(data: Dataset) -> None:
    (data.captions / ".frames-00001.parquet.0123.tmp").write_bytes(b"half")


def changed_frames(data: Dataset) -> None:
    os.utime(data.frames / SHARD, ns=(1, 1))


def cut_short(data: Dataset) -> None:
    path = data.captions / SHARD
    path.write_bytes(path.read_bytes()[:-100])


def frames_cut_short(data: Dataset) -> None:
    path = data.frames / SHARD
    path.write_bytes(path.read_bytes()[:-100])


def unreadable_frames_without_captions(data: Dataset) -> None:
    frames_cut_short(data)
    missing_shard(data)


def lost_pass_through_column(data: Dataset) -> None:
    path = data.captions / SHARD
    rewrite(path, pq.read_table(path).drop_columns(["timestamp_ms"]))


def unknown_status(data: Dataset) -> None:
    path = data.captions / SHARD
    table = pq.read_table(path)
    position = table.schema.get_field_index("caption_status")
    values = pa.array(["fine", *table["caption_status"].to_pylist()[1:]])
    rewrite(path, table.set_column(position, "caption_status", values))


PLANTED: dict[Callable[[Dataset], None], set[str]] = {
    missing_shard: {"missing_shard"},
    extra_shard: {"extra_shard"},
    missing_row: {"missing_row"},
    missing_last_row: {"missing_row"},
    doubled_row: {"doubled_row"},
    doubled_first_row_at_the_end: {"doubled_row"},
    swapped_neighbours: {"swapped_rows"},
    swapped_far_rows: {"swapped_rows"},
    row_of_another_shard: {"wrong_row"},
    changed_type: {"schema"},
    lost_column: {"schema"},
    columns_out_of_order: {"schema"},
    changed_pass_through_type: {"schema"},
    other_fingerprint: {"fingerprint"},
    no_metadata: {"fingerprint", "schema", "stale", "status"},
    left_over_fragment: {"unfinished"},
    left_over_lock: {"unfinished"},
    left_over_temporary: {"unfinished"},
    changed_frames: {"stale"},
    cut_short: {"unreadable"},
    frames_cut_short: {"unreadable"},
    unreadable_frames_without_captions: {"unreadable"},
    lost_pass_through_column: {"schema"},
    unknown_status: {"status"},
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_and_is_the_only_one(
    data: Dataset, plant: Callable[[Dataset], None], capsys: pytest.CaptureFixture[str]
) -> None:
    plant(data)
    assert set(found(data)) == PLANTED[plant]
    assert exit_code(str(data.frames), str(data.captions)) == 1
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in PLANTED[plant])


def test_each_missing_row_is_told_by_its_own_number(data: Dataset) -> None:
    reorder(data, [*range(7), *range(9, 18)])
    told = [fault.detail for fault in verify.verify(str(data.frames), str(data.captions)).faults]
    assert [text.partition(" of the frames:")[0] for text in told] == ["row 7", "row 8", "row 18", "row 19"]


def test_what_is_stale_is_told_in_bytes_and_time(data: Dataset) -> None:
    os.utime(data.frames / SHARD, ns=(1, 1_700_000_000_000_000_000))
    size = (data.frames / SHARD).stat().st_size
    detail = verify.verify(str(data.frames), str(data.captions)).faults[0].detail
    assert detail.endswith(f"now there are {size:,} bytes (2023-11-14 22:13:20 UTC)")


def test_in_and_out_the_wrong_way_round_are_noticed(data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    (data.captions / schema.STATE_FOLDER).mkdir(exist_ok=True)
    assert exit_code(str(data.captions), str(data.frames)) == 1
    assert f"{data.captions} is an output of the job: IN comes first, then OUT" in capsys.readouterr().out


def test_a_given_fingerprint_is_held_against_every_shard(data: Dataset) -> None:
    result = verify.verify(str(data.frames), str(data.captions), fingerprint="e" * 64)
    assert [fault.kind for fault in result.faults] == ["fingerprint"] * 3


def test_which_side_is_damaged_is_told(data: Dataset) -> None:
    frames_cut_short(data)
    cut_short(data)
    assert verify.verify(str(data.frames), str(data.captions)).faults[0].detail.startswith("the frame shard: ")
    missing_shard(data)
    assert "frame shard cannot be captioned" in verify.verify(str(data.frames), str(data.captions)).faults[0].detail


def test_a_thousand_faults_are_counted_and_the_first_twenty_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path, frames=40, shards=40)
    shutil.rmtree(data.captions / "day-0")
    shutil.rmtree(data.captions / "day-1")
    places = (str(data.frames), str(data.captions))
    assert exit_code(*places) == 1
    short = capsys.readouterr().out
    assert exit_code(*places, "--all") == 1
    assert (short.count("has no caption shard"), capsys.readouterr().out.count("has no caption shard")) == (20, 40)
    assert "and 20 more" in short
    assert "40 × missing_shard" in short


def test_an_output_that_is_not_there_is_a_mistake_and_not_a_fault(data: Dataset) -> None:
    for place, said in ((data.captions / "none", "does not exist"), (data.captions / SHARD, "is a file")):
        with pytest.raises(SettingsError, match=said):
            verify.verify(str(data.frames), str(place))


def test_ids_may_be_any_integers(data: Dataset) -> None:
    for root in (data.frames, data.captions):
        path = root / SHARD
        table = pq.read_table(path)
        ids = pa.array(range(2**63, 2**63 + len(table)), pa.uint64())
        rewrite(path, table.set_column(0, "frame_id", ids))
    assert "unreadable" not in found(data)
    reorder(data, [*range(7), *range(8, 20)])
    assert "missing_row" in found(data)


def test_nothing_to_verify_is_an_error_not_a_proof(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        verify.verify(str(tmp_path / "none"), str(tmp_path))


def test_a_million_rows_are_compared_in_the_memory_of_a_batch() -> None:
    def ids(shift: int) -> IdStream:
        return IdStream(
            pa.array([f"video/{row:09d}" for row in range(start, start + 10_000)], pa.large_string())
            for start in range(shift, 1_000_000, 10_000)
        )

    tracemalloc.start()
    before = pa.total_allocated_bytes()
    assert compare_rows(ids(0), ids(0)) == []
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - before < 8_000_000
    faults = compare_rows(ids(0), ids(10_000))
    assert len(faults) == 21
    assert {fault.kind for fault in faults} <= {"wrong_row", "missing_row"}
