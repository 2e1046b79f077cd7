"""Interrupted at any moment, the same command goes on: nothing lost, nothing twice, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from shards import assert_same_captions, caption, jpeg, read_output, shard_table, state_files, without_ray, write_shards

from framecap.errors import LockedError, ShardError
from framecap.pipeline import lock as lock_module
from framecap.pipeline.fragments import list_fragments, write_fragment
from framecap.pipeline.ledger import Ledger
from framecap.pipeline.lock import OutputLock
from framecap.pipeline.plan import Piece, ShardPlan
from framecap.pipeline.publish import Places, Publisher
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.run import main
from framecap.pipeline.stops import StopRun, Stops
from framecap.schema import InputColumns, caption_schema

__all__ = ["without_ray"]  # a fixture
REPOSITORY = Path(__file__).parent.parent
SHARDS, ROWS = 6, 40


@contextmanager
def started_job(source: Path, out: Path, captioner: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """The job as an operator starts it, on the session's cluster, in small batches."""
    address = ray.get_runtime_context().gcs_address
    command = [
        sys.executable, str(REPOSITORY / "jobs" / "caption_frames.py"),
        "--input-uri", str(source), "--output-uri", str(out), "--captioner", str(captioner),
        "--ray-address", address, "--batch-size", "4", "--max-actors", "1", *flags,
    ]  # fmt: skip
    job = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        yield job
    finally:
        job.kill()
        job.wait()


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[bytes], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the job did not come that far"
        assert job.poll() is None, "the job ended too soon"
        time.sleep(0.02)


def fragments(out: Path) -> list[Path]:
    return list((out / "_framecap" / "fragments").glob("*.fragment"))


def published(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}


def caption_actors() -> list[psutil.Process]:
    """Every caption actor of the session's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_actors() -> None:
    """SIGKILL every caption actor of the session's cluster."""
    for actor in caption_actors():
        with suppress(psutil.NoSuchProcess):
            actor.kill()


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, tiny_captioner_dir: Path
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("recovery")
    write_shards(root / "in", SHARDS, ROWS)
    summary = caption(root / "in", root / "out", tiny_captioner_dir, batch_size=4, max_new_tokens=40)
    assert summary.exit_code == 0
    return root / "in", root / "out"


@pytest.mark.timeout(900)
def test_killed_driver_and_killed_actor_lose_nothing_and_repeat_nothing(
    undisturbed: tuple[Path, Path], tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    source, out = undisturbed[0], tmp_path / "out"
    with started_job(source, out, tiny_captioner_dir) as job:
        wait_for(lambda: len(published(out)) >= 1 and len(fragments(out)) >= 2, job)
    before = published(out)

    with started_job(source, out, tiny_captioner_dir) as job:
        wait_for(lambda: bool(caption_actors()), job)
        job.send_signal(signal.SIGSTOP)  # so that the run cannot end before the kill
        kill_actors()
        job.send_signal(signal.SIGCONT)
        assert job.wait(timeout=240) == 0

    assert_same_captions(out, undisturbed[1])
    assert before.items() <= published(out).items(), "a published shard was written again"
    assert state_files(out) == []
    runs = [json.loads(path.read_text()) for path in (out / "_framecap" / "runs").glob("*/summary.json")]
    captioned = runs[-1]["captioned_rows"]
    recovered = runs[-1]["recovered_rows"]
    assert captioned + recovered + ROWS * len(before) == SHARDS * ROWS


@pytest.mark.timeout(900)
def test_sigterm_publishes_what_is_finished_and_says_that_work_is_left(
    undisturbed: tuple[Path, Path], tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    source, out = undisturbed[0], tmp_path / "out"
    with started_job(source, out, tiny_captioner_dir) as job:
        wait_for(lambda: len(published(out)) >= 1, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 75
    summary = json.loads(next((out / "_framecap" / "runs").glob("*/summary.json")).read_text())
    assert summary["stopped"] == "SIGTERM was received"
    assert summary["published_shards"] == len(published(out)) < SHARDS
    assert not (out / "_framecap" / "lock").exists()
    rest = caption(source, out, tiny_captioner_dir, batch_size=4, max_new_tokens=40)
    assert (rest.exit_code, rest.shards_done_before) == (0, summary["published_shards"])
    assert_same_captions(out, undisturbed[1])


def test_sigint_is_heard_as_sigterm_is() -> None:
    with Stops(None) as stops:
        stops.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(StopRun, match="SIGINT was received"):
            stops.check()


def test_a_second_signal_ends_the_run_at_once() -> None:
    with Stops(None):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("without_ray")
def test_ended_at_once_work_is_left(
    tmp_path: Path, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", 2, 3)

    def interrupted(*_: object) -> Iterator[ChunkRecord]:
        raise KeyboardInterrupt

    monkeypatch.setattr("framecap.pipeline.caption.caption_units", interrupted)
    places = ["--input-uri", f"{tmp_path}/in", "--output-uri", f"{tmp_path}/out"]
    assert main([*places, "--captioner", str(tiny_captioner_dir)]) == 75
    assert "run the same line again" in capsys.readouterr().err
    assert not (tmp_path / "out" / "_framecap" / "lock").exists()


@pytest.mark.parametrize(("kind", "left"), [("unreadable", 3), ("changed", 0)])
def test_captions_of_a_shard_that_could_not_be_read_on_wait_for_the_next_run(
    kind: str, left: int, tmp_path: Path
) -> None:
    schema = caption_schema()
    rows = [dict.fromkeys(schema.names) | {"caption_status": "ok"}] * 4
    folder = str(tmp_path / "fragments")
    places = Places(str(tmp_path), str(tmp_path / "out"), folder, InputColumns(), schema, "f")
    plan = ShardPlan("s.parquet", "signature", 100, "new", ((0, 100),))
    publisher = Publisher(places, [plan], Ledger(str(tmp_path / "state"), "run"))
    for start in (0, 4, 8):
        pieces = (Piece("s.parquet", "signature", start, start + 4),)
        publisher.add(pieces, write_fragment(folder, pieces, "f", pa.Table.from_pylist(rows, schema)))
    publisher.fail("s.parquet", ShardError(kind, "SlowDown"))
    publisher.finish()
    publisher.sweep()
    assert len(list_fragments(folder)) == left


@pytest.mark.usefixtures("without_ray")
def test_a_spent_time_budget_ends_the_run_with_75(
    undisturbed: tuple[Path, Path], tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    summary = caption(undisturbed[0], tmp_path / "out", tiny_captioner_dir, time_budget="0.001")
    assert (summary.exit_code, summary.stopped) == (75, "the time budget is spent")
    assert not (tmp_path / "out" / "_framecap" / "lock").exists()


def test_a_second_run_on_the_same_output_is_refused_and_told_who_holds_it(
    undisturbed: tuple[Path, Path], tiny_captioner_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from framecap.pipeline.run import main

    source, out = undisturbed
    flags = ["--input-uri", str(source), "--output-uri", str(out), "--captioner", str(tiny_captioner_dir)]
    with OutputLock(str(out / "_framecap" / "lock"), "night-run", 60):
        assert main(flags) == 75
    assert f"held by run night-run (host {socket.gethostname()}, pid {os.getpid()}" in capfd.readouterr().err


def stale_lock(path: Path, age: float = 0.0, **changes: object) -> None:
    """A lock that was last written ``age`` seconds ago."""
    with OutputLock(str(path), "dead", 60):
        content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "elsewhere", "age": 61},
        {"host": "elsewhere", "age": 61, "heartbeat": time.time() + 86_400},
        {"pid": 2**22 + 1},
        {"process_start": "before"},
    ],
    ids=["expired", "its clock was a day ahead", "its process is gone", "its pid is another process now"],
)
def test_the_lock_of_a_dead_run_is_taken_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    stale_lock(tmp_path / "lock", **changes)
    with OutputLock(str(tmp_path / "lock"), "next", 60):
        assert json.loads((tmp_path / "lock").read_text())["run_id"] == "next"
    assert list(tmp_path.iterdir()) == []


def test_a_live_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    hour_behind = time.time() - 3600
    stale_lock(tmp_path / "lock", host="elsewhere", boot="x", heartbeat=hour_behind)
    with pytest.raises(LockedError, match="elsewhere"), OutputLock(str(tmp_path / "lock"), "next", 60):
        pass


def test_of_many_rivals_for_a_dead_runs_lock_one_wins(tmp_path: Path) -> None:
    stale_lock(tmp_path / "lock", age=61)
    won: list[int] = []
    done = threading.Barrier(8)

    def rival(number: int) -> None:
        done.wait()
        try:
            with OutputLock(str(tmp_path / "lock"), f"rival-{number}", 60):
                won.append(number)
                done.wait(timeout=20)
        except LockedError:
            done.wait(timeout=20)

    rivals = [threading.Thread(target=rival, args=(number,)) for number in range(8)]
    for thread in rivals:
        thread.start()
    for thread in rivals:
        thread.join()
    assert len(won) == 1


def test_a_run_whose_lock_was_taken_away_notices(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with OutputLock(str(path), "slow", 0.4) as lock:
        path.write_text(json.dumps({"token": "other", "run_id": "thief", "heartbeat": time.time()}))
        assert lock._heart is not None
        lock._heart.join(timeout=10)
        with pytest.raises(LockedError, match="thief"):
            lock.check()


def test_a_heartbeat_outlives_errors_of_any_kind_but_not_the_expiry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RuntimeError("one hiccup of a backend")]
    write = lock_module.write_bytes_atomic

    def hiccup(uri: str, data: bytes) -> None:
        if failures:
            raise failures[0]
        write(uri, data)

    monkeypatch.setattr(lock_module, "write_bytes_atomic", hiccup)
    with OutputLock(str(tmp_path / "lock"), "steady", 0.8) as lock:
        time.sleep(0.3)
        failures.clear()
        time.sleep(1.2)
        lock.check()
        before = json.loads((tmp_path / "lock").read_text())["heartbeat"]
        assert time.time() - before < 0.8, "it beats again"
        failures.append(RuntimeError("the store is gone"))
        assert lock._heart is not None
        lock._heart.join(timeout=10)
        with pytest.raises(LockedError, match="could not be renewed"):
            lock.check()


@pytest.fixture
def fragments_stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if runs were killed between publishing a shard and deleting its fragments; undone by the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framecap.pipeline.publish.delete_fragment", lambda folder, name: None)
        yield patch


def forget_outputs(out: Path) -> None:
    """As if the run had been killed before it published anything."""
    for path in [*out.rglob("*.parquet"), out / "_framecap" / "ledger.jsonl"]:
        path.unlink()


@pytest.mark.usefixtures("without_ray")
def test_fragments_left_after_publishing_do_not_stand_in_for_a_retry(
    tmp_path: Path, tiny_captioner_dir: Path, fragments_stay: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"frame_id": range(6), "image_uri": [f"{row}.jpg" for row in range(6)]})
    pq.write_table(table, tmp_path / "in" / "uris.parquet")
    places = (tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    settings = {"fetch_retries": 0, "max_error_rate": 1.0}
    for row in range(3):
        (tmp_path / "in" / f"{row}.jpg").write_bytes(jpeg(row))
    caption(*places, **settings)
    (tmp_path / "in" / "3.jpg").write_bytes(jpeg(3))
    first = caption(*places, **settings, retry_errors=True)
    (tmp_path / "in" / "4.jpg").write_bytes(jpeg(4))
    assert fragments(tmp_path / "out")
    fragments_stay.undo()
    second = caption(*places, **settings, retry_errors=True)
    assert (first.captioned_rows, second.captioned_rows) == (3, 2)
    statuses = read_output(tmp_path / "out")["uris.parquet"].column("caption_status").to_pylist()
    assert statuses == ["truncated"] * 5 + ["error"]
    assert state_files(tmp_path / "out") == []


@pytest.mark.usefixtures("without_ray")
def test_of_a_fragment_of_two_shards_only_the_unchanged_one_counts(
    tmp_path: Path, tiny_captioner_dir: Path, fragments_stay: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    names = write_shards(source, 2, 3)
    caption(source, out, tiny_captioner_dir)
    forget_outputs(out)
    pq.write_table(shard_table("new", 3, 500), source / names[0])
    fragments_stay.undo()
    summary = caption(source, out, tiny_captioner_dir)
    assert (summary.recovered_rows, summary.captioned_rows) == (3, 3)
    caption(source, tmp_path / "afresh", tiny_captioner_dir)
    assert_same_captions(out, tmp_path / "afresh")


@pytest.mark.usefixtures("without_ray")
def test_a_limited_run_keeps_the_fragments_of_the_shards_it_leaves(
    tmp_path: Path, tiny_captioner_dir: Path, fragments_stay: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_shards(source, 4, 3)  # two and a half share a batch of eight
    caption(source, out, tiny_captioner_dir)
    forget_outputs(out)
    fragments_stay.undo()
    runs = [caption(source, out, tiny_captioner_dir, limit=1), caption(source, out, tiny_captioner_dir)]
    assert [(run.recovered_rows, run.captioned_rows) for run in runs] == [(3, 0), (9, 0)]
    assert state_files(out) == []
