"""Which shards are to be captioned and why, and how their rows are cut into chunks and units.

Reads listings and footers only, never frames. Knows nothing of Ray or captioners.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from framecap.errors import SettingsError, ShardError, StoreUnavailableError
from framecap.pipeline.carried import check_int96
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.ledger import Ledger, LedgerEntry
from framecap.schema import META_ERRORS, META_FINGERPRINT, META_SIGNATURE, STATUS_ERROR, InputColumns
from framecap.shards import Listing, as_shard_error, counted, describe_names, open_shard
from framecap.storage import join

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
Range = tuple[int, int]  # rows [start, stop) of a shard

REASONS = ("new", "changed", "stale", "errors")
_FOOTER_THREADS = 16
_LISTED = 20  # shards that --dry-run names
_BUNDLE = 64  # tiny shards that may share a chunk


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard to do: ``todo`` are the rows that must be captioned, all of them unless ``errors``; ``basis`` is
    the mark of the caption shard that is then improved; ``present`` that of whatever lies in its place now."""

    shard: str
    signature: str
    rows: int
    reason: str
    todo: tuple[Range, ...]
    basis: str = ""
    present: str = ""

    @property
    def todo_rows(self) -> int:
        return sum(stop - start for start, stop in self.todo)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of one shard within a chunk. ``signature`` and ``basis``: of its ``ShardPlan``; what was
    captioned for another frame shard, or to improve another caption shard, is of no use."""

    shard: str
    signature: str
    start: int
    stop: int
    basis: str = ""

    def serves(self, plan: ShardPlan) -> bool:
        """Whether captions of these rows count for ``plan``."""
        return (self.shard, self.signature, self.basis) == (plan.shard, plan.signature, plan.basis)


Chunk = tuple[Piece, ...]  # what is captioned together and becomes one fragment


@dataclass
class Plan:
    """``todo`` in path order; ``done`` counts shards without work; ``failed``: shard → ``ShardError``."""

    todo: list[ShardPlan] = field(default_factory=list)
    done: int = 0
    done_rows: int = 0
    error_rows: int = 0  # rows of done shards that failed in an earlier run
    later: list[ShardPlan] = field(default_factory=list)  # beyond the limit
    failed: dict[str, ShardError] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)  # framecap's own caption shards without frame shard
    left_out: tuple[str, ...] = ()  # see ``Listing``
    marks: dict[str, str] = field(default_factory=dict)  # frame shards of this run's input
    outputs: dict[str, str] = field(default_factory=dict)  # caption shards, with their marks

    @property
    def reasons(self) -> Counter[str]:
        return Counter(shard.reason for shard in self.todo)

    def uncaptioned(self) -> set[str]:
        """Shards whose caption shard is still to be made, by this run or a later one."""
        return {shard.shard for shard in (*self.todo, *self.later) if not shard.basis} | set(self.failed)


def fingerprint(manifest: bytes, options: dict[str, object]) -> str:
    """sha256 over the captioner's manifest and everything else that decides what a caption shard holds."""
    digest = hashlib.sha256(hashlib.sha256(manifest).digest())
    digest.update(json.dumps(options, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def make_plan(
    source: Listing,
    output_uri: str,
    outputs: dict[str, str],
    ledger: Ledger,
    wanted: str,
    columns: InputColumns,
    added: pa.Schema,
    retry_errors: bool = False,
    limit: int | None = None,
    host: Host = THIS_HOST,
) -> Plan:
    """Compare IN with what OUT holds. ``outputs``: listing of OUT; ``wanted``: this run's fingerprint.

    Raises ``SettingsError`` if a file that framecap did not write has the name of a frame shard.
    """
    published = _published(output_uri, outputs, ledger, host)
    foreign = [name for name in outputs if name not in published and not _was_damaged(output_uri, name, ledger)]
    check_foreign(output_uri, [name for name in foreign if name in source.marks])
    gone = [name for name in outputs if source.misses(name) and name not in foreign]
    plan = Plan(gone=gone, left_out=source.left_out, failed=dict(source.failed), marks=source.marks, outputs=outputs)
    reasons: dict[str, str] = {}
    for shard, signature in source.marks.items():
        entry = published.get(shard)
        reason = _reason(entry, signature, wanted, retry_errors)
        if reason is not None:
            reasons[shard] = reason
        elif entry is not None:
            plan.done += 1
            plan.done_rows += entry.rows
            plan.error_rows += entry.error_rows

    def inspect(shard: str) -> ShardPlan | ShardError:
        try:
            rows = _check_footer(source.root, shard, columns, added)
        except Exception as error:  # whatever a footer holds is that shard's error
            return as_shard_error(error)
        whole = ((0, rows),) if rows else ()
        present = outputs.get(shard, "")
        if reasons[shard] == "errors":
            try:
                failed = _error_ranges(output_uri, shard)
                return ShardPlan(shard, source.marks[shard], rows, "errors", failed, present, present)
            except ShardError as error:
                log.warning("caption shard %s is damaged (%s); all of it is done again", shard, error)
                return ShardPlan(shard, source.marks[shard], rows, "new", whole, present=present)
        return ShardPlan(shard, source.marks[shard], rows, reasons[shard], whole, present=present)

    wanted_shards = sorted(reasons)
    for shard, result in zip(wanted_shards, _parallel(inspect, wanted_shards, host), strict=False):
        if isinstance(result, ShardError):
            plan.failed[shard] = result
        else:
            (plan.todo if limit is None or len(plan.todo) < limit else plan.later).append(result)
    return plan


def check_foreign(output_uri: str, foreign: Sequence[str]) -> None:
    """Raise ``SettingsError`` if there are files that framecap did not write where caption shards would be."""
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise SettingsError(
            f"{join(output_uri, foreign[0])}{more} would be replaced, but framecap did not write it; "
            "choose another --output-uri, or move it away"
        )


def _was_damaged(output_uri: str, shard: str, ledger: Ledger) -> bool:
    """Whether a file that does not say that framecap wrote it is a caption shard that was damaged since: the ledger
    knows it, and it is no Parquet file any more."""
    if shard not in ledger.entries:
        return False
    try:
        open_shard(output_uri, shard).close()
    except ShardError as error:
        if error.kind == "unavailable":
            raise StoreUnavailableError(error.message) from error
        return True
    return False


def _reason(entry: LedgerEntry | None, signature: str, wanted: str, retry_errors: bool) -> str | None:
    if entry is None:
        return "new"
    if entry.signature != signature:
        return "changed"
    if entry.fingerprint != wanted:
        return "stale"
    return "errors" if retry_errors and entry.error_rows else None


def _published(output_uri: str, outputs: dict[str, str], ledger: Ledger, host: Host) -> dict[str, LedgerEntry]:
    """Entries that the listing of OUT confirms; where it does not, the output's own footer decides."""
    known = {s: e for s, m in outputs.items() if (e := ledger.entries.get(s)) is not None and e.mark == m}
    unknown = [shard for shard in outputs if shard not in known]

    def read(shard: str) -> LedgerEntry | None:
        return read_output_footer(output_uri, shard, outputs[shard])

    for entry in _parallel(read, unknown, host):
        if entry is not None:
            known[entry.shard] = entry
            ledger.entries[entry.shard] = entry  # on disk at the end of the run: a dry run writes nothing
    return known


def read_output_footer(output_uri: str, shard: str, mark: str) -> LedgerEntry | None:
    """What a published caption shard says of itself; None if framecap did not write it (or not whole).

    Raises ``StoreUnavailableError``.
    """
    try:
        with open_shard(output_uri, shard) as file:
            metadata = file.metadata.metadata or {}
            return LedgerEntry(
                shard=shard,
                rows=file.metadata.num_rows,
                error_rows=int(metadata[META_ERRORS]),
                signature=metadata[META_SIGNATURE].decode(),
                fingerprint=metadata[META_FINGERPRINT].decode(),
                mark=mark,
            )
    except ShardError as error:
        if error.kind == "unavailable":
            raise StoreUnavailableError(error.message) from error
        return None
    except (KeyError, ValueError):
        return None


def _check_footer(root: str, shard: str, columns: InputColumns, added: pa.Schema) -> int:
    with open_shard(root, shard) as file:
        columns.check(file.schema_arrow, added)
        check_int96(root, shard, file, columns.kept(file.schema_arrow))
        return int(file.metadata.num_rows)


def _error_ranges(output_uri: str, shard: str) -> tuple[Range, ...]:
    """Maximal runs of rows that failed in a published caption shard."""
    ranges: list[Range] = []
    offset = 0
    with open_shard(output_uri, shard) as file:
        try:
            for batch in file.iter_batches(columns=["caption_status"]):
                failed = pc.equal(batch.column(0), STATUS_ERROR)
                for row in pc.indices_nonzero(failed).to_pylist():
                    position = offset + row
                    if ranges and ranges[-1][1] == position:
                        ranges[-1] = (ranges[-1][0], position + 1)
                    else:
                        ranges.append((position, position + 1))
                offset += len(batch)
        except Exception as error:  # whatever a page holds is that shard's error
            raise as_shard_error(error) from error
    return tuple(ranges)


def _parallel(function: Callable[[T], R], items: Sequence[T], host: Host) -> Iterator[R]:
    """Results in order, with a bounded number of calls under way."""
    if not items:
        return
    with host.executor(_FOOTER_THREADS, "framecap-footer") as pool:
        for begin in range(0, len(items), 1024):
            yield from pool.map(function, items[begin : begin + 1024])


def subtract(todo: Iterable[Range], covered: Iterable[Range]) -> tuple[Range, ...]:
    """The rows of ``todo`` that no range of ``covered`` holds; both sorted or not, result sorted."""
    remaining: list[Range] = []
    taken = sorted(covered)
    for begin, end in sorted(todo):
        position = begin
        for start, stop in taken:
            if stop <= position or start >= end:
                continue
            if start > position:
                remaining.append((position, start))
            position = max(position, stop)
        if position < end:
            remaining.append((position, end))
    return tuple(remaining)


def make_chunks(shards: Iterable[tuple[ShardPlan, tuple[Range, ...]]], rows: int) -> Iterator[Chunk]:
    """Cut the ranges to do into chunks of at most ``rows`` rows.

    Cuts fall on multiples of ``rows`` in the shard, so that they are the same after an interruption; short
    pieces, as of tiny shards, share a chunk.
    """
    bundle: list[Piece] = []
    bundled = 0
    for shard, ranges in shards:
        for start, stop in ranges:
            while start < stop:
                end = min(stop, (start // rows + 1) * rows)
                if bundled + end - start > rows or len(bundle) >= _BUNDLE:
                    yield tuple(bundle)
                    bundle, bundled = [], 0
                bundle.append(Piece(shard.shard, shard.signature, start, end, shard.basis))
                bundled += end - start
                start = end
    if bundle:
        yield tuple(bundle)


def make_units(chunks: Iterable[Chunk], size: int) -> list[tuple[Chunk, ...]]:
    """Group successive chunks, so that a reader opens a large shard once for up to ``size`` of them."""
    units: list[list[Chunk]] = []
    for chunk in chunks:
        same = units and len(units[-1]) < size and units[-1][-1][-1].shard == chunk[0].shard
        if same:
            units[-1].append(chunk)
        else:
            units.append([chunk])
    return [tuple(unit) for unit in units]


def describe(plan: Plan) -> list[str]:
    """The plan in lines, for ``--dry-run`` and the log."""
    rows = sum(shard.todo_rows for shard in plan.todo)
    reasons = ", ".join(f"{plan.reasons[r]} {r}" for r in REASONS if plan.reasons[r]) or "nothing"
    to_do = f"{counted(len(plan.todo), 'shard')}, {counted(rows, 'row')}"
    lines = [f"to do: {to_do} ({reasons}); done: {counted(plan.done, 'shard')}"]
    lines += [f"cannot be read: {shard} ({error})" for shard, error in sorted(plan.failed.items())]
    if plan.left_out:
        lines.append(f"left out: {describe_names(plan.left_out)}")
    if plan.gone:
        lines.append(f"caption shards whose frame shard is gone: {len(plan.gone)} (--prune deletes them)")
    if plan.error_rows:
        lines.append(f"rows that failed earlier: {plan.error_rows} (--retry-errors takes them up again)")
    return lines


def list_shards_to_do(plan: Plan) -> list[str]:
    """A line for each of the first shards to do, with its reason: for ``--dry-run``."""
    lines = [f"  {shard.reason:<8} {shard.todo_rows:>8} rows  {shard.shard}" for shard in plan.todo[:_LISTED]]
    left = len(plan.todo) - len(lines)
    return [*lines, f"  … and {left} more"] if left else lines


__all__ = [
    "Chunk",
    "Piece",
    "Plan",
    "Range",
    "ShardPlan",
    "describe",
    "fingerprint",
    "list_shards_to_do",
    "make_plan",
]
