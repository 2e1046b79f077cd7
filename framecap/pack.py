"""``framecap pack``: images, folders and video files → frame shards that the caption job reads.

Order and ids are determined by the sources alone: the same sources give the same shards, byte for byte of
their columns. What cannot be read is listed and the rest goes on. Knows nothing of captions.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from framecap.errors import FrameError, SettingsError
from framecap.image_uris import read_regular
from framecap.model.decoder_process import shared_decoder
from framecap.pack_sources import Source, list_sources
from framecap.storage import atomic_path, backend_errors, is_local, join, open_fs, read_bytes
from framecap.video import SELECTIONS, Selection, read_video

FRAME_SHARD_SCHEMA = pa.schema(
    [
        ("frame_id", pa.string()),
        ("video_id", pa.string()),
        ("frame_index", pa.int32()),
        ("timestamp_ms", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),
    ]
)
_LEFT_OVER = re.compile(r"\.(frames-\d{5,}\.parquet|framecap)\.[0-9a-f]{32}\.tmp")
_SHARD_NAME = re.compile(r"frames-\d{5,}\.parquet")
_ROW_GROUP_BYTES = 16 * 1024 * 1024
_READ_AHEAD = 16


@dataclass(frozen=True)
class PackOptions:
    """How sources become shards: which video frames, their JPEG quality, the size of a shard in MB, and whether links
    may lead out of a folder."""

    selection: Selection = field(default_factory=Selection)
    quality: int = 90
    shard_mb: float = 256
    overwrite: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise SettingsError(f"quality={self.quality} is outside 1…100; 90 is a good value")
        if not self.shard_mb > 0:
            raise SettingsError(f"shard size {self.shard_mb} MB is impossible; 256 is a good value")


@dataclass(frozen=True)
class Unreadable:
    """A source that gave no frames, or fewer than it should."""

    uri: str
    error: str


@dataclass(frozen=True)
class PackResult:
    """What was written: frames, shards (URIs), and what could not be read."""

    frames: int
    shards: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]


Row = dict[str, str | int | bytes | None]


def pack(
    sources: Sequence[str], out: str, options: PackOptions | None = None, progress: bool | None = None
) -> PackResult:
    """Write the frames of ``sources`` (images, videos, folders of them, recursively) as shards under ``out``.

    An image's id is its path below its folder; a video frame's is ``<video>/<frame_index:06d>``. Images are
    stored as they are, video frames as JPEG. ``progress`` shows a bar; by default on a terminal only.

    Raises:
        SettingsError: no source, two sources of one name, or ``out`` already holds shards.
        StorageError: ``out`` has a scheme without a backend.
    """
    options = options or PackOptions()
    found, lost = list_sources(sources, options.follow_links)
    with backend_errors(out):
        _clear(out, options.overwrite)
    unreadable = [Unreadable(entry.uri, entry.error) for entry in lost]
    silent = not (sys.stderr.isatty() if progress is None else progress)
    writer = ShardWriter(out, int(options.shard_mb * 1_000_000))
    with writer, tqdm(found, unit="file", disable=silent, desc="pack", miniters=0) as bar:
        for source, rows in _read_ahead(bar, options):
            try:
                for row in rows:
                    writer.add(row)
                    if source.is_video and not silent:  # a film takes minutes: its frames show that it moves
                        bar.set_postfix(frames=writer.frames, unreadable=len(unreadable), refresh=False)
                        bar.update(0)
            except FrameError as error:
                unreadable.append(Unreadable(source.uri, str(error)))
            bar.set_postfix(frames=writer.frames, unreadable=len(unreadable), refresh=False)
    return PackResult(writer.frames, tuple(writer.shards), tuple(unreadable))


def _clear(out: str, overwrite: bool) -> None:
    """Make sure that ``out`` can be written and holds no shard; what a killed pack left half-written goes."""
    fs, path = open_fs(out)
    if fs.isfile(path):
        raise SettingsError(f"--out {out} is a file; give a folder")
    if is_local(out):
        try:
            fs.makedirs(path, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from error
    files = fs.find(path) if fs.exists(path) else []
    shards = [file for file in files if file.endswith(".parquet")]
    if shards and not overwrite:
        raise SettingsError(
            f"{out} already holds {len(shards)} shard(s) of an earlier pack, which may have been broken off; "
            "--overwrite packs anew, or choose an empty folder"
        )
    foreign = [file for file in shards if not _SHARD_NAME.fullmatch(PurePosixPath(file).name)]
    if foreign:
        raise SettingsError(
            f"{foreign[0]} was not written by pack; --overwrite would mix with it: choose another folder"
        )
    for file in shards + [file for file in files if _LEFT_OVER.fullmatch(PurePosixPath(file).name)]:
        fs.rm_file(file)


def _read_ahead(sources: Iterable[Source], options: PackOptions) -> Iterator[tuple[Source, Iterable[Row]]]:
    """Each source with its rows; images are read by threads a few ahead, since they wait for storage."""
    with ThreadPoolExecutor(_READ_AHEAD, "pack") as threads:
        waiting: deque[tuple[Source, Future[Row] | None]] = deque()
        for source in sources:
            waiting.append((source, None if source.is_video else threads.submit(_image_row, source)))
            if len(waiting) > _READ_AHEAD:
                yield _opened(*waiting.popleft(), options)
        while waiting:
            yield _opened(*waiting.popleft(), options)


def _opened(source: Source, image: Future[Row] | None, options: PackOptions) -> tuple[Source, Iterable[Row]]:
    return source, _video_rows(source, options) if image is None else (pending.result() for pending in [image])


def _image_row(source: Source) -> Row:
    decoder = shared_decoder()
    try:
        if is_local(source.uri):  # the operator named it, or the folder that it is in: links have been judged
            data = read_regular(os.path.realpath(open_fs(source.uri)[1]), decoder.limits.max_bytes)
        else:
            data = read_bytes(source.uri)
    except OSError as error:
        raise FrameError("missing", f"the file cannot be read: {error}") from error
    size = decoder.size(data)
    return _row(source.name, source.video_id, source.position, None, size, data)


def _video_rows(source: Source, options: PackOptions) -> Iterator[Row]:
    fs, path = open_fs(source.uri)
    try:
        file = fs.open(path, "rb")
    except OSError as error:
        raise FrameError("missing", f"the file cannot be read: {error}") from error
    with file:
        for frame in read_video(file, options.selection):
            data = io.BytesIO()
            frame.picture.save(data, "JPEG", quality=options.quality)
            yield _row(
                f"{source.name}/{frame.index:06d}",
                source.video_id,
                frame.index,
                frame.timestamp_ms,
                frame.picture.size,
                data.getvalue(),
            )


def _row(
    frame_id: str, video_id: str, index: int, timestamp_ms: int | None, size: tuple[int, int], image: bytes
) -> Row:
    values = (frame_id, video_id, index, timestamp_ms, *size, image)
    return dict(zip(FRAME_SHARD_SCHEMA.names, values, strict=True))


class ShardWriter:
    """Writes rows to ``frames-00000.parquet``, … under ``out``; a shard appears whole or not at all."""

    def __init__(self, out: str, shard_bytes: int) -> None:
        self._out = out
        self._shard_bytes = shard_bytes
        self._rows: list[Row] = []
        self._row_bytes = 0
        self._written_bytes = 0
        self._file: Any = None
        self._parquet: pq.ParquetWriter | None = None
        self.frames = 0
        self.shards: list[str] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end_shard()
        elif self._parquet is not None:
            self._parquet.close()
            self._file.close()

    def add(self, row: Row) -> None:
        """Take one row; a row group or shard that is full is written at once."""
        self._rows.append(row)
        self._row_bytes += len(cast(bytes, row["image"]))
        self.frames += 1
        if self._row_bytes >= _ROW_GROUP_BYTES:
            self._end_group()
        if self._written_bytes + self._row_bytes >= self._shard_bytes:
            self._end_shard()

    def _end_group(self) -> None:
        if not self._rows:
            return
        if self._parquet is None:
            self._file = tempfile.NamedTemporaryFile(suffix=".parquet")  # noqa: SIM115 (closed in _end_shard)
            # Images are compressed already; zstd would cost time and save nothing on them.
            codecs = {name: "none" if name == "image" else "zstd" for name in FRAME_SHARD_SCHEMA.names}
            self._parquet = pq.ParquetWriter(self._file, FRAME_SHARD_SCHEMA, compression=codecs)
        self._parquet.write_table(pa.Table.from_pylist(self._rows, FRAME_SHARD_SCHEMA))
        self._written_bytes += self._row_bytes
        self._rows, self._row_bytes = [], 0

    def _end_shard(self) -> None:
        self._end_group()
        if self._parquet is None:
            return
        self._parquet.close()
        self._file.flush()
        uri = join(self._out, f"frames-{len(self.shards):05d}.parquet")
        fs, path = open_fs(uri)
        with atomic_path(fs, path) as target:
            fs.put_file(self._file.name, target)
        self._file.close()
        self._parquet, self._written_bytes = None, 0
        self.shards.append(uri)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``framecap pack``."""
    parser.fromfile_prefix_chars = "@"
    parser.description = "Images, folders of them, and video files become frame shards (Parquet)."
    parser.epilog = "Exit code: 0 all packed, 2 a place or setting is wrong, 3 some files could not be read (listed)."
    parser.add_argument("sources", nargs="+", metavar="SRC", help="image, video, folder (recursive), or @FILE of such")
    parser.add_argument("--out", required=True, metavar="URI", help="folder for the shards")
    parser.add_argument(
        "--select", choices=SELECTIONS, default="every", help="which frames of a video (default: every)"
    )
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="for --select every (default: 1)")
    parser.add_argument(
        "--scene-threshold",
        type=float,
        default=0.3,
        metavar="T",
        help="for --select scene: 0 to 1 (default: 0.3)",
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of video frames (default: 90)")
    parser.add_argument("--shard-mb", type=float, default=256, help="size of a shard in MB (default: 256)")
    parser.add_argument("--follow-links", action="store_true", help="follow links that lead out of a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards an earlier pack left in OUT")


def run(args: argparse.Namespace) -> int:
    """``framecap pack``; 0, or 3 if something could not be read."""
    selection = Selection(args.select, args.every, args.scene_threshold)
    options = PackOptions(selection, args.quality, args.shard_mb, args.overwrite, args.follow_links)
    result = pack(args.sources, args.out, options)
    count = len(result.shards)
    print(f"{result.frames:,} frames in {count:,} {'shard' if count == 1 else 'shards'} under {args.out}")
    if not result.unreadable:
        return 0
    print(f"could not be read to the end ({len(result.unreadable):,}):", file=sys.stderr)
    for entry in result.unreadable:
        print(f"  {entry.uri}: {entry.error}", file=sys.stderr)
    return 3
