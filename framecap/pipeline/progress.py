"""How far a run is: one bar on a terminal, else a log line every 30 s."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.records import ChunkRecord

log = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0


class Progress:
    """One bar for the whole job on a terminal, else a log line every 30 s."""

    def __init__(self, total: int, host: Host = THIS_HOST) -> None:
        self._total, self._done, self._host = total, 0, host
        self._begun = self._logged = self._host.monotonic()
        self._bar = tqdm(total=total, unit="frame", smoothing=0.05, disable=not sys.stderr.isatty())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, record: ChunkRecord) -> None:
        rows = sum(record.statuses.values())
        self._done += rows
        self._bar.update(rows)
        now = self._host.monotonic()
        if self._bar.disable and now - self._logged > _LOG_EVERY_S:
            rate = self._done / (now - self._begun)
            left = (self._total - self._done) / rate if rate else float("inf")
            log.info("%d of %d frames, %.1f frames/s, %.0f s left", self._done, self._total, rate, left)
            self._logged = now
