"""Fragments → caption shards: rows in input order, beside the input's own columns, by one atomic step.

Runs on the driver. What it holds grows with the shards in flight, not with frames.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framecap.errors import ShardError
from framecap.pipeline.carried import CarriedRows
from framecap.pipeline.fragments import delete_fragment, is_fragment_name, list_fragments, read_fragment
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.ledger import Ledger, LedgerEntry
from framecap.pipeline.plan import Chunk, Range, ShardPlan, read_output_footer
from framecap.schema import STATUS_ERROR, InputColumns, output_metadata, output_schema
from framecap.scratch import ScratchFolder
from framecap.shards import as_shard_error, mark_of, open_shard
from framecap.storage import atomic_path, is_local, join, open_fs

log = logging.getLogger(__name__)
_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 << 20
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
        self._needed: dict[str, set[str]] = {}  # shard → fragments that it still needs
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

    def add(self, pieces: Chunk, fragment: str, also: Iterable[str] = ()) -> None:
        """Take note of a fragment; a repeated one changes nothing. ``also``: shards of other runs that need it."""
        if fragment in self._users:
            return
        users = set(also)
        offset = 0
        for piece in pieces:
            plan = self._waiting.get(piece.shard)
            if plan is not None and piece.serves(plan):
                users.add(piece.shard)
                self._spans.setdefault(piece.shard, []).append(_Span(piece.start, piece.stop, fragment, offset))
            elif (later := self._later.get(piece.shard)) is not None and piece.serves(later):
                users.add(piece.shard)
            offset += piece.stop - piece.start
        self.keep(fragment, users)
        for shard in users:
            self.publish_if_complete(shard)
        self._release(fragment, None)

    def keep(self, fragment: str, shards: Iterable[str]) -> None:
        """Leave a fragment alone until each of ``shards`` is published, or changes, or is forgotten."""
        for shard in shards:
            self._needed.setdefault(shard, set()).add(fragment)
            self._users.setdefault(fragment, set()).add(shard)

    def forget(self, gone: Callable[[str], bool]) -> None:
        """Delete the fragments of shards that are gone, unless others need them too."""
        for shard in filter(gone, list(self._needed)):
            self._forget(shard)

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
                self.fail(shard, as_shard_error(error, "unwritable"))
                log.error("%s cannot be published (%s); its fragments are kept for the next run", shard, error)
            except Exception as error:  # whatever it is, the other shards go on
                self.fail(shard, as_shard_error(error))
                log.exception("%s cannot be published; its fragments are kept for the next run", shard)
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
            if name not in self._users and is_fragment_name(name):
                delete_fragment(self._places.fragments, name)

    def _forget(self, shard: str) -> None:
        self._spans.pop(shard, None)
        for fragment in self._needed.pop(shard, ()):
            self._release(fragment, shard)

    def _release(self, fragment: str, shard: str | None) -> None:
        users = self._users.get(fragment, set())
        users.discard(shard or "")
        if not users:
            self._users.pop(fragment, None)
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
                for group in _groups(_captioned(places, plan, spans, cache, kept), schema):
                    errors += pc.sum(pc.equal(group.column("caption_status"), STATUS_ERROR)).as_py() or 0
                    writer.write_table(group)
                if mark_of(source_uri) != plan.signature:
                    raise ShardError("changed", "the file was replaced while the run was under way; run again")
                _check_place(places.output, plan)
                writer.add_key_value_metadata(output_metadata(plan.shard, plan.signature, places.fingerprint, errors))
    except (pa.ArrowException, FileNotFoundError) as error:
        raise as_shard_error(error) from error
    return LedgerEntry(plan.shard, plan.rows, errors, plan.signature, places.fingerprint, mark_of(output_uri))


def _check_place(output: str, plan: ShardPlan) -> None:
    """Raise ``ShardError`` if something that framecap did not write was put where the caption shard goes."""
    try:
        now = mark_of(join(output, plan.shard))
    except FileNotFoundError:
        return
    if now != plan.present and read_output_footer(output, plan.shard, now) is None:
        raise ShardError("foreign", "a file that framecap did not write was put in its place in OUT; move it away")


@contextmanager
def _whole_file(uri: str) -> Iterator[str]:
    """A local path to write to; the file appears at ``uri`` by one step, and only if nothing was raised."""
    fs, path = open_fs(uri)
    if is_local(uri):
        with atomic_path(fs, path) as target:
            yield target
        return
    with ScratchFolder() as folder:
        target = f"{folder}/shard"
        yield target
        fs.put_file(target, path)


def _captioned(
    places: Places, plan: ShardPlan, spans: list[_Span], cache: _FragmentCache, kept: list[str]
) -> Iterator[pa.Table]:
    """Tables of kept columns and captions that follow each other and cover the shard."""
    position = 0
    source = CarriedRows(places.input_root, plan.shard, kept)
    old: CarriedRows | None = None
    if plan.reason == "errors":
        old = CarriedRows(places.output, plan.shard, places.added.names)
    for span in [*spans, _Span(plan.rows, plan.rows, "", 0)]:
        while position < span.start:
            if old is None:
                raise ShardError("unreadable", f"row {position} was captioned by no fragment")
            rows = min(_READ_ROWS, span.start - position)
            yield from _beside(source.take(rows), pa.concat_tables(old.take(rows)))
            position += rows
        if span.stop > span.start:
            rows = span.stop - span.start
            yield from _beside(source.take(rows), cache.rows(span))
            if old is not None:
                old.skip(rows)
            position = span.stop


def _beside(parts: Iterator[pa.Table], captions: pa.Table) -> Iterator[pa.Table]:
    """Each of ``parts`` with its captions, of which there is one per row of all parts together."""
    position = 0
    for part in parts:
        own = captions.slice(position, len(part))
        position += len(part)
        for name in own.column_names:
            part = part.append_column(own.schema.field(name), own.column(name))
        yield part


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
