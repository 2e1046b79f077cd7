"""``framecap verify``: proof that every frame of IN is in OUT once, in order, under one fingerprint.

Both sides are streamed, ids only, shard beside shard; memory depends on the batch, not on the data. Knows the
contract of `framecap.schema` and nothing of how captions are made.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from framecap import schema
from framecap.errors import ShardError
from framecap.pipeline.state import state_of
from framecap.shards import Listing, as_shard_error, describe_names, is_hidden, list_input, list_output, open_shard
from framecap.storage import check_endpoint, join, open_fs
from framecap.verify_ids import IdCensus, find_ids
from framecap.verify_rows import IdStream, compare_rows

log = logging.getLogger(__name__)

FAULTS = {
    "missing_shard": "a frame shard without its caption shard",
    "extra_shard": "a caption shard without its frame shard",
    "left_out": "a file that may hold frames, but is no shard by its name: rename it to *.parquet",
    "unreadable": "a shard that is not Parquet, is cut short, or lacks its columns",
    "missing_row": "a frame that has no caption row",
    "extra_row": "a caption row of no frame",
    "doubled_row": "a frame captioned twice",
    "swapped_rows": "rows out of order",
    "wrong_row": "a row that carries another frame's id",
    "schema": "a column that is missing, out of place or of another type",
    "status": "a caption_status that is not one of the published ones, or miscounted errors",
    "fingerprint": "a shard captioned by another captioner or with other options",
    "stale": "a shard whose frames changed after they were captioned",
    "unfinished": "a fragment, lock or temporary file that a run left behind",
}
_BATCH = 16_384
_LISTED = 20
_EXAMPLES = 3
_THREADS = 4


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: its kind (a key of ``FAULTS``), the shard or file, and what was found."""

    kind: str
    where: str
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """What was compared and what is wrong; ``fingerprint`` is the one most shards carry. ``notes``: what is no fault,
    but worth knowing."""

    shards: int
    frames: int
    error_rows: int
    fingerprint: str | None
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class _Checked:
    """One pair of shards, compared."""

    where: str
    frames: int = 0
    error_rows: int = 0
    fingerprint: str | None = None
    faults: tuple[Fault, ...] = ()
    kept: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()


def verify(
    frames: str,
    captions: str,
    columns: schema.InputColumns | None = None,
    fingerprint: str | None = None,
    progress: bool | None = None,
) -> VerifyResult:
    """Compare the frame shards at ``frames`` with the caption shards at ``captions``.

    ``fingerprint`` is the one every shard must carry; by default the one that most shards carry.

    Raises:
        SettingsError: nothing is at ``frames``, or no folder at ``captions``.
        StorageError: a URI has a scheme without a backend.
    """
    columns = columns or schema.InputColumns()
    check_endpoint(frames)
    listing = list_input(frames, "IN")
    sources, outputs = listing.marks, list_output(captions, also=listing.marks)
    faults = [*_of_listing(listing, outputs), *unfinished(captions)]
    census = IdCensus()
    quiet = not (sys.stderr.isatty() if progress is None else progress)

    def check(name: str) -> _Checked:
        if name not in outputs:
            return _Checked(name, faults=(_missing(name, listing.root, columns),))
        return _check_pair(name, sources[name], (listing.root, captions), columns, census)

    with ThreadPoolExecutor(_THREADS, "verify") as threads:
        results = threads.map(check, sources)
        checked = list(tqdm(results, total=len(sources), unit="shard", disable=quiet, desc="verify"))
    expected = fingerprint or _most_common(checked)
    for pair in checked:
        faults += pair.faults
        if pair.fingerprint is not None and pair.fingerprint != expected:
            faults.append(Fault("fingerprint", pair.where, f"carries {pair.fingerprint}, not {expected}"))
    faults += _uneven_columns(checked)
    order = list(FAULTS)
    return VerifyResult(
        sum(name in outputs for name in sources),
        sum(pair.frames for pair in checked),
        sum(pair.error_rows for pair in checked),
        expected,
        tuple(sorted(faults, key=lambda fault: (fault.where, order.index(fault.kind)))),
        (*_notes_on_names(listing), *_notes_on_ids(census, listing, columns.frame_id)),
    )


def _of_listing(listing: Listing, outputs: Iterable[str]) -> Iterator[Fault]:
    """Faults that names alone show."""
    folders = tuple(name for name in listing.failed if name.endswith("/"))
    for name in outputs:
        if name not in listing.marks and not (folders and name.startswith(folders)):
            yield Fault("extra_shard", name, "has no frame shard")
    for name, error in listing.failed.items():
        yield Fault("unreadable", name, f"cannot be captioned: {error.message}")
    for name in listing.left_out:
        if _has_other_ending(name):
            yield Fault("left_out", name, f"does not end in {schema.SHARD_SUFFIX}")


def _has_other_ending(name: str) -> bool:
    return not is_hidden(name) and not name.endswith(")")  # the latter is a link, with a word on it


def _notes_on_names(listing: Listing) -> Iterator[str]:
    if hidden := [name for name in listing.left_out if not _has_other_ending(name)]:
        yield f"left out of IN: {describe_names(hidden)}"


def _notes_on_ids(census: IdCensus, listing: Listing, frame_id: str) -> Iterator[str]:
    """Ids that occur more than once: the captions are right, but whoever joins by id gets extra rows."""
    repeated = census.repeated()
    if not len(repeated):
        return
    places = find_ids(_ids_of(listing, frame_id), repeated[:_EXAMPLES])
    examples = "; ".join(f"{value!r} in {' and '.join(where)}" for value, where in places.items())
    what = "frame id occurs" if len(repeated) == 1 else "frame ids occur"
    yield f"{len(repeated):,} {what} more than once in IN, so that tables joined by it get extra rows: {examples}"


def _ids_of(listing: Listing, frame_id: str) -> Iterator[tuple[str, pa.Array]]:
    for name in listing.marks:
        try:
            with open_shard(listing.root, name) as frames:
                for ids in _ids(frames, frame_id):
                    yield name, ids
        except Exception as error:  # it has its own fault
            log.debug("%s: %s", name, error)


def _most_common(checked: Sequence[_Checked]) -> str | None:
    known = Counter(pair.fingerprint for pair in checked if pair.fingerprint is not None)
    return known.most_common(1)[0][0] if known else None


def _uneven_columns(checked: Sequence[_Checked]) -> Iterator[Fault]:
    """Columns that some shards carry over and others leave out: whichever are fewer are at fault."""
    kept = Counter(name for pair in checked for name in pair.kept)
    left_out = Counter(name for pair in checked for name in pair.left_out)
    for name in sorted(set(kept) & set(left_out)):
        fewer_keep = kept[name] < left_out[name]
        for pair in checked:
            if name in (pair.kept if fewer_keep else pair.left_out):
                here, elsewhere = ("kept", "left out") if fewer_keep else ("left out", "kept")
                yield Fault("schema", pair.where, f"column {name!r} is {here} here and {elsewhere} in most shards")


def unfinished(uri: str) -> Iterator[Fault]:
    """What a run left behind below ``uri`` and in its state, wherever that is: fragments, a lock, temporary files."""
    for name in _files(uri):
        yield from _left_behind(name, name)
    if (state := state_of(uri)) != join(uri, schema.STATE_FOLDER):
        try:
            if not (names := _files(state)):
                log.warning("the state of this output is not at %s; fragments and locks are not looked for", state)
            for name in names:
                yield from _left_behind(join(state, name), join(schema.STATE_FOLDER, name))
        except OSError as error:  # it may be for operators only; what is verified is the captions
            log.warning("the state of this output cannot be looked through: %s", error)


def _files(uri: str) -> list[str]:
    """Every file below ``uri``, by its path from there."""
    fs, root = open_fs(uri)
    return [file[len(root.rstrip("/")) + 1 :] for file in sorted(fs.find(root))] if fs.exists(root) else []


def _left_behind(where: str, name: str) -> Iterator[Fault]:
    base = name.rsplit("/", 1)[-1]
    if name.startswith(f"{schema.STATE_FOLDER}/"):
        if base.endswith(schema.SHARD_SUFFIX) or "/fragments/" in name:
            yield Fault("unfinished", where, "fragment of a run that did not end")
        elif base.startswith("lock"):
            yield Fault("unfinished", where, "a run holds this output, or died holding it")
    if base.startswith(".") and base.endswith(".tmp"):
        yield Fault("unfinished", where, "temporary file of a write that did not end")


def _missing(name: str, root: str, columns: schema.InputColumns) -> Fault:
    """Why a frame shard has no caption shard: the job leaves out what it cannot read."""
    try:
        with open_shard(root, name) as frames:
            columns.check(frames.schema_arrow, pa.schema([]))
    except Exception as error:  # whatever a file holds is that shard's fault
        return Fault("unreadable", name, f"the frame shard cannot be captioned: {as_shard_error(error).message}")
    return Fault("missing_shard", name, "has no caption shard")


def _open_captions(root: str, name: str) -> pq.ParquetFile:
    try:
        return open_shard(root, name)
    except ShardError as error:
        raise ShardError(error.kind, f"the caption shard: {error.message}") from error


def _check_pair(
    name: str, signature: str, roots: tuple[str, str], columns: schema.InputColumns, census: IdCensus
) -> _Checked:
    try:
        with open_shard(roots[0], name) as frames:
            columns.check(frames.schema_arrow, pa.schema([]))
            with _open_captions(roots[1], name) as captions:
                return _compare(name, signature, frames, captions, columns, census)
    except ShardError as error:
        text = error.message if error.message.startswith("the caption shard") else f"the frame shard: {error.message}"
    except Exception as error:  # whatever a file holds is that shard's fault
        text = as_shard_error(error).message
    return _Checked(name, faults=(Fault("unreadable", name, text),))


def _compare(
    name: str,
    present: str,
    frames: pq.ParquetFile,
    captions: pq.ParquetFile,
    columns: schema.InputColumns,
    census: IdCensus,
) -> _Checked:
    metadata = captions.metadata.metadata or {}
    faults = [Fault("schema", name, text) for text in schema_faults(frames, captions, columns)]
    signature = metadata.get(schema.META_SIGNATURE, b"").decode()
    if signature != present:
        faults.append(
            Fault("stale", name, f"captioned from frames of {_readable(signature)}, now there are {_readable(present)}")
        )
    counts: Counter[str] = Counter()
    if columns.frame_id in captions.schema_arrow.names:
        ids = IdStream(_ids(captions, columns.frame_id, counts))
        rows = compare_rows(IdStream(census.counted(_ids(frames, columns.frame_id))), ids)
        faults += [Fault(row.kind, name, row.detail) for row in rows]
        faults += [Fault("status", name, text) for text in _status_faults(counts, metadata)]
    fingerprint = metadata.get(schema.META_FINGERPRINT)
    if fingerprint is None:
        faults.append(Fault("fingerprint", name, "carries no fingerprint: it was not written by framecap"))
    return _Checked(
        name,
        frames.metadata.num_rows,
        counts[schema.STATUS_ERROR],
        None if fingerprint is None else fingerprint.decode(),
        tuple(faults),
        *_carried(frames, captions, columns),
    )


def _readable(signature: str) -> str:
    """A shard's mark, ``size-version`` of `framecap.storage.mark`, in words."""
    size, _, version = signature.partition("-")
    if not size.isdigit():
        return f"signature {signature!r}" if signature else "no signature"
    when = f"{datetime.fromtimestamp(int(version) / 1e9, UTC):%Y-%m-%d %H:%M:%S} UTC" if _is_time(version) else version
    return f"{int(size):,} bytes" + (f" ({when})" if when else "")


def _is_time(version: str) -> bool:
    return version.isdigit() and len(version) == len("1700000000000000000")  # nanoseconds, as local files have


def _carried(
    frames: pq.ParquetFile, captions: pq.ParquetFile, columns: schema.InputColumns
) -> tuple[frozenset[str], frozenset[str]]:
    """Of the columns that a run may keep or leave out: those that this shard carries, and those that it does not."""
    optional = set(schema.OPTIONAL_TYPES)
    optional |= set(frames.schema_arrow.names) - {columns.frame_id, columns.image}
    found = optional & set(captions.schema_arrow.names)
    return frozenset(found), frozenset(optional - found)


def schema_faults(frames: pq.ParquetFile, captions: pq.ParquetFile, columns: schema.InputColumns) -> Iterator[str]:
    """Where the caption shard's columns differ from the contract: kept input columns, then the captions'."""
    source, found = frames.schema_arrow, captions.schema_arrow
    published = list(schema.CAPTION_FIELDS)
    optional = schema.OPTIONAL_TYPES
    version = (captions.metadata.metadata or {}).get(schema.META_VERSION, b"none").decode()
    if version != str(schema.SCHEMA_VERSION):
        yield f"schema version {version}, not {schema.SCHEMA_VERSION}"
    added = {field.name: field.type for field in published} | optional
    kept = [name for name in found.names if name not in added]
    for field in published:
        if field.name not in found.names:
            yield f"column {field.name!r} is missing"
    for name, kind in added.items():
        if name in found.names and kind is not None and found.field(name).type != kind:
            yield f"column {name!r} is {found.field(name).type}, not {kind}"
    if columns.frame_id not in kept:
        yield f"column {columns.frame_id!r} is missing"
    for name in kept:
        if name not in source.names:
            yield f"column {name!r} is in no frame shard"
        elif found.field(name).type != source.field(name).type:
            yield f"column {name!r} is {found.field(name).type}, in the frame shard {source.field(name).type}"
    order = [name for name in source.names if name in kept] + [name for name in added if name in found.names]
    if sorted(order) == sorted(found.names) and order != found.names:
        yield f"columns are in the order {', '.join(found.names)}"


def _ids(shard: pq.ParquetFile, frame_id: str, counts: Counter[str] | None = None) -> Iterator[pa.Array]:
    """The ids, batch by batch, as one type on both sides; ``counts`` gathers the statuses beside them."""
    status = "caption_status"
    counted = counts is not None and status in shard.schema_arrow.names
    names = [frame_id, status] if counted else [frame_id]
    kind = shard.schema_arrow.field(frame_id).type
    for batch in shard.iter_batches(_BATCH, columns=names):
        if counts is not None and counted:
            for entry in pc.value_counts(batch[status]).to_pylist():
                counts[str(entry["values"])] += entry["counts"]
        yield batch[frame_id].cast(pa.large_string()) if schema.is_text(kind) else batch[frame_id]


def _status_faults(counts: Counter[str], metadata: dict[bytes, bytes]) -> Iterator[str]:
    for status, rows in counts.items():
        if status not in schema.STATUSES:
            yield f"{rows} rows have status {status!r}; it must be one of {', '.join(schema.STATUSES)}"
    promised = metadata.get(schema.META_ERRORS, b"").decode()
    if counts and promised != str(counts[schema.STATUS_ERROR]):
        found = counts[schema.STATUS_ERROR]
        yield f"{found} rows have status 'error', the file's metadata says {promised or 'nothing'}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``framecap verify``."""
    parser.description = "Prove that every frame of IN is in OUT exactly once, in order, by one captioner."
    parser.epilog = "Exit code: 0 nothing is wrong, 1 a table of what is, 2 IN or OUT is not there."
    parser.add_argument("frames", metavar="IN", help="frame shards: file, folder or glob")
    parser.add_argument("captions", metavar="OUT", help="caption shards of the job")
    parser.add_argument("--id-column", default="frame_id", help="name of the id column (default: frame_id)")
    parser.add_argument("--image-column", default="image", help="name of the image column (default: image)")
    parser.add_argument("--image-uri-column", default="image_uri", help="name of the URI column (default: image_uri)")
    parser.add_argument("--fingerprint", help="the fingerprint all shards must carry (default: the most common one)")
    parser.add_argument("--all", action="store_true", help="list every fault (default: the first 20 of each kind)")


def run(args: argparse.Namespace) -> int:
    """``framecap verify``; 0 if nothing is wrong, else 1 and a table."""
    columns = schema.InputColumns(args.id_column, args.image_column, args.image_uri_column)
    result = verify(args.frames, args.captions, columns, args.fingerprint)
    print(
        f"{result.shards:,} {'shard' if result.shards == 1 else 'shards'}, {result.frames:,} "
        f"{'frame' if result.frames == 1 else 'frames'}, {result.error_rows:,} with status error, "
        f"fingerprint {result.fingerprint or 'none'}"
    )
    for note in result.notes:
        print(note)
    if result.ok:
        print(f"every frame {'of these shards ' if result.notes else ''}is there once and in order")
        return 0
    print(table(result.faults, None if args.all else _LISTED))
    if _looks_swapped(args.frames, args.captions):
        print(f"\n{args.frames} is an output of the job: IN comes first, then OUT")
    return 1


def _looks_swapped(frames: str, captions: str) -> bool:
    """Whether IN has the state of a captioning job, and OUT has none."""
    states = [open_fs(join(uri, schema.STATE_FOLDER)) for uri in (frames, captions)]
    return [fs.exists(path) for fs, path in states] == [True, False]


def table(faults: Iterable[Fault], most: int | None = None) -> str:
    """The faults as aligned lines, ``most`` of each kind (None: all), and how many of each kind there are below."""
    counts, rows = Counter[str](), [("fault", "where", "what was found")]
    for fault in faults:
        counts[fault.kind] += 1
        if most is None or counts[fault.kind] <= most:
            rows.append((fault.kind, fault.where, fault.detail))
    if counts.total() >= len(rows):
        rows.append(("…", "", f"and {counts.total() - len(rows) + 1:,} more; --all lists them"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]
    return "\n".join([*lines, "", *(f"{counts[kind]:,} × {kind}: {FAULTS[kind]}" for kind in FAULTS if counts[kind])])
