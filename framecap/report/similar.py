"""Which shown frames look most alike, by the embeddings in the caption shards."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pyarrow as pa

from framecap.errors import ShardError
from framecap.report.gallery import Shown
from framecap.schema import EMBEDDING_COLUMN
from framecap.shards import open_shard

_BATCH = 8192
_BLOCK = 512  # frames compared with all others at once


def add_similar(captions: str, shown: list[Shown], count: int = 6) -> None:
    """Give each frame the ``count`` other frames of ``shown`` with the highest cosine, best first.

    Frames without an embedding are left as they are; without the column nothing happens.
    """
    frames, embeddings = _embeddings(captions, shown)
    if len(frames) < 2:
        return
    matrix = np.stack(embeddings)
    count = min(count, len(frames) - 1)
    for start in range(0, len(frames), _BLOCK):
        cosines = matrix[start : start + _BLOCK] @ matrix.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        for row, others in enumerate(nearest):
            frames[start + row].similar = [frames[other] for other in others]


def _embeddings(captions: str, shown: list[Shown]) -> tuple[list[Shown], list[np.ndarray]]:
    """The frames that have an embedding of the commonest size, and it: float32 [D] of length 1."""
    found: list[tuple[Shown, np.ndarray]] = []
    by_shard = sorted(shown, key=lambda frame: (frame.shard, frame.number))
    for shard, group in groupby(by_shard, key=lambda frame: frame.shard):
        wanted = {frame.number: frame for frame in group}
        try:
            with open_shard(captions, shard) as file:
                if EMBEDDING_COLUMN not in file.schema_arrow.names:
                    continue
                start = 0
                for batch in file.iter_batches(_BATCH, columns=[EMBEDDING_COLUMN]):
                    for number in range(start, start + len(batch)):
                        value = batch.column(0)[number - start].as_py() if number in wanted else None
                        if value is not None:
                            found.append((wanted[number], np.array(value, dtype=np.float32)))
                    start += len(batch)
        except (ShardError, pa.ArrowException, OSError):
            continue  # the page names the shard already; its frames have no links
    sizes = [len(embedding) for _, embedding in found]
    size = max(set(sizes), key=sizes.count, default=0)
    kept = [(frame, embedding) for frame, embedding in found if len(embedding) == size]
    return [frame for frame, _ in kept], [embedding / max(np.linalg.norm(embedding), 1e-12) for _, embedding in kept]
