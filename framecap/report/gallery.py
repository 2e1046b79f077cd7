"""The frames that a report shows: caption rows joined to small pictures of their frames."""

from __future__ import annotations

import functools
import logging
import math
import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow.parquet as pq

from framecap.errors import FrameError, ShardError
from framecap.image_uris import FetchRules, fetch
from framecap.report.doubt import doubt, flags
from framecap.report.thumbnails import thumbnail
from framecap.row_values import rows_of
from framecap.schema import InputColumns
from framecap.shards import open_shard, short_text
from framecap.storage import join

log = logging.getLogger(__name__)

SCORES = ("caption_logprob", "caption_min_logprob", "caption_tokens", "caption_similarity")
TIME_COLUMN = "timestamp_ms"
_BATCH = 64
_THREADS = 4
_LARGEST = 12_000  # characters of one picture, where the page has room for it
BLOCK = 100  # pictures in one block of the page
_TEXT = 700  # characters that a frame's words and figures take beside its picture


@dataclass
class Shown:
    """One frame of the gallery.

    ``other`` is the same frame in the run it is compared with, ``similar`` are the frames that look most like it.
    """

    shard: str
    number: int
    row: dict[str, Any]
    other: dict[str, Any] | None
    frame_id: str
    thumbnail: str | None = None
    similar: list[Shown] = field(default_factory=list)

    @property
    def doubt(self) -> float:
        return doubt(self.row, flags(self.row))


def to_page(shown: list[Shown], video_id: str) -> Iterator[list[Any]]:
    """Each frame's values in the order in which the page's script takes them apart.

    A picture is told by the block it stands in and its place there.
    """
    order = {id(frame): place for place, frame in enumerate(sorted(shown, key=lambda f: (f.shard, f.number)))}
    pictures = 0
    for frame in shown:
        row, other, video = frame.row, frame.other, frame.row.get(video_id)
        yield [
            order[id(frame)],
            frame.frame_id,
            frame.shard if video is None else str(video),
            _time(row.get(TIME_COLUMN)),
            row["caption"],
            row["caption_status"],
            row["caption_error"],
            *(_rounded(row[name]) for name in SCORES),
            flags(row),
            _rounded(frame.doubt),
            None if frame.thumbnail is None else divmod(pictures, BLOCK),
            other and [other["caption"], other["caption_status"], _rounded(other["caption_similarity"])],
            row.get("caption_candidates"),
            [order[id(other)] for other in frame.similar],
        ]
        pictures += frame.thumbnail is not None


def _time(value: Any) -> float | None:
    """A timestamp if it is a number that JSON has a word for."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def with_finite_scores(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with null for a score that is NaN or infinite: JSON has no word for those."""
    broken = {name: None for name in SCORES if row[name] is not None and not math.isfinite(row[name])}
    return row | broken if broken else row


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def add_thumbnails(
    root: str,
    shown: list[Shown],
    columns: InputColumns,
    page_bytes: int,
    allowed: Sequence[str],
    advance: Callable[[int], object],
) -> None:
    """Give each frame its picture, read from the frame shards below ``root``; all fit into ``page_bytes``.

    ``allowed``: places that rows may name, see `image_uris.allowed_places`.
    A frame whose shard, row or bytes are not there, or whose id differs, stays without one.
    """
    rules = FetchRules(tuple(allowed), retries=0)
    budget = min(_LARGEST, max(600, page_bytes // max(1, len(shown)) - _TEXT))
    with ThreadPoolExecutor(_THREADS, "thumbnails") as threads:
        for shard, group in groupby(shown, key=lambda frame: frame.shard):
            wanted = {frame.number: frame for frame in group}
            folder = posixpath.dirname(join(root, shard))
            try:
                with open_shard(root, shard) as file:
                    for batch in _images(file, wanted, columns):
                        for frame, small in threads.map(functools.partial(_with_small, folder, rules, budget), batch):
                            frame.thumbnail = small
                        advance(len(batch))
            except Exception as error:  # the gallery shows the captions of a lost shard without pictures
                log.warning("the report is without pictures of %s: %s", shard, short_text(error))


def _images(
    file: pq.ParquetFile, wanted: dict[int, Shown], columns: InputColumns
) -> Iterator[list[tuple[Shown, bytes | str | None]]]:
    """(frame, its bytes or URI), a batch at a time; only row groups that hold wanted rows are read."""
    names = set(file.schema_arrow.names)
    sources = [name for name in (columns.image, columns.image_uri) if name in names]
    if columns.frame_id not in names or not sources:
        raise ShardError("missing_column", f"neither {columns.image!r} nor {columns.image_uri!r}")
    start = 0
    for group in range(file.metadata.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if any(start <= number < stop for number in wanted):
            number = start
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[columns.frame_id, *sources]):
                found = []
                for place in range(len(batch)):
                    if (frame := wanted.get(number + place)) is None:
                        continue
                    row = rows_of(batch[place:][:1])[0]
                    if str(row[columns.frame_id]) == frame.frame_id:
                        values = (row[name] for name in sources)
                        found.append((frame, next((value for value in values if value is not None), None)))
                number += len(batch)
                yield found
        start = stop


def _with_small(
    folder: str, rules: FetchRules, budget: int, pair: tuple[Shown, bytes | str | dict[str, Any] | None]
) -> tuple[Shown, str | None]:
    """The frame and its picture; URIs are relative to ``folder``, that of the frame shard, as for the job."""
    frame, source = pair
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        fetched = fetch(source, folder, rules=rules)
        source = None if isinstance(fetched, FrameError) else fetched
    return frame, thumbnail(source, budget) if source else None
