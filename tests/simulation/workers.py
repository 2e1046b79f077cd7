"""A simulated pool of readers and caption actors in place of Ray: the record stream of a run.

Tasks finish in any order, are executed twice, come late, die with their node after their fragment was written. They
read frames and write fragments by the product's own code.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import pyarrow as pa

from framecap.errors import ShardError
from framecap.pipeline.fragments import write_fragment
from framecap.pipeline.job import Job, Resources
from framecap.pipeline.plan import Chunk, Piece
from framecap.pipeline.read import _read_piece, _ShardStream
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.stops import Stops
from framecap.stores import failure_kind
from simulation.frames import captions
from simulation.host import SimHost
from simulation.world import Process, Task, World


class PoolLostError(Exception):
    """The cluster cannot go on: what Ray raises when nodes die too often."""


class Rows:
    """Pictures of a chunk as they are read: what ``_read_piece`` needs of its builder."""

    def __init__(self) -> None:
        self.pictures: list[bytes] = []

    def checkpoint(self) -> int:
        return len(self.pictures)

    def rewind(self, before: int) -> None:
        del self.pictures[before:]

    def add(self, batch: pa.RecordBatch, piece: Piece, first: int) -> None:
        self.pictures += batch.column("image").to_pylist()


class SimStream:
    """The record stream of one run. ``on_units`` hears what is to be captioned."""

    def __init__(
        self, world: World, cluster: Process, fate: float, heal: bool, on_units: Callable[[Job, list[Chunk]], None]
    ) -> None:
        """``fate``: how often something happens to a task; ``heal``: no row fails, and no pool outlives its run."""
        self._world, self._cluster, self._fate, self._heal, self._on_units = world, cluster, fate, heal, on_units
        self._todo: list[Chunk] = []
        self._inbox: list[ChunkRecord] = []
        self._busy = 0
        self._lost = False
        self._again = 0
        self._unheard: list[Chunk] = []  # executed once more, without a record
        self._driver: Task | None = None
        self._waits = False  # the driver, for a record
        self.ends = float("inf")  # when the last task of this pool is gone

    def start(self, job: Job, stops: Stops) -> Resources:
        self._world.sleep(self._world.chance.uniform(1, 10))
        return Resources(0, 1, 0.25, 2, 1, job.settings.batch_size or 2)

    def records(
        self, job: Job, units: list[tuple[Chunk, ...]], resources: Resources, stops: Stops
    ) -> Iterator[ChunkRecord]:
        self._todo = list(itertools.chain.from_iterable(units))
        self._again = len(self._todo)  # so often at most is a task executed again
        self._on_units(job, list(self._todo))
        self._driver = self._world.current
        self._busy = 2 if self._world.chance.random() < 0.4 else 1
        for number in range(self._busy):
            self._world.spawn(lambda: self._work(job), f"worker-{number}", self._cluster)
        while True:
            stops.check()
            if self._inbox:
                yield self._inbox.pop(0)
            elif self._lost:
                raise PoolLostError
            elif not self._busy:
                return
            else:
                self._waits = True
                self._world.sleep(5.0)
                self._waits = False

    def release(self) -> None:
        """The driver is gone: tasks end some time later, or at once."""
        world = self._world
        lingers = not self._heal and world.chance.random() < self._fate
        self.ends = world.now + (world.chance.uniform(0, 60) if lingers else 0.0)

    def _work(self, job: Job) -> None:
        world = self._world
        try:
            while self._todo and not self._lost:
                world.sleep(world.chance.uniform(0.5, 8))
                if world.now > self.ends:
                    return
                if self._todo:
                    self._execute(job, self._todo.pop(self._pick()))
        finally:
            self._busy -= 1
            self._tell()

    def _pick(self) -> int:
        return int(self._world.chance.random() * min(3, len(self._todo)))

    def _execute(self, job: Job, chunk: Chunk) -> None:
        """Caption one chunk, and what else may happen to a task."""
        world = self._world
        record = self._caption(job, chunk)
        if chunk in self._unheard:
            self._unheard.remove(chunk)
            return
        luck = world.chance.random()
        if luck < self._fate and self._again > 0:
            self._again -= 1
            world.faults_met += 1
            fate = world.chance.choice(("lost", "twice", "unheard", "repeated"))
            world.note(f"task of {_named(chunk)}: {fate}")
            if fate != "repeated":
                self._todo.append(chunk)
            if fate == "unheard":
                self._unheard.append(chunk)
            if fate == "lost":  # with its node, after the fragment was written
                return
            if fate == "repeated":
                self._inbox.insert(int(world.chance.random() * (len(self._inbox) + 1)), record)
        elif luck > 1 - self._fate / 40 and not self._heal:
            world.faults_met += 1
            world.note("the cluster is lost")
            self._lost = True
        self._inbox.append(record)
        self._tell()

    def _tell(self) -> None:
        if self._waits and self._driver is not None:
            self._world.wake(self._driver)

    def _caption(self, job: Job, chunk: Chunk) -> ChunkRecord:
        """What reader and actor do with a chunk (``read_chunks`` and ``CaptionActor``)."""
        rows, failed = Rows(), dict[str, ShardError]()
        stream = _ShardStream(job.read_options())
        for shard, own in itertools.groupby(chunk, key=lambda piece: piece.shard):
            before = rows.checkpoint()
            error = next((e for piece in own if (e := _read_piece(stream, piece, rows)) is not None), None)  # type: ignore[arg-type]
            if error is not None:
                rows.rewind(before)
                failed[shard] = error
        stream.close()
        self._world.sleep(self._world.chance.uniform(0.1, 5))
        pieces = tuple(piece for piece in chunk if piece.shard not in failed)
        bad = [not self._heal and p.endswith(b"!") and self._world.chance.random() < 0.7 for p in rows.pictures]
        name = ""
        if pieces:
            table = captions(job.fingerprint, rows.pictures, bad)
            try:
                host = SimHost(self._world, self._cluster)
                name = write_fragment(job.places.fragments, pieces, job.fingerprint, table, host)
            except OSError as error:
                lost = ShardError(failure_kind(error, "unwritable"), str(error)[:300])
                failed, pieces, bad = failed | {piece.shard: lost for piece in pieces}, (), []
        statuses = Counter("error" if b else "ok" for b in bad)
        again = [bool(piece.basis) for piece in pieces for _ in range(piece.start, piece.stop)]
        return ChunkRecord(
            fragment=name,
            pieces=pieces,
            failed=failed,
            statuses=dict(statuses),
            retried=dict(Counter("error" if b else "ok" for b, a in zip(bad, again, strict=True) if a)),
            error_kinds={"missing": statuses["error"]} if statuses["error"] else {},
        )


def _named(chunk: Chunk) -> str:
    return ", ".join(f"{piece.shard}[{piece.start}:{piece.stop}]" for piece in chunk)
