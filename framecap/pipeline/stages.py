"""GPU stage: a pool of actors, each with one captioner, turns chunks of pixels into fragments.

An actor works on several chunks at once, which share the slots of its decoding loop (``framecap.model.shared``); how
a chunk is captioned says ``chunk.py``. Knows nothing of reading or publishing shards.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter as Tally

import numpy as np
import pyarrow as pa
import torch
from ray.util.metrics import Counter, Gauge, Histogram

from framecap.errors import ShardError
from framecap.model.captioner import Captioner
from framecap.model.images import Pixels
from framecap.model.shared import Seconds, SharedCaptioner
from framecap.pipeline.chunk import Captioned, ChunkCaptioner
from framecap.pipeline.fragments import write_fragment
from framecap.pipeline.plan import Chunk
from framecap.pipeline.read import ChunkFrames
from framecap.pipeline.records import ActorOptions, ChunkRecord
from framecap.schema import CAPTION_EMBEDDING_COLUMN, EMBEDDING_COLUMN, QUERY_COLUMN, ExtraColumns, caption_schema
from framecap.stores import failure_kind

RECORD_SCHEMA = pa.schema([("record", pa.binary())])


class CaptionActor:
    """One captioner on one device; called by Ray Data with blocks of chunks, by several threads at once."""

    def __init__(self, options: ActorOptions, captioner: Captioner) -> None:
        self._options = options
        self._size = captioner.resolution
        shared = SharedCaptioner(captioner, options.decode, options.similarity)
        self._captioner = ChunkCaptioner(shared, options)
        self._metrics = _Metrics()

    @classmethod
    def from_options(cls, options: ActorOptions) -> CaptionActor:
        """The actor with the captioner that ``options`` name."""
        torch.set_num_threads(options.threads)
        captioner = Captioner.from_pretrained(options.captioner, options.device, options.dtype, options.manifest)
        return cls(options, captioner)

    def __call__(self, block: pa.Table) -> pa.Table:
        """``CHUNK_SCHEMA`` → ``RECORD_SCHEMA``: one record per chunk."""
        records = []
        for chunk, pixels in zip(block.column("chunk"), block.column("pixels"), strict=True):
            frames: ChunkFrames = pickle.loads(chunk.as_py())
            array = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(-1, self._size, self._size, 3)
            records.append(pickle.dumps(self._caption_chunk(frames, array)))
        return pa.table([pa.array(records, pa.binary())], schema=RECORD_SCHEMA)

    def _caption_chunk(self, frames: ChunkFrames, pixels: Pixels) -> ChunkRecord:
        seconds: Seconds = {"wait": 0.0, "encode": 0.0, "generate": 0.0}
        captioned = self._captioner.caption(frames, pixels, seconds)
        captions, reused = captioned.captions, captioned.reused
        written_from = time.perf_counter()
        pieces = tuple(piece for piece in frames.pieces if piece.shard not in frames.failed)
        name, failed = "", frames.failed
        if pieces:
            table = captions_table(captioned, self._options.extra)
            try:
                name = write_fragment(self._options.folder, pieces, self._options.fingerprint, table)
            except OSError as error:  # these rows are lost to this run; the others, and other shards, go on
                failed = failed | {
                    p.shard: ShardError(failure_kind(error, "unwritable"), str(error)[:300]) for p in pieces
                }
                pieces, captions, reused = (), [], []
        record = ChunkRecord(
            fragment=name,
            pieces=pieces,
            failed=failed,
            statuses=dict(Tally(caption.status for caption in captions)),
            retried=dict(Tally(c.status for c, again in zip(captions, _are_retried(pieces), strict=True) if again)),
            error_kinds=dict(Tally(c.error.partition(":")[0] for c in captions if c.error)),
            reused=sum(mark is not None for mark in reused),
            tokens=sum(caption.tokens for caption, mark in zip(captions, reused, strict=True) if mark is None),
            seconds={
                "read": frames.read_s,
                "decode": frames.decode_s,
                **seconds,
                "write": time.perf_counter() - written_from,
            },
        )
        self._metrics.observe(record, frames.rows() / self._options.batch_size)
        return record


def _are_retried(pieces: Chunk) -> list[bool]:
    """For each row of ``pieces`` whether it failed in an earlier run."""
    return [bool(piece.basis) for piece in pieces for _ in range(piece.start, piece.stop)]


def captions_table(captioned: Captioned, extra: ExtraColumns) -> pa.Table:
    """Captions as the columns of ``caption_schema``."""
    captions = captioned.captions
    schema = caption_schema(extra)
    failed = [caption.status == "error" for caption in captions]
    columns: dict[str, list[object]] = {
        "caption": [None if bad else c.text for c, bad in zip(captions, failed, strict=True)],
        "caption_status": [c.status for c in captions],
        "caption_error": [c.error for c in captions],
        "caption_logprob": [c.logprob for c in captions],
        "caption_min_logprob": [c.min_logprob for c in captions],
        "caption_tokens": [None if bad else c.tokens for c, bad in zip(captions, failed, strict=True)],
        "caption_similarity": [c.similarity for c in captions],
        "caption_reused": list(captioned.reused),
        EMBEDDING_COLUMN: list(captioned.embeddings),
        CAPTION_EMBEDDING_COLUMN: list(captioned.caption_embeddings),
        QUERY_COLUMN: list(captioned.cosines),
    }
    if extra.candidates:
        columns["caption_candidates"] = [list(c.candidates) or None for c in captions]
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)


class _Metrics:
    """Ray metrics of an actor; the README says what each means."""

    def __init__(self) -> None:
        self._frames = Counter("framecap_frames", "Frames by status", ("status",))
        self._reused = Counter("framecap_frames_reused", "Frames that share another frame's caption")
        self._tokens = Counter("framecap_tokens", "Tokens generated")
        self._seconds = Counter("framecap_stage_seconds", "Seconds spent by stage", ("stage",))
        self._fill = Histogram("framecap_batch_fill", "Rows of a chunk by batch size", [0.25, 0.5, 0.75, 0.9, 1.0])
        self._memory = Gauge("framecap_gpu_memory_bytes", "Peak memory of the captioner on the GPU")

    def observe(self, record: ChunkRecord, fill: float) -> None:
        for status, count in record.statuses.items():
            self._frames.inc(count, {"status": status})
        for stage, seconds in record.seconds.items():
            if seconds > 0:
                self._seconds.inc(seconds, {"stage": stage})
        if record.reused:
            self._reused.inc(record.reused)
        if record.tokens:
            self._tokens.inc(record.tokens)
        self._fill.observe(fill)
        if torch.cuda.is_available():
            self._memory.set(torch.cuda.max_memory_allocated())
