"""What must hold after every run, whatever went wrong: checked on what really lies in the stores."""

from __future__ import annotations

import io
import json
import traceback
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from framecap.errors import LockedError
from framecap.pipeline.fragments import FOLDER, Fragment, is_fragment_name
from framecap.pipeline.plan import Chunk, Piece
from framecap.pipeline.summary import Summary
from framecap.schema import META_ERRORS, META_FINGERPRINT, META_SIGNATURE, META_SOURCE
from simulation.frames import said
from simulation.world import EPOCH, Process

if TYPE_CHECKING:
    from simulation.history import History


class ViolationError(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Version:
    """One content of a frame shard."""

    number: int
    rows: int
    bad: frozenset[int]


@dataclass
class Run:
    """A driver process: what it was told, and how it ended."""

    process: Process
    settings: dict[str, object]
    began: float
    rows_given: int = 0  # to the record stream
    summary: Summary | None = None
    error: BaseException | None = None
    ended: bool = False
    end: float = float("inf")
    log: list[str] = field(default_factory=list)
    fingerprint: str = ""


def require(holds: bool, text: str) -> None:
    """Raise ``ViolationError`` with ``text`` unless it holds."""
    if not holds:
        raise ViolationError(text)


class CaptionShards:
    """What the caption shards of OUT say; a content that was looked at once is not looked at again."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bytes], tuple[str, str]] = {}

    def check(self, history: History, name: str, data: bytes) -> tuple[str, str]:
        """Fingerprint and signature of a caption shard that is whole and right; else ``ViolationError``."""
        key = (name, data)
        if key not in self._known:
            self._known[key] = _check_shard(history, name, data)
        return self._known[key]


def _check_shard(history: History, name: str, data: bytes) -> tuple[str, str]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        table, metadata = file.read(), file.metadata.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise ViolationError(f"caption shard {name} is not whole: {error}") from error
    require(META_SIGNATURE in metadata, f"caption shard {name} lacks its metadata")
    fingerprint, signature = metadata[META_FINGERPRINT].decode(), metadata[META_SIGNATURE].decode()
    version = history.versions.get((name, signature))
    require(version is not None, f"caption shard {name} names a frame shard that never was: {signature}")
    assert version is not None
    require(metadata[META_SOURCE].decode() == name, f"caption shard {name} names {metadata[META_SOURCE]!r}")
    rows = range(version.rows)
    ids = [f"{name}#{row}" for row in rows]
    require(table.column("frame_id").to_pylist() == ids, f"caption shard {name}: rows missing or out of order")
    notes = [version.number * 100 + row for row in rows]
    require(table.column("note").to_pylist() == notes, f"caption shard {name}: columns of another version")
    errors = 0
    for row, caption, status in zip(
        rows, table.column("caption").to_pylist(), table.column("caption_status").to_pylist(), strict=True
    ):
        picture = f"{name}#{row}@{version.number}{'!' if row in version.bad else ''}".encode()
        if status == "error":
            errors += 1
            require(row in version.bad, f"caption shard {name}: row {row} failed, and should not")
        else:
            expected = said(fingerprint, picture)
            require(caption == expected, f"caption shard {name}: row {row} says {caption}, not {expected}")
    require(int(metadata[META_ERRORS]) == errors, f"caption shard {name} has {errors} errors, not what its footer says")
    return fingerprint, signature


def check_outputs(history: History) -> None:
    """Every caption shard is whole, in order, of one captioner and of its frame shard; foreign files are untouched."""
    files = history.output_files()
    for name, data in history.foreign.items():
        require(files.get(name) == data, f"the foreign file {name} was touched")
    for name, data in files.items():
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if name not in history.foreign and not hidden:
            history.shards.check(history, name, data)


def check_units(history: History, run: Run, fingerprint: str, chunks: list[Chunk]) -> None:
    """Nothing is captioned that is published, or in a valid fragment, since before the run began."""
    if history.objects.lag:  # what a listing does not show yet is done again
        return
    fragments = old_fragments(history, run, fingerprint)
    files = history.output_files()
    for piece in (piece for chunk in chunks for piece in chunk):
        rows = set(range(piece.start, piece.stop))
        for fragment in fragments:
            for other in fragment.pieces:
                if (other.shard, other.signature, other.basis) == (piece.shard, piece.signature, piece.basis):
                    again = rows & set(range(other.start, other.stop))
                    require(not again, f"rows {sorted(again)} of {piece.shard} are captioned again: in {fragment.name}")
        if not piece.basis and history.written_at(history.output_path(piece.shard)) < run.began:
            data = files.get(piece.shard)
            if data is not None and piece.shard not in history.foreign:
                known = history.shards.check(history, piece.shard, data)
                require(known != (fingerprint, piece.signature), f"{piece.shard} is done, and is captioned again")


def old_fragments(history: History, run: Run, fingerprint: str) -> list[Fragment]:
    """The valid fragments that were there before ``run`` began."""
    found = []
    for name, data in history.state_files().items():
        folder, _, base = name.rpartition("/")
        if folder != FOLDER or not is_fragment_name(base):
            continue
        path = history.state_path(name).removeprefix(history.disk.root)
        if run.process.failed[path] > 2:  # given up
            continue
        if history.written_at(history.state_path(name)) >= run.began:
            continue
        fragment = parse_fragment(base, data)
        if fragment is not None and fragment.fingerprint == fingerprint:
            found.append(fragment)
    return found


def parse_fragment(name: str, data: bytes) -> Fragment | None:
    """A fragment from its bytes; None if it is torn."""
    try:
        with pa.ipc.open_file(pa.py_buffer(data)) as reader:
            metadata = reader.schema.metadata or {}
            pieces = tuple(Piece(*values) for values in json.loads(metadata[b"framecap.pieces"]))
            return Fragment(name, metadata[b"framecap.fingerprint"].decode(), pieces)
    except (pa.ArrowException, KeyError, OSError):
        return None


def check_ending(history: History, run: Run) -> None:
    """Exit code, summary and log of a run agree, and it ended in a way that a run may end."""
    process, summary, error = run.process, run.summary, run.error
    if summary is None:
        if error is not None:
            _check_refusal(history, run, error)
        return
    closing = [line for line in run.log if "; exit code " in line]
    require(len(closing) == 1, f"{process.name} logged its end {len(closing)} times")
    require(f"exit code {summary.exit_code}" in closing[0], f"the log says {closing[0]}, not {summary.exit_code}")
    written = history.state_files().get(f"runs/{summary.run_id}/summary.json")
    require(written is not None or "without a summary" in closing[0], f"{process.name} left no summary")
    if written is not None:
        found = json.loads(written)
        require(found["exit_code"] == summary.exit_code, "summary.json has another exit code")
        require(found["published_shards"] == summary.published_shards, "summary.json has other counts")
    require(
        summary.captioned_rows <= run.rows_given,
        f"{process.name}: {summary.captioned_rows} rows captioned of {run.rows_given} given",
    )
    _check_exit_code(run, summary)


def _check_exit_code(run: Run, summary: Summary) -> None:
    failed = {text.partition(":")[0] for text in summary.failed_shards.values()}
    again = bool(failed & {"unavailable", "no_space"}) or summary.unfinished_shards > 0
    expected = {75} if again else {3} if failed else {0, 3}
    require(summary.exit_code in expected, f"exit code {summary.exit_code} of {run.process.name}: {summary.closing()}")
    if summary.exit_code == 0:
        require(
            summary.captioned_rows == run.rows_given,
            f"{run.process.name} ended well with {summary.captioned_rows} rows captioned of {run.rows_given} given",
        )
    if failed and run.process.stumbled == 0:
        require(
            failed <= {"changed", "unreadable", "unavailable", "no_space", "unwritable"},
            f"shards failed without a reason: {failed}",
        )


def _check_refusal(history: History, run: Run, error: BaseException) -> None:
    from framecap.pipeline.exits import exit_code_of
    from simulation.workers import PoolLostError

    code = exit_code_of(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, PoolLostError):
        require(code == 1, "a lost cluster is exit code 1")
    elif isinstance(error, LockedError):
        require(
            run.process.stumbled > 0 or history.had_company(run), f"{run.process.name} was locked out alone: {text}"
        )
    elif "holds no .parquet" in text and "*" in str(run.settings.get("input_uri")):
        require(code == 2, f"a glob without files is exit code {code}")
    else:
        where = "".join(traceback.format_tb(error.__traceback__)[-12:])
        require(code in (2, 75), f"{run.process.name} ended with a traceback: {where}{text}")
        lags = history.objects.lag > 0
        require(run.process.stumbled > 0 or lags, f"{run.process.name} was refused for no reason: {text}")
        require(code == 75 or lags, f"a store that stumbled is exit code {code}: {text}")


def check_one_at_a_time(history: History) -> None:
    """No two runs publish in turn, unless one of them was silent for longer than its lock lasts."""
    published: Mapping[str, list[float]] = history.published
    spans = {name: (min(times), max(times)) for name, times in published.items()}
    silence = defaultdict(float)
    for run in history.runs:
        beats = [*run.process.beats, *published.get(run.process.name, [])[-1:]]
        gaps = [later - earlier for earlier, later in pairwise(beats)]
        silence[run.process.name] = max(gaps, default=0.0)
    names = sorted(spans)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            begin, end = max(spans[one][0], spans[other][0]), min(spans[one][1], spans[other][1])
            quiet = max(silence[one], silence[other]) > history.expiry
            require(
                begin > end or quiet,
                f"{one} and {other} both published between {begin - EPOCH:.2f} and {end - EPOCH:.2f}",
            )


def check_clean_end(history: History, run: Run) -> None:
    """Every frame shard has its captions, and only results, ledger and summaries remain."""
    summary = run.summary
    require(summary is not None, f"the last run did not end well: {run.error!r}")
    assert summary is not None
    require(
        summary.exit_code == 0,
        f"the last run: {summary.closing()} {summary.failed_shards}",
    )
    files = history.output_files()
    for name in history.present:
        if name in history.foreign:
            continue
        require(name in files, f"{name} has no captions after a clean end")
        found = history.shards.check(history, name, files[name])
        require(found == (run.fingerprint or found[0], history.signature(name)), f"{name} is not of the last captioner")
    left = [name for name in files if name not in history.foreign and name not in history.present]
    left = [name for name in left if not name.startswith("_framecap/")]
    require(not left, f"left in OUT: {left}")
    others = [
        name
        for name in history.state_files()
        if name not in ("ledger.jsonl", "output", "input.json")
        and not (name.startswith("runs/") and name.endswith("/summary.json"))
    ]
    require(not others or history.objects.lag > 0, f"left in the state: {others}")


def check_nothing_done(history: History, run: Run, before: Mapping[str, bytes]) -> None:
    """A rerun does nothing."""
    summary = run.summary
    require(summary is not None and summary.exit_code == 0, f"the rerun did not end well: {run.error!r}")
    require(run.rows_given == 0, f"the rerun captioned {run.rows_given} rows")
    require(history.published.get(run.process.name) is None, "the rerun published")
    after = history.output_files()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    changed = {name for name in changed if not name.startswith("_framecap/")}
    require(not changed, f"the rerun changed {sorted(changed)}")
