"""What the scale and overhead programs compute from what they see. Nothing is timed here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from framecap.bench.overhead import End, rate
from framecap.bench.scale import Sample, _tenths, main, sample, write_frames
from framecap.errors import CaptionerError

# Two processes, batches of four: a slow start until second 10, then one batch a second, two CPU seconds each; the
# last batch of each, begun before, is soon done.
ENDS = [
    End(3, 4, 5), End(10, 4, 20), *(End(10 + turn, 4, 20 + 2 * turn) for turn in range(1, 5)),
    End(14.1, 4, 29), End(14.2, 4, 30),
]  # fmt: skip


@pytest.mark.parametrize(("clock", "expected"), [("wall", 4.0), ("cpu", 4.0)])
def test_the_rate_leaves_out_the_first_and_the_last_batch_of_every_process(clock: str, expected: float) -> None:
    assert rate(ENDS, 2, clock) == pytest.approx(expected)
    assert rate(list(reversed(ENDS)), 2, clock) == pytest.approx(expected)


def test_too_few_batches_to_measure_are_an_error() -> None:
    with pytest.raises(CaptionerError, match="3 batches are too few to measure 2 processes"):
        rate(ENDS[:3], 2, "wall")


def test_a_table_of_memory_has_one_line_per_tenth() -> None:
    samples = [Sample(seconds, 7 * seconds) for seconds in range(100)]
    assert [row.frames for row in _tenths(samples, 200)] == [7, 21, 42, 63, 84, 105, 126, 140, 161, 182, 203]


def test_a_sample_sees_what_kind_of_process_holds_how_much() -> None:
    command = [sys.executable, "-c", "import time; held = b'x' * (50 << 20); time.sleep(60)", "ray::MapWorker"]
    child = subprocess.Popen(command)
    try:
        while psutil.Process(child.pid).memory_info().rss < 50 << 20:
            assert child.poll() is None
        found = sample(psutil.Process(os.getpid()), 1.0, 0)
    finally:
        child.kill()
        child.wait()
    assert found.largest["actor"] > 20
    assert found.total >= found.largest["actor"]


def test_frames_to_measure_with_all_differ(tmp_path: Path) -> None:
    write_frames(tmp_path, 3, 20)
    table = pq.read_table(tmp_path)
    assert sorted(table.column("frame_id").to_pylist()) == list(range(60))
    assert len(set(table.column("image").to_pylist())) == 60


def test_planning_is_measured_and_an_unknown_subject_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--subjects", "plan", "--plan-shards", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 30 |")
    assert main(["--subjects", "plans"]) == 2
    assert "'plans' is unknown; known: plan, shards, memory" in capsys.readouterr().err
