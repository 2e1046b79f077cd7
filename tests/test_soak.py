"""Ten kills at random moments of a run over 20,000 frames change none of its captions: ``make soak``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from cluster import ENVIRONMENT, Cluster, checkout, started_cluster
from shards import assert_same_captions, state_files, write_shards

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
SHARDS, ROWS = 40, 500
PATIENCE_S = 600
Mark = tuple[int, int]  # inode and time of change
# The kills of each run; its last one ends it.
RUNS = (("driver",), ("actor", "node", "stop"), ("node", "actor", "driver"), ("actor", "node", "stop"))


@dataclass
class Soak:
    """What the ten kills have in common."""

    cluster: Cluster
    source: Path
    out: Path
    working_dir: Path
    chance: random.Random = field(default_factory=lambda: random.Random(7))
    runs: int = 0

    def flags(self, out: Path) -> list[str]:
        return [
            "--input-uri", str(self.source), "--output-uri", str(out), "--ray-address", self.cluster.address,
            "--batch-size", "64", "--min-actors", "2", "--max-actors", "2",
        ]  # fmt: skip

    def start(self, out: Path | None = None) -> subprocess.Popen[bytes]:
        """The job as a driver process of its own."""
        command = [sys.executable, "jobs/caption_frames.py", *self.flags(out or self.out)]
        self.runs += 1
        return subprocess.Popen(command, env=ENVIRONMENT, cwd=self.working_dir, start_new_session=True)

    def submit(self) -> str:
        """The job through ``ray job submit``; returns its id."""
        self.runs += 1
        name = f"soak-{self.runs}"
        command = ["python", "jobs/caption_frames.py", *self.flags(self.out)]
        done = self.cluster.ray(
            "submit", "--no-wait", "--submission-id", name, "--working-dir", str(self.working_dir), "--", *command
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return name

    def published(self) -> dict[str, Mark]:
        return marks(self.out.rglob("*.parquet"))

    def fragments(self) -> dict[str, Mark]:
        return marks((self.out / "_framecap" / "fragments").glob("*.fragment"))

    def wait_for_work(self) -> None:
        """Until this run has captioned something, and then for a random while."""
        before = self.published().keys() | self.fragments().keys()
        wait_until(lambda: bool((self.published().keys() | self.fragments().keys()) - before), "no frame was captioned")
        time.sleep(self.chance.uniform(0, 4))

    def rest(self) -> None:
        """Until the dead run's workers are gone as well."""
        wait_until(lambda: not self.cluster.actors() and not self.cluster.processes("caption_frames.py"), "still busy")

    def summaries(self) -> list[dict[str, object]]:
        paths = (self.out / "_framecap" / "runs").glob("*/summary.json")
        return [json.loads(path.read_text()) for path in sorted(paths)]


def marks(paths: Iterator[Path]) -> dict[str, Mark]:
    """Name → inode and time of change; what disappears meanwhile is left out."""
    found = {}
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


@contextmanager
def nothing_rewritten(soak: Soak) -> Iterator[None]:
    """What is on disk now, published or in fragments, is never written again by the runs inside."""
    published, fragments = soak.published(), soak.fragments()
    ended, rewritten = threading.Event(), set[str]()

    def watch() -> None:
        while not ended.wait(0.05):
            now = soak.fragments()
            rewritten.update(name for name, mark in fragments.items() if now.get(name, mark) != mark)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert rewritten == set(), "captioned again although they were in fragments"
    assert published.items() <= soak.published().items(), "a published shard was written again"


def end(soak: Soak, run: subprocess.Popen[bytes] | str) -> None:
    """End a run as the schedule says: SIGKILL for a driver, ``ray job stop`` for a submitted job."""
    if isinstance(run, str):
        stopped = soak.cluster.ray("stop", run)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    else:
        assert run.poll() is None, f"the job ended by itself ({run.returncode})"
        run.send_signal(signal.SIGKILL)
        run.wait(timeout=30)
    soak.rest()


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    """Two nodes, 40 shards of 500 frames, and the job's own code as a working directory."""
    root = tmp_path_factory.mktemp("soak")
    write_shards(root / "in", SHARDS, ROWS, row_group_size=100)
    with started_cluster(head_cpus=1) as cluster:
        cluster.add_worker(cpus=1)
        yield Soak(cluster, root / "in", root / "out", checkout(root / "checkout"))


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)  # `make soak` shows it as it happens


def hit(soak: Soak, kill: str) -> None:
    """Kill one actor, or a whole worker node, which is replaced."""
    if kill == "actor":
        wait_until(lambda: bool(soak.cluster.actors()), "no actor to kill")
        victim: psutil.Process = soak.chance.choice(soak.cluster.actors())
        victim.kill()
    else:
        assert soak.cluster.kill_worker() > 3, "the node was not up"
        soak.cluster.add_worker(cpus=1)


def test_ten_kills_change_no_caption(soak: Soak) -> None:
    calm = soak.out.with_name("calm")
    note("undisturbed run")
    assert soak.start(calm).wait(timeout=1500) == 0
    for *hits, last_kill in RUNS:
        with nothing_rewritten(soak):
            run = soak.submit() if last_kill == "stop" else soak.start()
            for kill in hits:
                soak.wait_for_work()
                hit(soak, kill)
                note(f"killed: {kill}; {len(soak.published())} shards published")
            soak.wait_for_work()
            end(soak, run)
            note(f"killed: {last_kill}; {len(soak.published())} shards, {len(soak.fragments())} fragments are there")
    done = len(soak.published())
    assert done < SHARDS, "the soak was over before its last kill"
    with nothing_rewritten(soak):
        assert soak.start().wait(timeout=1500) == 0

    last = soak.summaries()[-1]
    note(json.dumps(last, ensure_ascii=False)[:1500])
    assert last["captioned_rows"] + last["recovered_rows"] + ROWS * done == SHARDS * ROWS  # type: ignore[operator]
    assert_same_captions(soak.out, calm)
    assert state_files(soak.out) == []
    verify = [sys.executable, "-m", "framecap.cli", "verify", str(soak.source), str(soak.out)]
    found = subprocess.run(verify, capture_output=True, text=True, cwd=soak.working_dir, env={**os.environ})
    assert found.returncode == 0, found.stdout + found.stderr
