"""framecap status: what is done, left and failed, who holds the lock, and how the last runs ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from caption_data import Dataset, frame_row, write_dataset, write_shard

from framecap import schema
from framecap.cli import main
from framecap.errors import SettingsError
from framecap.pipeline.lock import OutputLock
from framecap.status import lines_of, status_of

RUNS = f"{schema.STATE_FOLDER}/runs"


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    dataset = write_dataset(tmp_path)
    summary = {
        "run_id": "20260202-000000-abcd", "started": "2026-02-02T00:00:00+00:00", "seconds": 61.0,
        "captioned_rows": 60, "published_shards": 3, "exit_code": 3, "stopped": None,
        "failed_shards": {"bad.parquet": "unreadable: no footer"}, "settings": {"input_uri": str(dataset.frames)},
    }  # fmt: skip
    path = dataset.captions / RUNS / summary["run_id"] / "summary.json"  # type: ignore[operator]
    path.parent.mkdir()
    path.write_text(json.dumps(summary))
    return dataset


def add_frames(data: Dataset, name: str, rows: int) -> None:
    write_shard(data.frames / name, [frame_row(index, 20, (32, 18)) for index in range(rows)])


def test_a_whole_output_is_done(data: Dataset) -> None:
    status = status_of(str(data.captions))
    assert (status.done_shards, status.done_rows) == (3, 60)
    assert not status.left
    assert status.errors_by_kind == {"truncated": status.error_rows}
    assert status.failed == {"bad.parquet": "unreadable: no footer"}
    assert [run.exit_code for run in status.runs] == [3, 0]
    assert status.holder is None


def test_what_is_left_has_its_reason_and_its_rows(data: Dataset) -> None:
    add_frames(data, "new.parquet", 7)
    changed = data.frames / "day-0/frames-00000.parquet"
    os.utime(changed, (1, 1))
    status = status_of(str(data.captions))
    assert status.left == {"new.parquet": "new", "day-0/frames-00000.parquet": "changed"}
    assert status.left_rows == 27
    assert (status.done_shards, status.done_rows) == (2, 40)


def test_caption_shards_without_frames_and_foreign_files_are_counted(data: Dataset) -> None:
    (data.frames / "day-1/frames-00001.parquet").unlink()
    write_shard(data.captions / "mine.parquet", [frame_row(0, 20, (32, 18))])
    status = status_of(str(data.captions))
    assert status.without_frames == 1
    assert status.foreign == ["mine.parquet"]
    assert status.done_shards == 2


def test_the_holder_of_the_lock_is_named(data: Dataset) -> None:
    with OutputLock(f"{data.captions}/{schema.STATE_FOLDER}/lock", "run-7", 60):
        holder = status_of(str(data.captions)).holder
    assert holder is not None
    assert "run-7" in holder
    assert str(os.getpid()) in holder


def test_without_its_input_nothing_is_said_of_what_is_left(data: Dataset) -> None:
    data.frames.rename(data.frames.with_name("moved"))
    status = status_of(str(data.captions))
    assert status.done_shards == 3
    assert "left    unknown: the input is not known or cannot be listed; give --frames IN" in lines_of(status)
    assert status_of(str(data.captions), str(data.frames.with_name("moved"))).input_uri is not None
    with pytest.raises(SettingsError, match="does not exist"):
        status_of(str(data.captions), str(data.frames))


def test_the_command_prints_counts_and_its_exit_code_says_whether_work_is_left(
    data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(data.captions)]) == 1  # a shard failed in the last run
    printed = capsys.readouterr().out
    assert "done    3 shards, 60 rows\n" in printed
    assert "failed  1 shard in the last run\n        bad.parquet: unreadable: no footer\n" in printed
    assert "lock    free" in printed
    assert "60 rows captioned, 3 shards published in 61 s, exit code 3" in printed
    assert main(["status", str(data.captions), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["done_rows"] == 60


def test_a_place_that_is_no_output_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "neither caption shards nor runs" in capsys.readouterr().err
