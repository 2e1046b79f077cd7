"""A driver process of the caption job for tests that kill it: the real driver and store, with canned captions.

``python kill_driver.py IN OUT CAPTIONER [STATE]``: starts in a second, since it needs neither Ray nor a model.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator

from simulation.frames import captions

from framecap.pipeline.fragments import write_fragment
from framecap.pipeline.job import Job, Resources
from framecap.pipeline.plan import Chunk
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.run import run
from framecap.pipeline.settings import CaptionSettings
from framecap.pipeline.stops import Stops
from framecap.row_batches import read_batches

_CHUNK_SECONDS = 0.02


class CannedStream:
    """Captions that say which frame they belong to."""

    def start(self, job: Job, stops: Stops) -> Resources:
        return Resources(0, 1, 0.25, 1, 1, job.settings.batch_size or 2)

    def records(
        self, job: Job, units: list[tuple[Chunk, ...]], resources: Resources, stops: Stops
    ) -> Iterator[ChunkRecord]:
        for chunk in (chunk for unit in units for chunk in unit):
            stops.check()
            time.sleep(_CHUNK_SECONDS)
            pictures: list[bytes] = []
            for piece in chunk:
                for first, batch in read_batches(job.source.root, piece.shard, ["image"]):
                    rows = range(max(0, piece.start - first), max(0, min(len(batch), piece.stop - first)))
                    pictures += [batch.column(0)[row].as_py() for row in rows]
            table = captions(job.fingerprint, pictures, [False] * len(pictures))
            name = write_fragment(job.places.fragments, chunk, job.fingerprint, table)
            yield ChunkRecord(name, chunk, statuses=dict(Counter({"ok": len(pictures)})))


def main() -> int:
    """The exit code of the run."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    source, out, captioner, *state = sys.argv[1:]
    settings = CaptionSettings(
        input_uri=source, output_uri=out, captioner=captioner, batch_size=3, state_uri=state[0] if state else None
    )
    return run(settings, stream=CannedStream()).exit_code


if __name__ == "__main__":
    sys.exit(main())
