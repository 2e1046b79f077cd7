"""What a run did, in figures: ``runs/<run_id>/summary.json`` of the state."""

from __future__ import annotations

import functools
import json
import platform
from collections import Counter
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import framecap
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.job import Job
from framecap.pipeline.plan import Plan
from framecap.pipeline.publish import Publisher
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.settings import CaptionSettings
from framecap.schema import SCHEMA_VERSION, STATUS_ERROR
from framecap.shards import counted, describe_names
from framecap.storage import join, open_fs, read_bytes, write_bytes_atomic

_LEAST_ROWS = 200  # before the error rate of a run says anything
_LEAST_SECONDS = 10.0  # from the first batch, before a rate from there says anything


@dataclass
class Summary:
    """Counts of one run; written as JSON under the same names."""

    run_id: str
    started: str
    fingerprint: str
    shards_by_reason: dict[str, int]
    shards_done_before: int
    rows_to_do: int
    error_rows_before: int
    plan_failed: dict[str, str]
    left_out: list[str]  # files that may be Parquet but are no shards by their names
    settings: dict[str, Any]
    versions: dict[str, str]
    exit_code: int = 0
    stopped: str | None = None
    notice: str | None = None  # what the reader of the captions should know of the captioner
    ended: str | None = None
    seconds: float = 0.0
    recovered_rows: int = 0
    captioned_rows: int = 0
    reused_rows: int = 0
    tokens: int = 0
    fragments: int = 0
    rows_by_status: Counter[str] = field(default_factory=Counter)
    errors_by_kind: Counter[str] = field(default_factory=Counter)
    stage_seconds: Counter[str] = field(default_factory=Counter)
    stage_frames_per_second: dict[str, float] = field(default_factory=dict)
    frames_per_second: float = 0.0
    published_shards: int = 0
    published_rows: int = 0
    unfinished_shards: int = 0
    failed_shards: dict[str, str] = field(default_factory=dict)
    pruned: list[str] = field(default_factory=list)
    _retried: Counter[str] = field(default_factory=Counter, repr=False)
    _host: Host = field(default=THIS_HOST, repr=False)
    _begun: float = field(default=0.0, repr=False)
    _first: tuple[float, int] | None = field(default=None, repr=False)  # when the first rows came, and how many

    @classmethod
    def begin(cls, job: Job, plan: Plan) -> Summary:
        return cls(
            run_id=job.run_id,
            started=job.host.date().isoformat(timespec="seconds"),
            fingerprint=job.fingerprint,
            shards_by_reason=dict(plan.reasons),
            shards_done_before=plan.done,
            rows_to_do=sum(shard.todo_rows for shard in plan.todo),
            error_rows_before=plan.error_rows,
            plan_failed={shard: str(error) for shard, error in plan.failed.items()},
            left_out=list(plan.left_out),
            settings=_public(job.settings),
            versions=_versions(),
            _host=job.host,
            _begun=job.host.monotonic(),
        )

    def add(self, record: ChunkRecord) -> None:
        rows = sum(record.statuses.values())
        if self._first is None:
            self._first = (self._host.monotonic(), rows)
        self.captioned_rows += rows
        self.reused_rows += record.reused
        self.tokens += record.tokens
        self.fragments += bool(record.fragment)
        self.rows_by_status.update(record.statuses)
        self._retried.update(record.retried)
        self.errors_by_kind.update(record.error_kinds)
        self.stage_seconds.update(record.seconds)

    def error_rate_exceeded(self, settings: CaptionSettings, least_rows: int = _LEAST_ROWS) -> bool:
        """Whether the run fails as a whole; rows that are only tried again (``--retry-errors``) do not count."""
        first = self.rows_by_status - self._retried
        rows = first.total()
        return rows >= least_rows and first[STATUS_ERROR] > settings.max_error_rate * rows

    def end(self, publisher: Publisher, exit_code: int) -> None:
        self.exit_code = exit_code
        self.ended = self._host.date().isoformat(timespec="seconds")
        self.seconds = round(self._host.monotonic() - self._begun, 3)
        self.published_shards, self.published_rows = publisher.done.shards, publisher.done.rows
        self.unfinished_shards = publisher.unfinished
        failed = {shard: str(error) for shard, error in publisher.done.failed.items()}
        self.failed_shards = dict(sorted({**self.plan_failed, **failed}.items()))
        self.frames_per_second = round(self._rate(), 3)
        self.stage_frames_per_second = {
            stage: round(self.captioned_rows / seconds, 3)
            for stage, seconds in self.stage_seconds.items()
            if seconds > 0
        }

    def _rate(self) -> float:
        """Frames per second from the first batch on, so without Ray's start; of a short run, over all of it."""
        if self._first is not None:
            since, rows = self._first
            seconds = self._host.monotonic() - since
            if seconds >= _LEAST_SECONDS and self.captioned_rows > rows:
                return (self.captioned_rows - rows) / seconds
        return self.captioned_rows / self.seconds if self.seconds else 0.0

    def estimate(self, job: Job) -> str:
        """How long the work may take, by the rate of the last run on this output, if there was one."""
        rate, frames = last_rate(job), counted(self.rows_to_do, "frame")
        if not self.rows_to_do:
            return "estimate: nothing to caption"
        if rate is None:
            return f"estimate: {frames}; no earlier run on this output tells the rate"
        minutes = self.rows_to_do / rate / 60
        return (
            f"estimate: {frames} in {minutes:.1f} minutes, at the {rate:.1f} frames/s of the last run, its options "
            "included, and some seconds for Ray's start"
        )

    def closing(self) -> str:
        """How the run ended, in one line for the log."""
        rate = self.frames_per_second
        counts = [
            f"{counted(self.captioned_rows, 'frame')} captioned in {self.seconds:.0f} s ({rate:.1f} frames/s)",
            self._errors(),
            f"{counted(self.published_shards, 'shard')} published",
            f"{counted(len(self.pruned), 'shard')} deleted (--prune)" if self.pruned else "",
            f"{self.unfinished_shards:,} unfinished" if self.unfinished_shards else "",
            f"{len(self.failed_shards):,} failed" if self.failed_shards else "",
            describe_names(self.left_out, 1) if self.left_out else "",
        ]
        ending = "; run the same line again for the rest" if self.unfinished_shards else ""
        return ", ".join(filter(None, counts)) + f"; exit code {self.exit_code}{ending}"

    def _errors(self) -> str:
        """Rows with errors by kind, and what to do about them."""
        if not self.errors_by_kind:
            return f"{self.rows_by_status[STATUS_ERROR]:,} with errors"
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.errors_by_kind.most_common())
        return f"{self.rows_by_status[STATUS_ERROR]:,} with errors ({kinds}; --retry-errors takes them up again)"

    def to_json(self) -> bytes:
        hidden = {"_host", "_begun", "_first", "_retried", "plan_failed"}  # the latter is part of failed_shards
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def write_summary(job: Job, summary: Summary) -> str:
    """Write summary.json of this run; its URI."""
    uri = join(job.state_uri, "runs", summary.run_id, "summary.json")
    write_bytes_atomic(uri, summary.to_json())
    return uri


def last_rate(job: Job) -> float | None:
    """Frames per second of the latest run on this output that captioned anything."""
    fs, path = open_fs(join(job.state_uri, "runs"))
    if not fs.exists(path):
        return None
    for name in sorted(fs.find(path), reverse=True):
        if not name.endswith("/summary.json"):  # a killed run may leave a temporary file
            continue
        run_id = name.split("/")[-2]
        rate = json.loads(read_bytes(join(job.state_uri, "runs", run_id, "summary.json")))["frames_per_second"]
        if rate:
            return float(rate)
    return None


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "framecap": framecap.__version__,
        "schema": str(SCHEMA_VERSION),
        "python": platform.python_version(),
        **{name: version(name) for name in ("ray", "torch", "transformers", "pyarrow")},
    }


def _public(settings: CaptionSettings) -> dict[str, Any]:
    """Settings without the values of storage options, which may be secret."""
    values = settings.model_dump(mode="json")
    values["storage_options"] = sorted(values["storage_options"])
    return values
