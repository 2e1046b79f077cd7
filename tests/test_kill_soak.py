"""Forty kills of real drivers at moments that matter, and an S3 endpoint that fails: ``make soak``."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from shards import read_output, state_files
from simulation.frames import shard_bytes
from simulation.history import captioner
from test_lock import FaultyS3, faulty_s3

from framecap.storage import open_fs, write_bytes_atomic

__all__ = ["faulty_s3"]  # a fixture
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
HERE = Path(__file__).parent
SHARDS, ROWS = 12, 12
KILLS = int(os.environ.get("FRAMECAP_TEST_KILLS", "40"))
MOMENTS = ("clock", "publishing", "ledger", "state")


def start(source: str, out: str, *state: str) -> subprocess.Popen[bytes]:
    """A driver as a process of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "kill_driver.py"), source, out, captioner("A"), *state]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)


def moment(kind: str, out: Path, state: Path) -> Callable[[], bool]:
    """Whether it is the moment to kill: while a caption shard, the ledger or the claim of a state is being written."""
    if kind == "publishing":
        return lambda: any(out.glob(".framecap.*.tmp"))
    if kind == "ledger":
        return lambda: any((state / "ledger").glob("*")) or (state / "ledger.jsonl").exists()
    return lambda: (state / "output").exists() or any((out / "_framecap").glob("state-at.*"))


def kill_at(kind: str, run: subprocess.Popen[bytes], out: Path, state: Path, chance: random.Random) -> bool:
    """Kill a driver at its moment; False if it ended before."""
    if kind == "clock":
        time.sleep(chance.uniform(0.5, 4.0))
    else:
        is_now = moment(kind, out, state)
        while run.poll() is None and not is_now():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
    run.kill()
    return run.wait(timeout=60) < 0


def test_kills_at_moments_that_matter_change_no_byte(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(SHARDS):
        data = shard_bytes(f"s{number}.parquet", 1, ROWS, frozenset())
        (source / f"s{number}.parquet").write_bytes(data)
    calm = tmp_path / "calm"
    assert start(str(source), str(calm)).wait(timeout=300) == 0
    chance, killed, outputs = random.Random(5), dict.fromkeys(MOMENTS, 0), 0
    while sum(killed.values()) < KILLS:
        outputs += 1
        out = tmp_path / f"out-{outputs}"
        apart = [str(tmp_path / f"state-{outputs}")] if outputs % 2 else []
        state = Path(apart[0]) if apart else out / "_framecap"
        for kind in MOMENTS:
            if kind != "state" or apart:
                killed[kind] += kill_at(kind, start(str(source), str(out), *apart), out, state, chance)
        assert start(str(source), str(out), *apart).wait(timeout=300) == 0
        assert read_output(out) == read_output(calm)
        assert [name for name in state_files(out) if "state-at." not in name and not name.endswith("input.json")] == []
        left = {path.name for path in state.iterdir()} - {"ledger.jsonl", "runs", "input.json", "output"}
        assert {name for name in left if not name.startswith("state-at.")} <= {"fragments"}
        assert not list((state / "fragments").glob("*"))
    print(f"killed: {killed}, {outputs} outputs")


def test_an_endpoint_that_fails_and_loses_answers_costs_no_row(
    faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in twenty fails before or after it was done, or is cut off."""
    for number in range(SHARDS):
        data = shard_bytes(f"s{number}.parquet", 1, ROWS, frozenset())
        write_bytes_atomic(f"s3://faulty/in/s{number}.parquet", data)
    chance, met = random.Random(3), [0, 0]

    def fault(environ: dict[str, Any]) -> str | None:
        met[0] += 1
        if chance.random() >= 0.05:
            return None
        met[1] += 1
        return chance.choice(("drop", "500 Internal Server Error", "503 Slow Down"))

    faulty_s3.fault = fault
    try:
        codes = [start("s3://faulty/in", "s3://faulty/out").wait(timeout=900) for _ in range(2)]
    finally:
        faulty_s3.fault = lambda environ: None
    print(f"{met[1]} of {met[0]} requests failed")
    assert codes == [0, 0]
    fs, path = open_fs("s3://faulty/out")
    fs.invalidate_cache()
    names = [name for name in fs.find(path) if name.endswith(".parquet")]
    assert len(names) == SHARDS
    for name in names:
        table = pq.read_table(io.BytesIO(fs.cat_file(name)))
        shard = name.rpartition("/")[2]
        assert table.column("frame_id").to_pylist() == [f"{shard}#{row}" for row in range(ROWS)]
        assert None not in table.column("caption").to_pylist()
