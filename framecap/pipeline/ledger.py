"""What has been published, remembered between runs so that a night without news costs only listings.

A cache: the truth is the metadata in each caption shard's footer, read wherever the ledger and the listing
of OUT disagree. Lines are JSON; a run writes segments, which the next compaction folds into one file.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from framecap.errors import StorageError
from framecap.pipeline.host import THIS_HOST, Host
from framecap.storage import is_local, join, names_in, open_fs, read_bytes, write_bytes_atomic

log = logging.getLogger(__name__)

_SEGMENT = re.compile(r".+-\d{6,}\.jsonl")  # <run_id>-<number>.jsonl
_FLUSH_LINES = 500
_FLUSH_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One published caption shard; ``mark`` tells the file itself (size with ETag or mtime)."""

    shard: str
    rows: int
    error_rows: int
    signature: str
    fingerprint: str
    mark: str


class Ledger:
    """``entries`` by shard; ``append`` remembers a publication, ``compact`` leaves one file behind."""

    def __init__(self, state_uri: str, run_id: str, host: Host = THIS_HOST) -> None:
        self._file = join(state_uri, "ledger.jsonl")
        self._folder = join(state_uri, "ledger")
        self._run_id, self._host = run_id, host
        self._lines: list[str] = []
        self._segments = 0
        self._flushed = self._host.monotonic()
        self.entries: dict[str, LedgerEntry] = {}
        self._load()

    def append(self, entry: LedgerEntry) -> None:
        self.entries[entry.shard] = entry
        self._lines.append(_line(entry))
        if len(self._lines) >= _FLUSH_LINES or self._host.monotonic() - self._flushed > _FLUSH_SECONDS:
            try:
                self.flush()
            except StorageError as error:
                log.warning("%s; the ledger's next lines bring these along", error)

    def forget(self, shards: Iterable[str]) -> None:
        """Drop entries; takes effect on disk at ``compact``."""
        for shard in shards:
            self.entries.pop(shard, None)

    def flush(self) -> None:
        """Write what was appended since the last flush as one segment. Raises ``StorageError``."""
        self._flushed = self._host.monotonic()
        if self._lines:
            name = f"{self._run_id}-{self._segments:06d}.jsonl"
            write_bytes_atomic(join(self._folder, name), "".join(self._lines).encode())
            self._segments += 1
            self._lines.clear()

    def compact(self) -> None:
        """One file with all entries, and no segments."""
        text = "".join(_line(self.entries[shard]) for shard in sorted(self.entries))
        write_bytes_atomic(self._file, text.encode())
        self._lines.clear()
        fs, path = open_fs(self._folder)
        for name in self._segment_names():
            fs.rm_file(f"{path}/{name}")
        if is_local(self._folder):
            with suppress(OSError):  # not there, or it holds what framecap did not write
                Path(path).rmdir()

    def _segment_names(self) -> list[str]:
        return [name for name in names_in(self._folder) if _SEGMENT.fullmatch(name)]

    def _load(self) -> None:
        for source in [self._file, *(join(self._folder, name) for name in self._segment_names())]:
            try:
                lines = read_bytes(source).splitlines()
            except FileNotFoundError:  # no ledger yet, or another run has compacted it meanwhile
                continue
            for line in lines:
                try:
                    entry = LedgerEntry(**json.loads(line))
                except (ValueError, TypeError) as error:
                    log.warning("%s has a damaged line (%s); footers are read instead", source, error)
                    continue
                self.entries[entry.shard] = entry


def _line(entry: LedgerEntry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False) + "\n"
