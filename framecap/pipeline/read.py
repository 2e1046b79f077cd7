"""CPU stage: rows of frame shards → cropped uint8 pixels, one block row per chunk.

Shards are streamed in record batches, so memory follows the chunk and not the shard or its row groups.
A bad frame becomes an error of its row, a bad shard an error of its pieces. Knows nothing of captioners.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import posixpath
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from framecap.errors import FrameError, ShardError
from framecap.image_uris import DEFAULT_RULES, FetchRules, fetch
from framecap.model.decoder_process import shared_decoder
from framecap.model.picture_limits import DEFAULT_LIMITS, PictureLimits
from framecap.model.pictures import Decode
from framecap.model.resample import Pixels
from framecap.pipeline.plan import Chunk, Piece, Range
from framecap.row_batches import read_batches
from framecap.schema import REUSE_ROWS, InputColumns
from framecap.shards import as_shard_error, mark_of
from framecap.storage import join

_READ_ROWS = 32  # frames decoded per record batch: 32 of 200 KB are 6 MB
_READ_BYTES = 32 << 20  # and fewer where they are larger
_RETRY_WAITS = (0.2, 1.0, 3.0, 5.0, 10.0)
_READ_TRIES = 3


@dataclass(frozen=True)
class ReadOptions:
    """How frames are read; ``resolution`` is the captioner's, ``share_identical`` sends equal bytes once."""

    root: str
    columns: InputColumns
    resolution: int
    seed: int
    decode: Decode = "exact"
    limits: PictureLimits = DEFAULT_LIMITS
    fetch: FetchRules = DEFAULT_RULES
    fetch_threads: int = 8
    share_identical: bool = True


@dataclass
class ChunkFrames:
    """Frames of a chunk, row by row, beside their pixels [unique frames, R, R, 3].

    ``slots[i]``: which picture row ``i`` shows, -1 for a row with an entry in ``errors``.
    ``groups[i]``: within which row ``i`` may share a near frame's caption, None for a row that may not.
    ``failed``: shard → ``ShardError`` of pieces that could not be read; those pieces have no rows.
    """

    pieces: Chunk
    slots: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of each unique picture
    errors: dict[int, str] = field(default_factory=dict)
    groups: list[str | None] = field(default_factory=list)
    failed: dict[str, ShardError] = field(default_factory=dict)
    read_s: float = 0.0
    decode_s: float = 0.0

    def rows(self) -> int:
        return len(self.slots)


CHUNK_SCHEMA = pa.schema([("chunk", pa.binary()), ("pixels", pa.large_binary())])


def read_units(block: pa.Table, options: ReadOptions) -> Iterator[pa.Table]:
    """Block of pickled units → one single-row table per chunk (``CHUNK_SCHEMA``), in order."""
    for unit in block.column("unit"):
        for frames, pixels in read_chunks(pickle.loads(unit.as_py()), options):
            yield pa.Table.from_arrays(
                [
                    pa.array([pickle.dumps(frames)], pa.binary()),
                    pa.Array.from_buffers(
                        pa.large_binary(),
                        1,
                        [None, pa.py_buffer(np.array([0, pixels.nbytes], np.int64)), pa.py_buffer(pixels)],
                    ),
                ],
                schema=CHUNK_SCHEMA,
            )


def read_chunks(unit: tuple[Chunk, ...], options: ReadOptions) -> Iterator[tuple[ChunkFrames, Pixels]]:
    """Read and transform the chunks of one unit; a shard stays open over its successive pieces."""
    stream = _ShardStream(options)
    with ThreadPoolExecutor(options.fetch_threads) as fetchers:
        for pieces in unit:
            builder = _ChunkBuilder(pieces, options, fetchers)
            for shard, own in itertools.groupby(pieces, key=lambda piece: piece.shard):
                before = builder.checkpoint()
                error = next((e for piece in own if (e := _read_piece(stream, piece, builder)) is not None), None)
                if error is not None:  # all of a shard's pieces or none: what is failed has no rows
                    builder.rewind(before)
                    builder.frames.failed[shard] = error
            yield builder.finish()
    stream.close()


def _read_piece(stream: _ShardStream, piece: Piece, builder: _ChunkBuilder) -> ShardError | None:
    """Add the rows of a piece; after three tries in vain the error, and no row added."""
    before = builder.checkpoint()
    for attempt in range(_READ_TRIES):
        try:
            position = piece.start
            for batch in stream.rows(piece):
                builder.add(batch, piece, position)
                position += len(batch)
            return None
        except Exception as error:  # whatever a page holds is that shard's error
            builder.rewind(before)
            stream.close()
            final = as_shard_error(error)
            lasting = isinstance(error, ShardError) and error.kind in ("changed", "too_large")
            if attempt == _READ_TRIES - 1 or lasting:
                break
            time.sleep(_RETRY_WAITS[attempt])
    return final


class _ShardStream:
    """Successive ranges of shards as record batches; reads forward, and reopens only to go back."""

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._shard: str | None = None
        self._batches: Iterator[tuple[int, pa.RecordBatch]] = iter(())
        self._held: tuple[int, pa.RecordBatch] | None = None

    def close(self) -> None:
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._shard, self._held, self._batches = None, None, iter(())

    def rows(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """The rows [start, stop) of a piece, in order. Raises ``ShardError`` if there are fewer."""
        self._seek(piece)
        position = piece.start
        while position < piece.stop:
            held = self._held or next(self._batches, None)
            if held is None:
                raise ShardError("unreadable", f"rows end at {position}, the footer promised {piece.stop}")
            offset, batch = held
            end = offset + len(batch)
            self._held = held if end > piece.stop else None
            if end > position:
                yield batch.slice(position - offset, min(end, piece.stop) - position)
                position = min(end, piece.stop)

    def _seek(self, piece: Piece) -> None:
        start = self._held[0] if self._held is not None else None
        if self._shard == piece.shard and (start is None or start <= piece.start):
            return
        self.close()
        uri = join(self._options.root, piece.shard)
        if mark_of(uri) != piece.signature:
            raise ShardError("changed", "the file was replaced while the run was under way; run again")
        self._shard = piece.shard
        self._batches = read_batches(
            self._options.root, piece.shard, self._options.columns.read, piece.start, _READ_ROWS, _READ_BYTES
        )


class _ChunkBuilder:
    """Collects the rows of one chunk; equal bytes are decoded and carried once."""

    def __init__(self, pieces: Chunk, options: ReadOptions, fetchers: ThreadPoolExecutor) -> None:
        self.frames = ChunkFrames(pieces)
        self._options, self._fetchers = options, fetchers
        self._decoder = shared_decoder(options.limits)
        size = options.resolution
        rows = sum(piece.stop - piece.start for piece in pieces)
        self._pixels: Pixels = np.empty((rows, size, size, 3), np.uint8)
        self._known: dict[bytes, int | str] = {}
        self._block = ""
        self._started = time.perf_counter()

    def checkpoint(self) -> tuple[int, int]:
        return len(self.frames.slots), len(self.frames.digests)

    def rewind(self, before: tuple[int, int]) -> None:
        """Forget the rows of a piece that turned out unreadable half-way."""
        rows, pictures = before
        frames = self.frames
        del frames.slots[rows:], frames.seeds[rows:], frames.groups[rows:], frames.digests[pictures:]
        frames.errors = {row: text for row, text in frames.errors.items() if row < rows}
        self._known = {d: slot for d, slot in self._known.items() if isinstance(slot, str) or slot < pictures}

    def add(self, batch: pa.RecordBatch, piece: Piece, first: int) -> None:
        """Rows of ``piece``, of which the first is row ``first`` of its shard."""
        columns, frames = self._options.columns, self.frames
        identities = batch.column(columns.frame_id).to_pylist()
        videos = batch.column(columns.video).to_pylist() if columns.video is not None else [None] * len(batch)
        for position, data in enumerate(self._encoded(batch, piece.shard)):
            row = len(frames.slots)
            identity = identities[position]
            named = identity if identity is not None else f"{piece.shard}#{first + position}"
            frames.seeds.append(seed_of(named, self._options.seed))
            frames.groups.append(self._group(piece, first + position, videos[position]))
            slot = data if isinstance(data, FrameError) else self._slot(data)
            if isinstance(slot, int):
                frames.slots.append(slot)
            else:
                frames.slots.append(-1)
                frames.errors[row] = str(slot)

    def _group(self, piece: Piece, row: int, video: object) -> str | None:
        """Frames share only within the ``REUSE_ROWS`` rows of a block, which are always captioned together: what
        a row gets then follows from its shard alone, not from how the run was cut (in fp16 the last bits of a
        cosine depend on the batch, so one that equals the threshold to within those may fall either way). Rows
        taken up again (``piece.basis``) get captions of their own."""
        if self._options.columns.video is None:
            return None
        block = f"{piece.shard}#{row // REUSE_ROWS}"
        if block != self._block:
            self._block = block
            self._known.clear()
        return None if video is None or piece.basis else f"{block}#{video}"

    def _slot(self, data: bytes) -> int | FrameError | str:
        digest = hashlib.sha256(data).digest()
        known = self._known.get(digest) if self._options.share_identical else None
        if known is not None:
            return known
        begun = time.perf_counter()
        slot = len(self.frames.digests)
        try:
            self._pixels[slot] = self._decoder.crop_and_resize(data, self._options.resolution, self._options.decode)
        except FrameError as error:
            self._known[digest] = str(error)
            return error.with_traceback(None)  # which would keep the whole batch alive
        finally:
            self.frames.decode_s += time.perf_counter() - begun
        self._known[digest] = slot
        self.frames.digests.append(digest)
        return slot

    def _encoded(self, batch: pa.RecordBatch, shard: str) -> Iterator[bytes | FrameError]:
        """The encoded picture of each row: the image column, else what its URI leads to."""
        names, columns = batch.schema.names, self._options.columns
        images: list[Any] = [None] * len(batch)
        uris: list[str | None] = [None] * len(batch)
        if columns.image in names:
            for row, value in enumerate(batch.column(columns.image).to_pylist()):
                images[row] = value.get("bytes") if isinstance(value, dict) else value
                uris[row] = value.get("path") if isinstance(value, dict) else None
        if columns.image_uri in names:
            uris = [given or own for given, own in zip(batch.column(columns.image_uri).to_pylist(), uris, strict=True)]
        folder = posixpath.dirname(join(self._options.root, shard))
        fetched = {
            row: self._fetchers.submit(fetch, uri, folder, rules=self._options.fetch)
            for row, uri in enumerate(uris)
            if images[row] is None and uri
        }
        for row, image in enumerate(images):
            if row in fetched:
                yield fetched[row].result()
            else:
                yield image if image is not None else FrameError("missing", "the image is null")

    def finish(self) -> tuple[ChunkFrames, Pixels]:
        self.frames.read_s = time.perf_counter() - self._started - self.frames.decode_s
        return self.frames, self._pixels[: len(self.frames.digests)]


def seed_of(identity: object, seed: int) -> int:
    """A frame's own 63-bit sampling seed: it follows from the frame's id, not from its place in a batch."""
    digest = hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


__all__ = ["ChunkFrames", "Range", "ReadOptions", "fetch", "read_chunks", "read_units"]
