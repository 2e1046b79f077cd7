"""Where the records of a run come from: Ray, or the stream that ``run`` is given."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from framecap.pipeline.job import Job, Resources
from framecap.pipeline.plan import Chunk
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.stops import Stops
from framecap.ray_cluster import RayStart

log = logging.getLogger(__name__)


class RecordStream(Protocol):
    """Units of chunks in, records of finished chunks out."""

    def start(self, job: Job, stops: Stops) -> Resources:
        """Get ready to caption. Raises ``CaptionerError`` or ``SettingsError`` for the last mistakes in the settings
        that can be found before anything is written."""

    def records(
        self, job: Job, units: list[tuple[Chunk, ...]], resources: Resources, stops: Stops
    ) -> Iterator[ChunkRecord]:
        """Records of chunks as they are finished, in any order. Raises ``StopRun`` when it is time to stop."""


class RayStream:
    """A ``RecordStream`` from Ray Data, which is imported only when there is work."""

    def __init__(self) -> None:
        self._ray = RayStart()

    def end(self, exit_code: int) -> None:
        """Stop a Ray that was started for this run, at the end of the process; see ``RayStart.end``."""
        self._ray.end(exit_code)

    def start(self, job: Job, stops: Stops) -> Resources:
        from framecap.pipeline.caption import start_ray

        notice = job.check_captioner()
        if notice:
            log.warning("%s", notice)
        resources = start_ray(job.settings, self._ray, stops.check)
        stops.listen()
        return replace(resources, notice=notice)

    def records(
        self, job: Job, units: list[tuple[Chunk, ...]], resources: Resources, stops: Stops
    ) -> Iterator[ChunkRecord]:
        from framecap.pipeline.caption import caption_units

        return caption_units(job, units, resources, stops)
