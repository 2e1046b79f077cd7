"""`framecap verify` notices frame ids that occur more than once, wherever they stand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import caption, shard_table, without_ray

from framecap.cli import main
from framecap.verify_ids import IdCensus, find_ids

__all__ = ["without_ray"]  # a fixture


@pytest.mark.parametrize("held", [10, 1_000_000])
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.string(), pa.large_string()])
def test_equal_ids_are_found_in_memory_and_on_disk(kind: pa.DataType, held: int) -> None:
    ids = [*range(500), 7, 499, 7, None, None]
    values = ids if pa.types.is_integer(kind) else [None if value is None else str(value) for value in ids]
    arrays = [pa.array(values[start : start + 64], kind) for start in range(0, len(values), 64)]
    census = IdCensus(held)
    assert sum(len(array) for array in census.counted(arrays)) == len(values)
    found = find_ids((("shard", array) for array in arrays), census.repeated())
    assert found == {values[7]: ["shard row 7", "shard row 500"], values[499]: ["shard row 499", "shard row 501"]}


def test_ids_that_differ_are_not_said_to_repeat() -> None:
    census = IdCensus(50)
    list(census.counted([pa.array(range(-300, 300)), pa.array([f"{number}" for number in range(600)])]))
    assert len(census.repeated()) == 0


@pytest.mark.usefixtures("without_ray")
def test_verify_says_which_ids_occur_twice_and_where(
    tmp_path: Path, tiny_captioner_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        table = shard_table(name, 3)
        table = table.set_column(0, "frame_id", pa.array(["same", f"{name}1", f"{name}2"]))
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    assert main(["verify", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 frame id occurs more than once in IN" in printed
    assert "'same' in a.parquet row 0 and b.parquet row 0" in printed
