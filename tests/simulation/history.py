"""Histories drawn from a seed: runs in sequence and at once, changes between and during them, and a calm end."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa

from framecap import stores
from framecap.pipeline import ledger
from framecap.pipeline.job import Job
from framecap.pipeline.plan import Chunk
from framecap.pipeline.run import run as run_job
from framecap.pipeline.settings import CaptionSettings
from simulation.disk import Disk, system_calls
from simulation.frames import other_parquet, shard_bytes
from simulation.host import SimHost, simulated_time
from simulation.invariants import (
    CaptionShards,
    Run,
    Version,
    ViolationError,
    check_clean_end,
    check_ending,
    check_nothing_done,
    check_one_at_a_time,
    check_outputs,
    check_units,
    require,
)
from simulation.store import Objects, SimFileSystem
from simulation.workers import SimStream
from simulation.world import EPOCH, Crash, Faults, Machine, Process, World

EXPIRY = 60.0
SHARDS = ("a.parquet", "d/b.parquet", "d/c.parquet")
ENCODER = Path(__file__).parent.parent / "data" / "ruclip-vit-b32-tiny" / "config.json"


@dataclass
class Outcome:
    """How a history went: ``failure`` is None if every invariant held."""

    seed: int
    operations: int
    faults: int
    runs: int
    failure: str | None
    lines: list[str]


@cache
def work_folder() -> Path:
    """In memory where the machine has such a place."""
    pa.set_cpu_count(1)  # tables of a few rows: handing them to other threads takes longer than reading them
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="framecap-simulation-", dir=place))


@cache
def base_settings() -> CaptionSettings:
    """Validated once: that takes longer than a whole simulated run."""
    return CaptionSettings(input_uri="in", output_uri="out", lock_expiry=EXPIRY, batch_size=2)


@cache
def captioner(name: str) -> str:
    """A captioner folder with all that a driver reads of one."""
    folder = work_folder() / f"captioner-{name}"
    contents = {f"{part}/pytorch_model.bin": b"" for part in ("encoder", "decoder")}
    contents |= {"config.json": b"{}", "decoder/config.json": b"{}", "encoder/config.json": ENCODER.read_bytes()}
    contents["bridge.safetensors"] = name.encode()
    for own, data in contents.items():
        (folder / own).parent.mkdir(parents=True, exist_ok=True)
        (folder / own).write_bytes(data)
    entries = {own: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for own, data in contents.items()}
    (folder / "manifest.json").write_text(json.dumps({"name": name, "files": entries}))
    return str(folder)


class History:
    """One history on its stores."""

    def __init__(self, seed: int) -> None:
        self.world = world = World(seed)
        chance = world.chance
        self.input_on_disk = chance.random() < 0.5
        self.on_disk = self.input_on_disk if chance.random() < 0.8 else not self.input_on_disk
        lag = chance.uniform(1, 20) if chance.random() < 0.15 else 0.0
        self.disk = Disk(world, work_folder() / "disk", file_locks=chance.random() < 0.7)
        self.objects = Objects(world, lag, strict_delete=chance.random() < 0.5)
        for place in (self.disk, self.objects):
            place.on_write.append(self._written)
        self.expiry = EXPIRY
        self.apart = chance.random() < 0.15  # the state lies elsewhere
        self.present: dict[str, Version] = {}
        self.versions: dict[tuple[str, str], Version] = {}
        self.foreign: dict[str, bytes] = {}
        self.published: dict[str, list[float]] = {}
        self.runs: list[Run] = []
        self.shards = CaptionShards()
        self._write_times: dict[str, float] = {}
        self._version = 0
        self._heal = False
        skewed = chance.random() < 0.3
        self.machines = [
            Machine(f"host-{n}", chance.uniform(-200, 200) if skewed else chance.uniform(-1, 1)) for n in range(2)
        ]

    # ---- places --------------------------------------------------------------------------------------------------
    def _base(self, on_disk: bool, name: str) -> str:
        return f"{self.disk.root}/{name}" if on_disk else f"sim://bucket/{name}"

    @property
    def input_uri(self) -> str:
        return self._base(self.input_on_disk, "in")

    @property
    def output_uri(self) -> str:
        return self._base(self.on_disk, "out")

    @property
    def state_uri(self) -> str:
        return self._base(self.on_disk, "state") if self.apart else f"{self.output_uri}/_framecap"

    def output_path(self, name: str) -> str:
        return f"{self.output_uri.removeprefix('sim://')}/{name}"

    def state_path(self, name: str) -> str:
        return f"{self.state_uri.removeprefix('sim://')}/{name}"

    def _files(self, uri: str, on_disk: bool) -> dict[str, bytes]:
        prefix = f"{uri.removeprefix('sim://')}/"
        if on_disk:
            return {name[len(prefix) :]: data for name, data in self.disk.files().items() if name.startswith(prefix)}
        things = sorted(self.objects.things.items())
        return {name[len(prefix) :]: thing.data for name, thing in things if name.startswith(prefix)}

    def output_files(self) -> dict[str, bytes]:
        """What really lies below OUT."""
        return self._files(self.output_uri, self.on_disk)

    def state_files(self) -> dict[str, bytes]:
        """What really lies in the state."""
        return self._files(self.state_uri, self.on_disk)

    def written_at(self, path: str) -> float:
        """When a path was last written by a run."""
        return self._write_times.get(path, 0.0)

    def _written(self, path: str) -> None:
        process = self.world.current.process
        self._write_times[path] = self.world.now
        if process is None:
            return
        if path == self.state_path("lock"):
            process.beats.append(self.world.now)
        elif path.startswith(self.output_path("")) and path.endswith(".parquet"):
            self.world.note(f"publishes {path.removeprefix(self.output_path(''))}")
            self.published.setdefault(process.name, []).append(self.world.now)

    # ---- frame shards and foreign files -----------------------------------------------------------------------------
    def write_shard(self, name: str, old: Version | None = None) -> None:
        """Add or replace a frame shard; ``old``: with a content that it had before."""
        chance = self.world.chance
        if old is None:
            self._version += 1
            rows = chance.choice((0, 1, 2, 3, 5, 6)) if chance.random() < 0.9 else 0
            bad = frozenset(row for row in range(rows) if chance.random() < 0.15)
            old = Version(self._version, rows, bad)
        data = shard_bytes(name, old.number, old.rows, old.bad)
        path = f"{self.input_uri.removeprefix('sim://')}/{name}"
        self._put(self.input_on_disk, path, data)
        self.present[name] = old
        self.versions[(name, self.signature(name))] = old
        self.world.note(f"frame shard {name} is version {old.number} with {old.rows} rows")

    def _put(self, on_disk: bool, path: str, data: bytes) -> None:
        if on_disk:
            self.disk.write(path, data)
        else:
            self.objects.put(path, data)

    def signature(self, name: str) -> str:
        """What the product calls the signature of a frame shard as it is now."""
        path = f"{self.input_uri.removeprefix('sim://')}/{name}"
        if self.input_on_disk:
            status = Path(path).stat()
            return f"{status.st_size}-{status.st_mtime_ns}"
        thing = self.objects.things[path]
        return f"{len(thing.data)}-{thing.etag}"

    def delete_shard(self, name: str) -> None:
        path = f"{self.input_uri.removeprefix('sim://')}/{name}"
        if self.input_on_disk:
            Path(path).unlink()
        else:
            self.objects.delete(path)
        del self.present[name]
        self.world.note(f"frame shard {name} is deleted")

    def change_input(self) -> None:
        """Somebody adds, replaces or deletes a frame shard."""
        chance = self.world.chance
        name = chance.choice(SHARDS)
        if name in self.present and len(self.present) > 1 and chance.random() < 0.3:
            self.delete_shard(name)
            return
        earlier = sorted({v.number: v for (shard, _), v in self.versions.items() if shard == name}.items())
        restored = earlier and chance.random() < 0.3
        self.write_shard(name, chance.choice(earlier)[1] if restored else None)

    def add_foreign(self) -> None:
        """Somebody puts a file of their own into OUT."""
        number = len(self.foreign)
        name = self.world.chance.choice((f"note-{number}.txt", f"other-{number}.parquet", f"d/x-{number}.parquet"))
        data = other_parquet(number) if name.endswith(".parquet") else b"by hand"
        self._put(self.on_disk, self.output_path(name), data)
        self.foreign[name] = data
        self.world.note(f"a foreign file {name} appears in OUT")

    # ---- runs ------------------------------------------------------------------------------------------------------
    def start_run(self, delay: float, settings: dict[str, object], machine: Machine) -> Run:
        """Start a driver ``delay`` seconds from now."""
        world = self.world
        number = len(self.runs) + 1
        process = Process(f"run-{number}", machine, 1000 + number)
        cluster = Process(f"pool-{number}", Machine(f"node-{number}", world.chance.uniform(-1, 1)), 5000 + number)
        world.processes += [process, cluster]
        run = Run(process, settings, world.now + delay)
        self.runs.append(run)

        def on_units(job: Job, chunks: list[Chunk]) -> None:
            run.rows_given = sum(piece.stop - piece.start for chunk in chunks for piece in chunk)
            check_units(self, run, job.fingerprint, chunks)

        stream = SimStream(world, cluster, self.fate, self._heal, on_units)
        values = {"input_uri": self.input_uri, "output_uri": self.output_uri, "captioner": captioner("A"), **settings}
        if self.apart:
            values["state_uri"] = self.state_uri

        def drive() -> None:
            run.began = world.now
            world.note(f"starts: {_told(settings)}")
            try:
                run.summary = run_job(base_settings().model_copy(update=values), SimHost(world, process), stream)
                run.fingerprint = run.summary.fingerprint
                world.note(f"ends: {run.summary.closing()}")
            except Exception as error:
                run.error = error
                world.note(f"ends: {type(error).__name__}: {error}")
                if isinstance(error, ViolationError):
                    raise
            finally:
                run.ended, run.end = True, world.now
                stream.release()

        world.spawn(drive, process.name, process, delay)
        process.stream = stream  # type: ignore[attr-defined]
        return run

    def draw_settings(self) -> dict[str, object]:
        """What an operator may tell a run."""
        chance = self.world.chance
        drawn: dict[str, object] = {}
        if chance.random() < 0.35:
            drawn["captioner"] = captioner("B")
        if chance.random() < 0.1:
            drawn["max_new_tokens"] = 7
        if chance.random() < 0.2:
            drawn["limit"] = chance.choice((1, 2))
        if chance.random() < 0.3:
            drawn["retry_errors"] = True
        if chance.random() < 0.2:
            drawn["time_budget"] = chance.uniform(10, 60)
        if chance.random() < 0.3:
            drawn["batch_size"] = chance.choice((1, 3, 4))
        if any(name.startswith("d/") for name in self.present) and chance.random() < 0.15:
            drawn["input_uri"] = f"{self.input_uri}/*/*.parquet"
        elif chance.random() < 0.25:
            drawn["prune"] = True
        return drawn

    def step(self) -> None:
        """One or two runs, what befalls them, and what changes meanwhile."""
        world, chance = self.world, self.world.chance
        if chance.random() < 0.4:
            self.change_input()
        if chance.random() < 0.25:
            self.add_foreign()
        runs = [self.start_run(0.0, self.draw_settings(), chance.choice(self.machines))]
        if chance.random() < 0.35:
            delay = chance.choice((0.0, chance.uniform(0, 2), chance.uniform(0, 90)))
            runs.append(self.start_run(delay, self.draw_settings(), chance.choice(self.machines)))
        for run in runs:
            if chance.random() < self.violence:
                run.process.crash_at = int(chance.choice((12, 40, 120, 250)) * chance.random()) + 1
                run.process.machine_dies = chance.random() < 0.4
        pauses = [run for run in runs if chance.random() < self.violence / 4]
        changes = sorted(chance.uniform(0, 60) for _ in range(chance.choice((0, 0, 0, 1, 3))))
        began, pause_after = world.now, chance.uniform(5, 60)
        while not all(run.ended or run.process.dead for run in runs):
            world.sleep(2.0)
            if changes and world.now - began > changes[0]:
                changes.pop(0)
                self.change_input()
            if pauses and world.now - began > pause_after:
                process = pauses.pop().process
                process.stopped_until = world.now + chance.uniform(5, 4 * EXPIRY)
                world.faults_met += 1
                world.note(f"{process.name} stands still until {process.stopped_until - EPOCH:.1f}")
        if chance.random() < 0.5:
            world.sleep(chance.uniform(0, 2 * EXPIRY))
        for run in runs:
            check_ending(self, run)
        check_outputs(self)
        check_one_at_a_time(self)

    def had_company(self, run: Run) -> bool:
        """Whether a lock of another run may have been there when ``run`` came."""
        for other in self.runs:
            clean = other.summary is not None and not other.process.stumbled
            lasts = other.end + (0.0 if clean else EXPIRY)
            late = [beat for beat in other.process.beats if beat > other.end]  # a heartbeat that was stuck
            lasts = max(lasts, max(late, default=0.0) + EXPIRY)
            if other is not run and other.began <= run.end and lasts >= run.began:
                return True
        return False

    def play(self) -> None:
        """The whole history; raises ``ViolationError``."""
        world, chance = self.world, self.world.chance
        level = chance.choice((0.0, 0.005, 0.02, 0.06))
        world.faults = Faults(level, level / 2, chance.choice((0.0, 0.02, 0.1)), chance.choice((0.0, 0.0, 0.004)))
        self.fate = chance.choice((0.0, 0.1, 0.3))
        self.violence = chance.choice((0.2, 0.6, 0.9))
        for name in SHARDS[: chance.choice((1, 2, 2, 3))]:
            self.write_shard(name)
        world.sleep(1 + self.objects.lag)
        for _ in range(chance.choice((1, 2, 2, 3))):
            if level and chance.random() < 0.2:
                begin = world.now + chance.uniform(0, 60)
                world.outages.append((begin, begin + chance.uniform(10, 400)))
            self.step()
        self.settle()
        last = self._alone({"prune": True, "retry_errors": True})
        check_outputs(self)
        check_clean_end(self, last)
        before = self.output_files()
        check_nothing_done(self, self._alone({"prune": True}), before)

    def settle(self) -> None:
        """Everything comes to rest, and faults end; locks expire."""
        world = self.world
        world.faults, world.outages = Faults(), []
        self._heal = True
        while not all(task.ended for task in world._tasks):
            for task in world._tasks:
                process = task.process
                if process is not None and process.name.startswith("pool") and not process.dead and not task.ended:
                    world.sleep(1.0)
            world.sleep(5.0)
        world.sleep(EXPIRY + 1 + self.objects.lag)

    def _alone(self, settings: dict[str, object]) -> Run:
        run = self.start_run(0.0, settings, self.world.chance.choice(self.machines))
        while not run.ended:
            self.world.sleep(2.0)
        check_ending(self, run)
        self.world.sleep(1.0 + self.objects.lag)
        return run


def _told(settings: dict[str, object]) -> str:
    return ", ".join(f"{name}={str(value).rpartition('/')[2]}" for name, value in settings.items()) or "no flags"


class _Log(logging.Handler):
    """What each run logs."""

    def __init__(self, history: History) -> None:
        super().__init__(logging.INFO)
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        process = self._history.world.current.process
        run = next((run for run in self._history.runs if run.process is process), None)
        if run is not None:
            run.log.append(record.getMessage())
            if record.levelno >= logging.WARNING:
                self._history.world.note(f"log: {record.getMessage()[:160]}")


@contextmanager
def _logged(history: History) -> Iterator[None]:
    logger, handler = logging.getLogger("framecap"), _Log(history)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def play(seed: int) -> Outcome:
    """Play one history from its seed."""
    captioner("A"), captioner("B")
    history = History(seed)
    SimFileSystem.objects = history.objects
    stores._given_up.clear()
    failure = None
    world = history.world
    with system_calls(history.disk), simulated_time(world), _logged(history):
        try:
            history.play()
        except (Exception, Crash) as error:
            text = str(error) if isinstance(error, AssertionError) else "".join(traceback.format_exception(error)[-8:])
            failure = f"{type(error).__name__}: {text}"
        finally:
            world.end()
    return Outcome(seed, world.operations, world.faults_met, len(history.runs), failure, world.history)


__all__ = ["Outcome", "ledger", "play", "require"]
