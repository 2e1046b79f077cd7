"""Caption shards and their frames → one HTML file that needs no network.

Figures cover every row; pictures only the frames shown: the most doubtful ones and an even spread of the rest.
Captions are read twice, batch by batch (once to judge, once to show), frames only where they are shown.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from typing import Any

from tqdm import tqdm

from framecap import schema
from framecap.errors import SettingsError, ShardError
from framecap.image_uris import add_allow_flag, allowed_places
from framecap.pipeline.state import state_of
from framecap.report.doubt import doubt, flags
from framecap.report.figures import Change, Figures
from framecap.report.gallery import BLOCK, SCORES, TIME_COLUMN, Shown, add_thumbnails, to_page, with_finite_scores
from framecap.report.similar import add_similar
from framecap.row_values import rows_of
from framecap.shards import as_shard_error, counted, list_input, list_output, open_shard, short_text
from framecap.storage import join, open_fs, read_bytes, write_bytes_atomic

log = logging.getLogger(__name__)
_BATCH = 4096
_PAGE_BYTES = 27_000_000


@dataclass(frozen=True)
class ReportOptions:
    """How many frames are shown, what the input's columns are called, and which places its rows may name pictures in
    (by default where the frame shards are)."""

    limit: int = 5000
    title: str | None = None
    columns: schema.InputColumns = field(default_factory=schema.InputColumns)
    video_id: str = "video_id"
    image_uri_allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise SettingsError(f"limit={self.limit} shows nothing; give a number above 0")


@dataclass(frozen=True)
class Written:
    """What is on the page: all rows in figures, frames shown, those of them with a picture, and the shards that could
    not be read."""

    rows: int
    shown: int
    pictures: int
    unreadable: tuple[str, ...]


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
    progress: bool | None = None,
) -> Written:
    """Write the report of the caption shards at ``captions`` to the file ``out``.

    ``frames`` holds their frame shards (without it there are no pictures), ``against`` another output over
    the same frames to compare with. ``progress`` shows a bar; by default on a terminal only.

    Raises:
        SettingsError: no caption shards there, nothing at ``frames`` or ``against``, or ``out`` is a folder.
    """
    options = options or ReportOptions()
    shards = _checked_places(captions, out, against)
    root = None if frames is None else list_input(frames, "--frames").root
    quiet = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(shards, unit="shard", desc="figures", disable=quiet) as bar:
        survey = _survey(captions, bar, against, options)
    if len(survey.unreadable) == len(shards):
        shard, error = next(iter(survey.unreadable.items()))
        raise SettingsError(f"{captions} holds no caption shard that can be read; {shard}: {error}")
    shown = list(_shown(captions, survey.places, against, options))
    if root is not None:
        allowed = allowed_places(root, options.image_uri_allow)
        with tqdm(total=len(shown), unit="frame", desc="pictures", disable=quiet) as bar:
            add_thumbnails(root, shown, options.columns, _PAGE_BYTES, allowed, bar.update)
    add_similar(captions, shown)
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
    return Written(survey.figures.rows, len(shown), len(pictures), tuple(survey.unreadable))


def _checked_places(captions: str, out: str, against: str | None) -> list[str]:
    """The caption shards to show; everything that may be mistaken is found before the long part begins."""
    shards = list(list_output(captions))
    if not shards:
        raise SettingsError(f"{captions} holds no caption shards; give the job's --output-uri")
    if against is not None:
        list_output(against, "--against")
    fs, path = open_fs(out)
    if fs.isdir(path):
        raise SettingsError(f"--out {out} is a folder; give a file, such as {join(out, 'report.html')}")
    return shards


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
    folder = join(state_of(captions), "runs")
    try:
        fs, path = open_fs(folder)
        names = sorted(fs.find(path), reverse=True) if fs.exists(path) else []
        runs = [name.split("/")[-2] for name in names if name.endswith("/summary.json")]
        return [json.loads(read_bytes(join(folder, run_id, "summary.json"))) for run_id in runs[:20]]
    except (OSError, ValueError) as error:  # a state of its own may be for operators only; a summary may be cut short
        log.warning("the report is without the runs in %s: %s", folder, error)
        return []


def _survey(captions: str, shards: Iterable[str], against: str | None, options: ReportOptions) -> _Survey:
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
        except Exception as error:  # whatever a page holds is that shard's error
            survey.unreadable[shard] = _in_words(as_shard_error(error))
            # The figures count what could be read of it, the gallery leaves it out.
            doubtful = [entry for entry in doubtful if entry[2][0] != shard]
            heapq.heapify(doubtful)
            spread.places = [place for place in spread.places if place[0] != shard]
    chosen = set(spread.places)
    if survey.figures.rows > options.limit:
        half = max(1, options.limit // 2)
        chosen = {place for _, _, place in heapq.nlargest(half, doubtful)}
        chosen.update(spread.places[:: -(-len(spread.places) // max(1, options.limit - half))])
        for _, _, place in sorted(doubtful, reverse=True):  # some were chosen twice: the next doubtful ones
            if len(chosen) >= options.limit:
                break
            chosen.add(place)
    survey.places = sorted(chosen)
    return survey


def _in_words(error: BaseException) -> str:
    """One line; pyarrow quotes the damaged bytes as they are."""
    return "".join(letter for letter in " ".join(str(error).split()) if letter.isprintable())[:300]


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
    captions: str, shard: str, against: str | None, options: ReportOptions, wanted: list[int] | None = None
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any] | None]]:
    """(row number, caption row, the other run's row of the same frame) of one shard.

    ``wanted`` are the rows to give, ascending (None: all, with only the columns that the figures need).
    """
    others = _others(against, shard, options) if against else {}
    frame_id = options.columns.frame_id
    start = 0
    with open_shard(captions, shard) as file:
        there = set(file.schema_arrow.names)
        if missing := {frame_id, *(f.name for f in schema.CAPTION_FIELDS[:-1])} - there:
            raise ShardError("missing_column", f"no column {sorted(missing)[0]!r}: not a caption shard")
        read = [frame_id, *(f.name for f in schema.CAPTION_FIELDS)]
        if wanted is not None:
            read += [options.video_id, TIME_COLUMN, schema.CANDIDATES_FIELD.name]
        for batch in file.iter_batches(_BATCH, columns=[name for name in dict.fromkeys(read) if name in there]):
            first, last = bisect_left(wanted or (), start), bisect_left(wanted or (), start + len(batch))
            if wanted is None:
                rows = list(enumerate(rows_of(batch), start))
            else:  # row by row: Arrow cannot take rows of every type
                rows = [(number, rows_of(batch[number - start :][:1])[0]) for number in wanted[first:last]]
            for number, row in rows:
                yield number, with_finite_scores(row), others.get(row[frame_id])
            start += len(batch)


def _others(against: str, shard: str, options: ReportOptions) -> dict[Any, dict[str, Any]]:
    names = [options.columns.frame_id, "caption", "caption_status", *SCORES]
    try:
        with open_shard(against, shard) as file:
            if not set(names) <= set(file.schema_arrow.names):  # no caption shard
                return {}
            rows = rows_of(file.read(columns=names))
    except Exception as error:  # the page then says that these frames were only here
        log.warning("%s of --against cannot be read: %s", shard, short_text(error))
        return {}
    return {row[options.columns.frame_id]: with_finite_scores(row) for row in rows}


def _shown(captions: str, places: list[Place], against: str | None, options: ReportOptions) -> Iterator[Shown]:
    for shard, group in groupby(places, key=lambda place: place[0]):
        for number, row, other in _rows(captions, shard, against, options, [number for _, number in group]):
            yield Shown(shard, number, row, other, str(row[options.columns.frame_id]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``framecap report``."""
    parser.description = "Show captions under their frames in one self-contained HTML page."
    parser.epilog = "Exit code: 0 the page is written, 2 a place is wrong, 3 the page lacks shards that are damaged."
    parser.add_argument("captions", metavar="OUT", help="caption shards of the job")
    parser.add_argument("--frames", metavar="IN", help="frame shards of the same run; without them no pictures")
    parser.add_argument("--against", metavar="OUT2", help="another output over the same frames, to compare with")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--limit", type=int, default=5000, help="frames shown; figures count all (default: 5000)")
    parser.add_argument("--title", help="heading of the page (default: OUT)")
    parser.add_argument("--id-column", default="frame_id", help="name of the id column (default: frame_id)")
    parser.add_argument("--image-column", default="image", help="name of the image column (default: image)")
    parser.add_argument("--image-uri-column", default="image_uri", help="name of the URI column (default: image_uri)")
    parser.add_argument("--video-column", default="video_id", help="name of the video column (default: video_id)")
    add_allow_flag(parser, "where IN is, its folder or bucket")


def run(args: argparse.Namespace) -> int:
    """``framecap report``; 0 when the page is written, 3 if it lacks shards that could not be read."""
    columns = schema.InputColumns(args.id_column, args.image_column, args.image_uri_column)
    options = ReportOptions(args.limit, args.title, columns, args.video_column, args.image_uri_allow)
    written = write_report(args.captions, args.out, args.frames, args.against, options)
    every = written.shown == written.rows
    of = "all there are" if every else f"of {written.rows:,}; --limit shows more"
    print(f"{args.out}: {counted(written.shown, 'frame')} shown ({of}), {written.pictures:,} with their pictures")
    if args.frames and not written.pictures:
        print(f"no frame of {args.frames} is one of these: is it the input of this output?", file=sys.stderr)
    for shard in written.unreadable:
        print(f"  {shard} could not be read; the page says why", file=sys.stderr)
    return 3 if written.unreadable else 0
