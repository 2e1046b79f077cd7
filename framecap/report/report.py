"""Caption shards and their frames → one HTML file that needs no network.

Figures cover every row; pictures only the frames shown: the most doubtful ones and an even spread of the rest.
Captions are read twice, batch by batch (once to judge, once to show), frames only where they are shown.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pyarrow as pa

from framecap import schema
from framecap.errors import SettingsError, ShardError
from framecap.pipeline.listing import list_shards, open_shard
from framecap.report.doubt import doubt, flags
from framecap.report.figures import Change, Figures
from framecap.report.gallery import BLOCK, SCORES, Shown, add_thumbnails, to_page
from framecap.storage import join, open_fs, read_bytes, write_bytes_atomic

_BATCH = 4096
_PAGE_BYTES = 27_000_000


@dataclass(frozen=True)
class ReportOptions:
    """How many frames are shown, and what the input's columns are called."""

    limit: int = 5000
    title: str | None = None
    columns: schema.InputColumns = field(default_factory=schema.InputColumns)
    video_id: str = "video_id"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise SettingsError(f"limit={self.limit} shows nothing; give a number above 0")


Place = tuple[str, int]  # shard, row


@dataclass
class _Survey:
    """The first reading: figures of all rows, and which of them will be shown."""

    figures: Figures
    change: Change | None
    places: list[Place]
    unreadable: dict[str, str]


def write_report(
    captions: str,
    out: str,
    frames: str | None = None,
    against: str | None = None,
    options: ReportOptions | None = None,
) -> int:
    """Write the report of the caption shards at ``captions`` to the file ``out``; the frames it shows.

    ``frames`` holds their frame shards (without it there are no pictures), ``against`` another output over
    the same frames to compare with.

    Raises:
        SettingsError: no caption shards there, or ``out`` is a folder.
    """
    options = options or ReportOptions()
    shards = list(list_shards(captions))
    if not shards:
        raise SettingsError(f"{captions} holds no caption shards; give the job's --output-uri")
    survey = _survey(captions, shards, against, options)
    shown = list(_shown(captions, survey.places, against, options))
    if frames is not None:
        add_thumbnails(frames, shown, options.columns, _PAGE_BYTES)
    shown.sort(key=lambda frame: -frame.doubt)
    pictures = [frame.thumbnail for frame in shown if frame.thumbnail is not None]
    page = {
        "title": options.title or captions,
        "captions": captions,
        "against": against,
        "shards": len(shards),
        "unreadable": survey.unreadable,
        "figures": survey.figures.to_page(),
        "change": survey.change.to_page() if survey.change else None,
        "runs": run_summaries(captions),
        "frames": list(to_page(shown, options.video_id)),
    }
    write_bytes_atomic(out, render(page, pictures).encode())
    return len(shown)


def render(page: dict[str, Any], pictures: list[str]) -> str:
    """The HTML of one page; ``page`` is what the template's script reads, ``pictures`` are data URIs.

    Pictures follow the script in blocks, so that the page is there before they are.
    """
    template = files("framecap.report").joinpath("page.html").read_text(encoding="utf-8")
    # "<" may not stand in a script element as it is: "</script>" in a caption would end it.
    data = json.dumps(page, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, _, rest = template.partition("@@DATA@@")
    between, _, after = rest.partition("@@PICTURES@@")
    blocks = []
    for block, start in enumerate(range(0, len(pictures), BLOCK)):
        lines = "\n".join(pictures[start : start + BLOCK])
        blocks.append(f'<script type="text/plain" id="pictures-{block}">{lines}</script>')
        blocks.append(f"<script>arrived({block})</script>\n")
    return "".join([before, data, between, *blocks, after])


def run_summaries(captions: str) -> list[dict[str, Any]]:
    """The summaries of the runs that wrote ``captions``, newest first; at most 20."""
    folder = join(captions, schema.STATE_FOLDER, "runs")
    fs, path = open_fs(folder)
    names = sorted(fs.find(path), reverse=True) if fs.exists(path) else []
    runs = [name.split("/")[-2] for name in names if name.endswith("/summary.json")]
    return [json.loads(read_bytes(join(folder, run_id, "summary.json"))) for run_id in runs[:20]]


def _survey(captions: str, shards: list[str], against: str | None, options: ReportOptions) -> _Survey:
    survey = _Survey(Figures(), Change() if against else None, [], {})
    doubtful: list[tuple[float, int, Place]] = []
    spread = _Spread(options.limit)
    for shard in shards:
        try:
            for row_number, row, other in _rows(captions, shard, against, options):
                found = flags(row)
                survey.figures.add(row, found, str(row[options.columns.frame_id]))
                worth = doubt(row, found)
                if survey.change is not None:
                    survey.change.add(row, other)
                    worth += 10 * (other is not None and other["caption"] != row["caption"])
                entry = (worth, -survey.figures.rows, (shard, row_number))
                heapq.heappush(doubtful, entry)
                if len(doubtful) > options.limit:
                    heapq.heappop(doubtful)
                spread.add((shard, row_number))
        except ShardError as error:
            survey.unreadable[shard] = str(error)
    chosen = set(spread.places)
    if survey.figures.rows > options.limit:
        half = max(1, options.limit // 2)
        chosen = {place for _, _, place in heapq.nlargest(half, doubtful)}
        chosen.update(spread.places[:: -(-len(spread.places) // max(1, options.limit - half))])
    survey.places = sorted(chosen)
    return survey


class _Spread:
    """At most ``limit`` places, evenly spread over a stream whose length is not known beforehand."""

    def __init__(self, limit: int) -> None:
        self._limit, self._step, self._seen = limit, 1, 0
        self.places: list[Place] = []

    def add(self, place: Place) -> None:
        if self._seen % self._step == 0:
            if len(self.places) >= self._limit:
                self.places = self.places[::2]
                self._step *= 2
            if self._seen % self._step == 0:
                self.places.append(place)
        self._seen += 1


def _rows(
    captions: str, shard: str, against: str | None, options: ReportOptions
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any] | None]]:
    """(row number, caption row, the other run's row of the same frame) of one shard."""
    others = _others(against, shard, options) if against else {}
    frame_id = options.columns.frame_id
    number = 0
    with open_shard(captions, shard) as file:
        names = [name for name in file.schema_arrow.names if name != schema.EMBEDDING_COLUMN]
        if missing := {frame_id, *(f.name for f in schema.CAPTION_FIELDS[:-1])} - set(names):
            raise ShardError("missing_column", f"no column {sorted(missing)[0]!r}: not a caption shard")
        for batch in file.iter_batches(_BATCH, columns=names):
            for row in batch.to_pylist():
                yield number, row, others.get(row[frame_id])
                number += 1


def _others(against: str, shard: str, options: ReportOptions) -> dict[Any, dict[str, Any]]:
    names = [options.columns.frame_id, "caption", "caption_status", *SCORES]
    try:
        with open_shard(against, shard) as file:
            rows = file.read(columns=names).to_pylist()
    except (ShardError, pa.ArrowException, FileNotFoundError):
        return {}
    return {row[options.columns.frame_id]: row for row in rows}


def _shown(captions: str, places: list[Place], against: str | None, options: ReportOptions) -> Iterator[Shown]:
    wanted: dict[str, set[int]] = {}
    for shard, number in places:
        wanted.setdefault(shard, set()).add(number)
    for shard, numbers in wanted.items():
        for number, row, other in _rows(captions, shard, against, options):
            if number in numbers:
                yield Shown(shard, number, row, other, str(row[options.columns.frame_id]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``framecap report``."""
    parser.description = "Show captions under their frames in one self-contained HTML page."
    parser.add_argument("captions", metavar="OUT", help="caption shards of the job")
    parser.add_argument("--frames", metavar="IN", help="their frame shards; without them the page has no pictures")
    parser.add_argument("--against", metavar="OUT2", help="another output over the same frames, to compare with")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--limit", type=int, default=5000, help="frames shown; figures count all (default: 5000)")
    parser.add_argument("--title", help="heading of the page (default: OUT)")
    parser.add_argument("--id-column", default="frame_id", help="name of the id column (default: frame_id)")
    parser.add_argument("--image-column", default="image", help="name of the image column (default: image)")
    parser.add_argument("--image-uri-column", default="image_uri", help="name of the URI column (default: image_uri)")
    parser.add_argument("--video-column", default="video_id", help="name of the video column (default: video_id)")


def run(args: argparse.Namespace) -> int:
    """``framecap report``; 0 when the page is written."""
    columns = schema.InputColumns(args.id_column, args.image_column, args.image_uri_column)
    options = ReportOptions(args.limit, args.title, columns, args.video_column)
    shown = write_report(args.captions, args.out, args.frames, args.against, options)
    print(f"{args.out}: {shown} frames shown")
    return 0
