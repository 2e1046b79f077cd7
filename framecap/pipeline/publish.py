"""Fragments → caption shards: rows in input order, beside the input's own columns, by one atomic step.

Runs on the driver. What it holds grows with the shards in flight, not with frames.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framecap.errors import ShardError
from framecap.pipeline.fragments import delete_fragment, list_fragments, read_fragment
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.ledger import Ledger, LedgerEntry
from framecap.pipeline.plan import Chunk, Range, ShardPlan
from framecap.schema import STATUS_ERROR, InputColumns, output_metadata, output_schema
from framecap.shards import mark_of, open_shard
from framecap.storage import atomic_path, is_local, join, open_fs
from framecap.stores import failure_kind

log = logging.getLogger(__name__)
_GROUP_ROWS = 16_384
_GROUP_BYTES = 64 << 20
_READ_ROWS = 1_024
_CACHED_FRAGMENTS = 32


@dataclass(frozen=True)
class Places:
    """Where things lie, and what a caption shard of this run looks like."""

    input_root: str
    output: str
    fragments: str
    columns: InputColumns
    added: pa.Schema
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows [start, stop) of a shard, at ``offset`` of a fragment."""

    start: int
    stop: int
    fragment: str
    offset: int


@dataclass
class Published:
    """Totals of what ``Publisher`` did."""

    shards: int = 0
    rows: int = 0
    failed: dict[str, ShardError] = field(default_factory=dict)


class Publisher:
    """Follows which rows are in fragments, and publishes each shard as soon as all of them are."""

    def __init__(
        self,
        places: Places,
        shards: list[ShardPlan],
        ledger: Ledger,
        later: Sequence[ShardPlan] = (),
        host: Host = THIS_HOST,
    ) -> None:
        """``later``: shards that are not published now, but whose fragments are kept."""
        self._places, self._ledger = places, ledger
        self._waiting = {shard.shard: shard for shard in shards}
        self._later = {shard.shard: shard for shard in later}
        self._spans: dict[str, list[_Span]] = {}
        self._users: dict[str, set[str]] = {}  # fragment → shards that still need it
        self._cache = _FragmentCache(places.fragments)
        threads = 4 if is_local(places.output) else 16
        self._pool = host.executor(threads, "framecap-publish")
        self._running: dict[str, Future[LedgerEntry]] = {}
        self._most = 4 * threads
        self.done = Published()

    @property
    def unfinished(self) -> int:
        """Shards that are neither published nor failed."""
        return len(self._waiting) + len(self._running)

    def covered(self, shard: str) -> list[Range]:
        """The rows of a shard that are in fragments."""
        return [(span.start, span.stop) for span in self._spans.get(shard, ())]

    def add(self, pieces: Chunk, fragment: str) -> None:
        """Take note of a fragment; a repeated one changes nothing."""
        if fragment in self._users:
            return
        users = self._users[fragment] = set[str]()
        offset = 0
        for piece in pieces:
            plan = self._waiting.get(piece.shard)
            if plan is not None and piece.serves(plan):
                users.add(piece.shard)
                self._spans.setdefault(piece.shard, []).append(_Span(piece.start, piece.stop, fragment, offset))
            elif (later := self._later.get(piece.shard)) is not None and piece.serves(later):
                users.add(piece.shard)
            offset += piece.stop - piece.start
        for shard in list(users):
            self.publish_if_complete(shard)
        self._release(fragment, None)

    def publish_if_complete(self, shard: str) -> None:
        """Start publishing a shard if nothing of it is missing (at once so for a shard without rows)."""
        plan = self._waiting.get(shard)
        if plan is None:
            return
        spans = _without_overlap(self._spans.get(shard, []))
        if sum(span.stop - span.start for span in spans) < plan.todo_rows:
            return
        del self._waiting[shard]
        while len(self._running) >= self._most:
            self.collect(block=True)
        self._running[shard] = self._pool.submit(publish_shard, self._places, plan, spans, self._cache)

    def fail(self, shard: str, error: ShardError) -> None:
        """Give a shard up for this run. Its fragments wait for the next one, unless the shard itself changed: what
        could not be read or written now may be then."""
        plan = self._waiting.pop(shard, None)
        self.done.failed[shard] = error
        if error.kind == "changed":
            self._forget(shard)
        elif plan is not None:
            self._later[shard] = plan

    def collect(self, block: bool = False) -> None:
        """Write finished publications to the ledger and delete their fragments."""
        for shard, future in list(self._running.items()):
            if not (future.done() or block):
                continue
            block = False
            del self._running[shard]
            try:
                entry = future.result()
            except ShardError as error:
                self.fail(shard, error)
            except OSError as error:  # a full disk, a store that refuses
                self.fail(shard, ShardError(failure_kind(error, "unwritable"), f"{type(error).__name__}: {error}"))
                log.error("%s cannot be published (%s); its fragments are kept for the next run", shard, error)
            else:
                self._ledger.append(entry)
                self.done.shards += 1
                self.done.rows += entry.rows
                self._forget(shard)

    def finish(self) -> None:
        """Wait for every publication under way."""
        try:
            while self._running:
                self.collect(block=True)
        finally:
            self._pool.shutdown()

    def sweep(self) -> None:
        """Once all is published, delete the fragments that nobody counts on: of tasks that were run twice."""
        if self.unfinished:
            return
        for name in list_fragments(self._places.fragments):
            if name not in self._users:
                delete_fragment(self._places.fragments, name)

    def _forget(self, shard: str) -> None:
        for fragment in {span.fragment for span in self._spans.pop(shard, [])}:
            self._release(fragment, shard)

    def _release(self, fragment: str, shard: str | None) -> None:
        users = self._users.get(fragment)
        if users is None:
            return
        users.discard(shard or "")
        if not users:
            del self._users[fragment]
            delete_fragment(self._places.fragments, fragment)
            self._cache.drop(fragment)


class _FragmentCache:
    """The last few fragments read, since one may serve many tiny shards."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._guard = threading.Lock()

    def rows(self, span: _Span) -> pa.Table:
        with self._guard:
            table = self._tables.get(span.fragment)
        if table is None:
            _, table = read_fragment(self._folder, span.fragment)
        with self._guard:
            self._tables[span.fragment] = table
            self._tables.move_to_end(span.fragment)
            while len(self._tables) > _CACHED_FRAGMENTS:
                self._tables.popitem(last=False)
        return table.slice(span.offset, span.stop - span.start)

    def drop(self, fragment: str) -> None:
        with self._guard:
            self._tables.pop(fragment, None)


class _Cursor:
    """Successive rows of a shard's columns, ``take`` by ``take``."""

    def __init__(self, file: pq.ParquetFile, columns: list[str]) -> None:
        self._schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        self._batches = file.iter_batches(_READ_ROWS, columns=columns)
        self._held: pa.Table | None = None

    def take(self, rows: int) -> pa.Table:
        """The next ``rows`` rows. Raises ``ShardError`` if there are fewer."""
        parts: list[pa.Table] = []
        while rows > 0:
            if self._held is None or not len(self._held):
                try:
                    batch = next(self._batches, None)
                except (pa.ArrowException, OSError) as error:  # pyarrow calls a damaged page an OSError
                    raise ShardError(failure_kind(error, "unreadable"), str(error)[:300]) from error
                if batch is None:
                    raise ShardError("unreadable", f"{rows} rows fewer than its footer promised")
                self._held = pa.Table.from_batches([batch]).select(self._schema.names)
            part = self._held.slice(0, rows)
            self._held = self._held.slice(len(part))
            rows -= len(part)
            parts.append(part.replace_schema_metadata(None))
        return pa.concat_tables(parts) if parts else self._schema.empty_table()


def publish_shard(places: Places, plan: ShardPlan, spans: list[_Span], cache: _FragmentCache) -> LedgerEntry:
    """Write one caption shard; rows outside ``spans`` come from the present output (``--retry-errors``).

    Raises ``ShardError`` if the frame shard changed meanwhile or cannot be read.
    """
    source_uri, output_uri = join(places.input_root, plan.shard), join(places.output, plan.shard)
    errors = 0
    try:
        with open_shard(places.input_root, plan.shard) as source:
            schema = output_schema(source.schema_arrow, places.columns, places.added)
            kept = places.columns.kept(source.schema_arrow)
            with _whole_file(output_uri) as target, pq.ParquetWriter(target, schema, compression="zstd") as writer:
                for group in _groups(_captioned(places, plan, spans, cache, _Cursor(source, kept)), schema):
                    errors += pc.sum(pc.equal(group.column("caption_status"), STATUS_ERROR)).as_py() or 0
                    writer.write_table(group)
                if mark_of(source_uri) != plan.signature:
                    raise ShardError("changed", "the file was replaced while the run was under way; run again")
                writer.add_key_value_metadata(output_metadata(plan.shard, plan.signature, places.fingerprint, errors))
    except (pa.ArrowException, FileNotFoundError) as error:
        raise ShardError("unreadable", str(error)[:300]) from error
    return LedgerEntry(plan.shard, plan.rows, errors, plan.signature, places.fingerprint, mark_of(output_uri))


@contextmanager
def _whole_file(uri: str) -> Iterator[str]:
    """A local path to write to; the file appears at ``uri`` by one step, and only if nothing was raised."""
    fs, path = open_fs(uri)
    if is_local(uri):
        with atomic_path(fs, path) as target:
            yield target
        return
    with tempfile.TemporaryDirectory(prefix="framecap-") as folder:
        target = f"{folder}/shard"
        yield target
        fs.put_file(target, path)


def _captioned(
    places: Places, plan: ShardPlan, spans: list[_Span], cache: _FragmentCache, source: _Cursor
) -> Iterator[pa.Table]:
    """Tables of kept columns and captions that follow each other and cover the shard."""
    position = 0
    old: _Cursor | None = None
    if plan.reason == "errors":
        old = _Cursor(open_shard(places.output, plan.shard), places.added.names)
    for span in [*spans, _Span(plan.rows, plan.rows, "", 0)]:
        while position < span.start:
            if old is None:
                raise ShardError("unreadable", f"row {position} was captioned by no fragment")
            rows = min(_READ_ROWS, span.start - position)
            yield _beside(source.take(rows), old.take(rows))
            position += rows
        if span.stop > span.start:
            rows = span.stop - span.start
            yield _beside(source.take(rows), cache.rows(span))
            if old is not None:
                old.take(rows)
            position = span.stop


def _beside(left: pa.Table, right: pa.Table) -> pa.Table:
    for name in right.column_names:
        left = left.append_column(right.schema.field(name), right.column(name))
    return left


def _groups(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Gather tables to row groups of a useful size."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= _GROUP_ROWS or sum(part.nbytes for part in held) >= _GROUP_BYTES:
            yield pa.concat_tables(held).cast(schema)
            held = []
    if held:
        yield pa.concat_tables(held).cast(schema)


def _without_overlap(spans: list[_Span]) -> list[_Span]:
    """Spans in row order; of rows that two fragments hold (after a stolen lock), one."""
    kept: list[_Span] = []
    position = 0
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        if span.stop <= position:
            continue
        skip = max(0, position - span.start)
        kept.append(_Span(span.start + skip, span.stop, span.fragment, span.offset + skip))
        position = span.stop
    return kept
