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
        self._logged = self._host.monotonic()
        self._first: tuple[float, int] | None = None  # when the first rows came, and how many
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
        now = self._host.monotonic()
        if self._first is None:  # the rate counts from here: before it actors and models were loaded
            self._first = (now, rows)
            self._bar.initial = self._bar.n = self._bar.last_print_n = rows
            self._bar.unpause()
            self._bar.refresh()
        else:
            self._bar.update(rows)
        if self._bar.disable and now - self._logged > _LOG_EVERY_S:
            since, uncounted = self._first
            rate = (self._done - uncounted) / (now - since) if now > since else 0.0
            speed = f"{rate:.1f} frames/s, {(self._total - self._done) / rate:.0f} s left" if rate else "no rate yet"
            log.info("%d of %d frames, %s", self._done, self._total, speed)
            self._logged = now
