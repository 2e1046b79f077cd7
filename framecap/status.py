"""``framecap status``: how far an output is, what failed, who works on it, and how the last runs ended.

Reads listings, the ledger, footers and summaries; frames never. Writes nothing, and needs neither Ray nor a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from framecap.errors import SettingsError, ShardError, StorageError
from framecap.pipeline.binding import read_record
from framecap.pipeline.ledger import Ledger, LedgerEntry
from framecap.pipeline.lock import holder_of
from framecap.pipeline.plan import read_output_footer
from framecap.pipeline.state import state_of
from framecap.report.report import run_summaries
from framecap.shards import counted, list_input, list_output, open_shard
from framecap.storage import join

_RUNS = 5  # runs that are listed
_SHARDS = 10  # shards that are named of each kind
_READ_ROWS = 16_384


@dataclass(frozen=True)
class Run:
    """How one run ended, from its summary."""

    run_id: str
    started: str
    seconds: float
    captioned_rows: int
    published_shards: int
    exit_code: int
    stopped: str | None


@dataclass
class Status:
    """Counts of shards and rows; ``left`` and ``failed``: shard → why."""

    done_shards: int = 0
    done_rows: int = 0
    error_rows: int = 0
    errors_by_kind: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    left_rows: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    without_frames: int = 0
    foreign: list[str] = field(default_factory=list)
    input_uri: str | None = None
    holder: str | None = None
    runs: list[Run] = field(default_factory=list)


def status_of(output: str, frames: str | None = None) -> Status:
    """The status of the output at ``output``, compared with the frame shards at ``frames``.

    ``frames``: None for the input that the output belongs to; where that cannot be listed, nothing is said of what
    is left.
    What is left is judged by the fingerprint that most shards of the output carry.

    Raises:
        SettingsError: no output there, or nothing at ``frames``.
    """
    shards = list_output(output)
    state = state_of(output)
    summaries = run_summaries(output)
    if not shards and not summaries:
        raise SettingsError(f"{output} holds neither caption shards nor runs; give the job's --output-uri")
    status = Status(holder=holder_of(join(state, "lock")), runs=[_run(summary) for summary in summaries[:_RUNS]])
    entries = _entries(output, shards, Ledger(state, "status"), status)
    status.error_rows = sum(entry.error_rows for entry in entries.values())
    kinds: Counter[str] = Counter()
    for shard, entry in entries.items():
        if entry.error_rows:
            kinds.update(_error_kinds(output, shard))
    status.errors_by_kind = dict(kinds.most_common())
    if summaries:
        status.failed = dict(summaries[0].get("failed_shards", {}))
    newest = summaries[0].get("settings", {}) if summaries else {}
    record = read_record(state)
    status.input_uri = frames or (record.uri if record is not None else newest.get("input_uri"))
    _compare(status, entries, required=frames is not None)
    return status


def _entries(output: str, shards: dict[str, str], ledger: Ledger, status: Status) -> dict[str, LedgerEntry]:
    """What each caption shard says of itself, by the ledger where its mark agrees, else by its footer."""
    entries: dict[str, LedgerEntry] = {}
    for shard, mark in shards.items():
        entry = ledger.entries.get(shard)
        if entry is None or entry.mark != mark:
            entry = read_output_footer(output, shard, mark)
        if entry is None:
            status.foreign.append(shard)
        else:
            entries[shard] = entry
    return entries


def _compare(status: Status, entries: dict[str, LedgerEntry], required: bool) -> None:
    """Fill in what is done and what is left of the input."""
    fingerprints = Counter(entry.fingerprint for entry in entries.values())
    current = fingerprints.most_common(1)[0][0] if fingerprints else ""
    done = {shard: entry for shard, entry in entries.items() if entry.fingerprint == current}
    try:
        source = list_input(status.input_uri, "--frames") if status.input_uri is not None else None
    except (SettingsError, StorageError):
        if required:
            raise
        source = None
        status.input_uri = None
    if source is not None:
        for shard, signature in source.marks.items():
            entry = entries.get(shard)
            if entry is None:
                status.left[shard] = "new"
            elif entry.signature != signature:
                status.left[shard] = "changed"
            elif shard not in done:
                status.left[shard] = "stale"
        status.left_rows = sum(_rows(source.root, shard) for shard in status.left)
        status.without_frames = len(set(entries) - set(source.marks))
        done = {shard: entry for shard, entry in done.items() if shard in source.marks and shard not in status.left}
    status.done_shards, status.done_rows = len(done), sum(entry.rows for entry in done.values())


def _rows(root: str, shard: str) -> int:
    try:
        with open_shard(root, shard) as file:
            return int(file.metadata.num_rows)
    except ShardError:
        return 0  # the job lists it as failed


def _error_kinds(output: str, shard: str) -> Counter[str]:
    """The errors of one caption shard by kind, the part of ``caption_error`` before the colon."""
    kinds: Counter[str] = Counter()
    try:
        with open_shard(output, shard) as file:
            for batch in file.iter_batches(_READ_ROWS, columns=["caption_error"]):
                kinds.update(str(error).partition(":")[0] for error in batch.column(0).drop_null().to_pylist())
    except (ShardError, pa.ArrowException, OSError) as error:
        kinds[f"unreadable shard {shard}: {str(error)[:100]}"] += 1
    return kinds


def _run(summary: dict[str, Any]) -> Run:
    return Run(
        run_id=str(summary.get("run_id", "?")),
        started=str(summary.get("started", "?")),
        seconds=float(summary.get("seconds", 0)),
        captioned_rows=int(summary.get("captioned_rows", 0)),
        published_shards=int(summary.get("published_shards", 0)),
        exit_code=int(summary.get("exit_code", 0)),
        stopped=summary.get("stopped"),
    )


def lines_of(status: Status) -> list[str]:
    """The status as the terminal shows it."""
    lines = [f"done    {counted(status.done_shards, 'shard')}, {counted(status.done_rows, 'row')}"]
    if status.input_uri is None:
        lines.append("left    unknown: the input is not known or cannot be listed; give --frames IN")
    else:
        reasons = Counter(status.left.values())
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        left = f"{counted(len(status.left), 'shard')}, {counted(status.left_rows, 'row')}"
        lines.append(f"left    {left}" + (f" ({why})" if why else ""))
    lines.append(f"failed  {counted(len(status.failed), 'shard')} in the last run")
    lines += [f"        {shard}: {error}" for shard, error in list(status.failed.items())[:_SHARDS]]
    lines.append(f"errors  {counted(status.error_rows, 'row')}" + (" (--retry-errors)" if status.error_rows else ""))
    lines += [f"        {kind}: {count:,}" for kind, count in status.errors_by_kind.items()]
    if status.without_frames:
        lines.append(f"gone    {counted(status.without_frames, 'caption shard')} without a frame shard (--prune)")
    if status.foreign:
        named = ", ".join(status.foreign[:_SHARDS])
        lines.append(f"foreign {counted(len(status.foreign), 'Parquet file')} that framecap did not write: {named}")
    lines.append(f"lock    {status.holder or 'free'}")
    for run in status.runs:
        stopped = f", {run.stopped}" if run.stopped else ""
        lines.append(
            f"run     {run.started}  {counted(run.captioned_rows, 'row')} captioned, "
            f"{counted(run.published_shards, 'shard')} published "
            f"in {run.seconds:.0f} s, exit code {run.exit_code}{stopped}"
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``framecap status``."""
    parser.description = "How far an output is: done, left and failed shards and rows, errors, lock, last runs."
    parser.epilog = "Exit code: 0 nothing is left, 1 work is left or failed, 2 a place is wrong."
    parser.add_argument("output", metavar="OUT", help="the job's --output-uri")
    parser.add_argument("--frames", metavar="IN", help="frame shards (default: the input that OUT belongs to)")
    parser.add_argument("--json", action="store_true", help="one JSON object with every shard")


def run(args: argparse.Namespace) -> int:
    """``framecap status``; 0, or 1 if work is left or failed."""
    status = status_of(args.output, args.frames)
    if args.json:
        json.dump(asdict(status), sys.stdout, ensure_ascii=False, indent=1)
        print()
    else:
        print("\n".join(lines_of(status)))
    return 1 if status.left or status.failed else 0
