"""``framecap search``: frames of an output ranked by the ruCLIP cosine between a query and each row's embedding.

Caption shards are read batch by batch, so memory does not grow with the archive. Near-identical frames of a video
are folded into the best of them. Knows nothing of Ray.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from framecap import schema
from framecap.errors import SettingsError, ShardError
from framecap.image_uris import add_allow_flag, allowed_places
from framecap.report.gallery import Shown, add_thumbnails
from framecap.shards import list_input, list_output, open_shard
from framecap.storage import local_copy, write_bytes_atomic

BY = {"image": schema.EMBEDDING_COLUMN, "caption": schema.CAPTION_EMBEDDING_COLUMN}
_BATCH = 8192
_PAGE_BYTES = 8_000_000
_SPARE = 8  # candidates kept for each result asked for: folding may drop most of them


@dataclass(frozen=True)
class SearchOptions:
    """``by``: which embedding is compared, ``image`` or ``caption``; ``top``: how many frames are found.

    ``fold``: frames of one video whose compared embeddings have at least this cosine are one result; above 1 nothing
    is folded. ``image_uri_allow``: where rows may name pictures (by default: where the frame shards are).
    """

    by: str = "image"
    top: int = 20
    fold: float = 0.95
    columns: schema.InputColumns = field(default_factory=schema.InputColumns)
    video_column: str = "video_id"
    image_uri_allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise SettingsError(f"by={self.by!r}; give one of {', '.join(BY)}")
        if self.top < 1:
            raise SettingsError(f"top={self.top} finds nothing; give 1 or more")


@dataclass(frozen=True)
class Match:
    """One frame found: ``score`` is the cosine with the query, ``folded`` how many frames like it are left out."""

    score: float
    frame_id: str
    video_id: str | None
    timestamp_ms: float | None
    caption: str | None
    shard: str
    row: int
    folded: int = 0


@dataclass(frozen=True)
class Found:
    """Matches, best first; rows compared; shards that could not be read, with why."""

    matches: list[Match]
    rows: int
    unreadable: dict[str, str]


@dataclass
class _Candidate:
    score: float
    shard: str
    row: int
    video: object
    embedding: np.ndarray
    values: dict[str, Any]
    folded: int = 0


def search(captions: str, query: np.ndarray, options: SearchOptions | None = None) -> Found:
    """The frames below ``captions`` (the job's OUT) whose embeddings are nearest to ``query`` [D].

    ``query`` is a text embedding by the captioner that made the output; its length does not matter. Scores are
    cosines; embeddings in the shards are L2-normalised float16, so they are exact to 1e-3.

    Raises:
        SettingsError: no caption shards, none with the embedding column, or an embedding of another size.
    """
    options = options or SearchOptions()
    query = (query / np.linalg.norm(query)).astype(np.float32)
    best = _Best(options)
    rows, lacking = 0, 0
    unreadable: dict[str, str] = {}
    shards = list_output(captions)
    for shard in shards:
        try:
            with open_shard(captions, shard) as file:
                if BY[options.by] not in file.schema_arrow.names:
                    lacking += 1
                    continue
                _check_size(file, BY[options.by], len(query), captions)
                for start, batch in _batches(file, options):
                    rows += len(batch)
                    best.add(shard, start, batch, query)
        except (ShardError, pa.ArrowException, OSError) as error:
            unreadable[shard] = str(error)[:300]
    if not shards:
        raise SettingsError(f"{captions} holds no caption shards; give the job's --output-uri")
    if lacking and not rows:
        column = BY[options.by]
        raise SettingsError(
            f"{captions} has no column {column!r} to search; caption it with --{column.replace('_', '-')}"
        )
    return Found(best.matches(), rows, unreadable)


def text_embedding(captioner: str, text: str) -> np.ndarray:
    """The ruCLIP embedding [D] of ``text``, L2-normalised float32, by the encoder of a captioner directory or URI.

    Raises:
        CaptionerError: the encoder has no text tower.
    """
    import torch

    from framecap.model.ruclip import RuClip

    encoder = RuClip.from_pretrained(local_copy(captioner) / "encoder")
    with torch.inference_mode():
        embedding: np.ndarray = encoder.encode_text(encoder.tokenize([text]))[0].float().numpy()
    return embedding / np.linalg.norm(embedding)


class _Best:
    """The best candidates so far, near-identical frames of a video folded."""

    def __init__(self, options: SearchOptions) -> None:
        self._options = options
        self._room = options.top * _SPARE
        self._kept: list[_Candidate] = []

    def add(self, shard: str, start: int, batch: pa.RecordBatch, query: np.ndarray) -> None:
        """Take up the rows of one batch that may be among the best."""
        numbers, embeddings = _matrix(batch.column(BY[self._options.by]))
        scores = embeddings @ query
        floor = self._kept[-1].score if len(self._kept) >= self._room else -np.inf
        promising = np.flatnonzero(scores > floor)
        order = promising[np.argsort(-scores[promising], kind="stable")]
        for place in order[: 4 * self._room]:
            if len(self._kept) >= self._room and scores[place] <= self._kept[-1].score:
                break
            self._take(shard, start, batch, int(numbers[place]), float(scores[place]), embeddings[place])

    def _take(
        self, shard: str, start: int, batch: pa.RecordBatch, row: int, score: float, embedding: np.ndarray
    ) -> None:
        """One candidate: folded into a better one of its video, or in the place of worse ones like it."""
        names = batch.schema.names
        values = {name: batch.column(name)[row].as_py() for name in names if name != BY[self._options.by]}
        video = values.get(self._options.video_column)
        new = _Candidate(score, shard, start + row, video, embedding.copy(), values)
        for kept in self._kept if video is not None else ():
            if kept.video != video or float(kept.embedding @ embedding) < self._options.fold:
                continue
            if kept.score >= score:
                kept.folded += 1
                return
            new.folded += kept.folded + 1
            kept.score = -np.inf
        self._kept = [kept for kept in self._kept if kept.score > -np.inf]
        self._kept.append(new)
        self._kept.sort(key=lambda candidate: (-candidate.score, candidate.shard, candidate.row))
        del self._kept[self._room :]

    def matches(self) -> list[Match]:
        frame_id = self._options.columns.frame_id
        return [
            Match(
                score=round(kept.score, 4),
                frame_id=str(kept.values[frame_id]),
                video_id=None if kept.video is None else str(kept.video),
                timestamp_ms=kept.values.get("timestamp_ms"),
                caption=kept.values.get("caption"),
                shard=kept.shard,
                row=kept.row,
                folded=kept.folded,
            )
            for kept in self._kept[: self._options.top]
        ]


def _batches(file: pq.ParquetFile, options: SearchOptions) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, batch) with the columns that a match shows."""
    wanted = (options.columns.frame_id, options.video_column, "timestamp_ms", "caption", BY[options.by])
    names = [name for name in wanted if name in file.schema_arrow.names]
    if options.columns.frame_id not in names:
        raise ShardError("missing_column", f"no column {options.columns.frame_id!r}")
    start = 0
    for batch in file.iter_batches(_BATCH, columns=names):
        yield start, batch
        start += len(batch)


def _check_size(file: pq.ParquetFile, column: str, size: int, captions: str) -> None:
    kind = file.schema_arrow.field(column).type
    if not pa.types.is_fixed_size_list(kind) or kind.list_size != size:
        raise SettingsError(
            f"{column!r} in {captions} is {kind}, the query's embedding has {size} values; "
            "give the captioner that made the output with --captioner"
        )


def _matrix(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have an embedding: their numbers, and the embeddings as float32 [n, D]."""
    known = column.drop_null()
    values = known.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return np.flatnonzero(~np.asarray(column.is_null())), values.reshape(len(known), column.type.list_size)


def write_page(found: Found, query: str, frames: str, out: str, options: SearchOptions) -> None:
    """One self-contained HTML page with the pictures of the matches, read from the frame shards at ``frames``."""
    root = list_input(frames, "--frames").root
    shown = [Shown(match.shard, match.row, {}, None, match.frame_id) for match in found.matches]
    by_shard = sorted(shown, key=lambda frame: (frame.shard, frame.number))
    allowed = allowed_places(root, options.image_uri_allow)
    add_thumbnails(root, by_shard, options.columns, _PAGE_BYTES, allowed, lambda count: None)
    cells = "".join(_cell(match, frame.thumbnail) for match, frame in zip(found.matches, shown, strict=True))
    title = f"{html.escape(query)} · framecap search"
    page = (
        f'<!doctype html><html lang="ru"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{html.escape(query)}</h1>"
        f"<p>{len(found.matches)} of {found.rows:,} frames</p><main>{cells}</main></html>"
    )
    write_bytes_atomic(out, page.encode())


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:24px;color-scheme:light dark}"
    "main{display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(210px,1fr))}"
    "figure{margin:0}img,.gap{width:100%;aspect-ratio:16/9;object-fit:contain;background:#8883;border-radius:6px}"
    "small{opacity:.7;overflow-wrap:anywhere}"
)


def _cell(match: Match, thumbnail: str | None) -> str:
    picture = f'<img src="{thumbnail}" alt="">' if thumbnail else '<div class="gap"></div>'
    note = " · ".join(_facts(match))
    return (
        f"<figure>{picture}<figcaption>{html.escape(match.caption or '')}<br>"
        f"<small>{html.escape(note)}</small></figcaption></figure>"
    )


def _facts(match: Match) -> list[str]:
    """Score, id, time and the number of frames left out, as page and terminal show them."""
    facts = [f"{match.score:.3f}", match.frame_id]
    if match.timestamp_ms is not None:
        seconds = match.timestamp_ms / 1000
        facts.append(f"{int(seconds // 60)}:{seconds % 60:04.1f}")
    if match.folded:
        facts.append(f"and {match.folded} like it")
    return facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``framecap search``."""
    parser.description = "Rank the frames of an output by the ruCLIP cosine between a query and each frame."
    parser.epilog = "Exit code: 0 done, 2 a place or setting is wrong, 3 some shards could not be read."
    parser.add_argument("captions", metavar="OUT", help="caption shards of the job, made with --image-embedding")
    parser.add_argument("query", metavar="QUERY", help="what to look for, in Russian")
    parser.add_argument("--by", choices=list(BY), default="image", help="the embedding to compare (default: image)")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="frames to find (default: 20)")
    parser.add_argument(
        "--fold", type=float, default=0.95, metavar="COSINE",
        help="frames of a video this similar are one result; above 1: none are (default: 0.95)",
    )  # fmt: skip
    parser.add_argument("--captioner", help="the captioner that made OUT (default: $FRAMECAP_CAPTIONER, else bundled)")
    parser.add_argument("--json", action="store_true", help="one JSON object per frame")
    parser.add_argument("--report", metavar="FILE", help="write a page with the pictures; needs --frames")
    parser.add_argument("--frames", metavar="IN", help="frame shards of the same run, for the pictures")
    parser.add_argument("--id-column", default="frame_id", help="name of the id column (default: frame_id)")
    parser.add_argument("--image-column", default="image", help="name of the image column (default: image)")
    parser.add_argument("--image-uri-column", default="image_uri", help="name of the URI column (default: image_uri)")
    parser.add_argument("--video-column", default="video_id", help="name of the video column (default: video_id)")
    add_allow_flag(parser, "where IN is, its folder or bucket")


def run(args: argparse.Namespace) -> int:
    """``framecap search``; 0, or 3 if shards could not be read."""
    if (args.report is None) != (args.frames is None):
        raise SettingsError("--report needs the pictures of --frames, and --frames is for --report; give both")
    if not args.query.strip():
        raise SettingsError("the query is empty; say what to look for")
    columns = schema.InputColumns(args.id_column, args.image_column, args.image_uri_column)
    options = SearchOptions(args.by, args.top, args.fold, columns, args.video_column, args.image_uri_allow)
    list_output(args.captions)  # a wrong place is told before the encoder is loaded
    from framecap.model.captioner import bundled_captioner  # imports PyTorch: only once the places are right

    captioner = args.captioner or os.environ.get("FRAMECAP_CAPTIONER") or bundled_captioner()
    found = search(args.captions, text_embedding(captioner, args.query), options)
    for match in found.matches:
        line = "  ".join([*_facts(match), match.caption or ""])
        print(json.dumps(asdict(match), ensure_ascii=False) if args.json else line)
    if args.report is not None:
        write_page(found, args.query, args.frames, args.report, options)
        print(f"{args.report}: {len(found.matches)} of {found.rows:,} frames", file=sys.stderr)
    for shard, error in found.unreadable.items():
        print(f"{shard} could not be read: {error}", file=sys.stderr)
    return 3 if found.unreadable else 0
