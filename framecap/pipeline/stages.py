"""GPU stage: a pool of actors, each with one captioner, turns chunks of pixels into fragments.

A batch that does not fit the memory is halved and tried again; a frame that breaks a batch is found by
halving and becomes an error row. Knows nothing of reading or publishing shards.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from ray.util.metrics import Counter, Gauge, Histogram

from framecap.errors import FrameError, ShardError
from framecap.model.captioner import DECIMALS, Caption, Captioner
from framecap.model.images import Pixels
from framecap.model.ruclip import ImageFeatures
from framecap.pipeline.fragments import write_fragment
from framecap.pipeline.plan import Chunk
from framecap.pipeline.read import ChunkFrames
from framecap.pipeline.records import ActorOptions, ChunkRecord
from framecap.schema import EMBEDDING_COLUMN, REUSED_IDENTICAL, REUSED_SIMILAR, caption_schema

log = logging.getLogger(__name__)
_REMEMBERED = 20_000  # captions an actor keeps for frames with the same bytes
_T = TypeVar("_T")
RECORD_SCHEMA = pa.schema([("record", pa.binary())])


class _Captioned(NamedTuple):
    """Row by row: the caption, why it was not made for this row if it was not, float16 [D] of the frame."""

    captions: list[Caption]
    reused: list[str | None]
    embeddings: list[np.ndarray | None]


class CaptionActor:
    """One captioner on one device; called by Ray Data with blocks of chunks."""

    def __init__(self, options: ActorOptions) -> None:
        self._options = options
        torch.set_num_threads(options.threads)
        self._captioner = Captioner.from_pretrained(options.captioner, options.device, options.dtype)
        self._remembered: OrderedDict[bytes, Caption] = OrderedDict()
        self._rows = options.batch_size
        self._metrics = _Metrics()
        self._idle_since = time.perf_counter()

    def __call__(self, block: pa.Table) -> pa.Table:
        """``CHUNK_SCHEMA`` → ``RECORD_SCHEMA``: one record per chunk."""
        records = []
        for chunk, pixels in zip(block.column("chunk"), block.column("pixels"), strict=True):
            frames: ChunkFrames = pickle.loads(chunk.as_py())
            size = self._captioner.resolution
            array = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(-1, size, size, 3)
            records.append(pickle.dumps(self._caption_chunk(frames, array)))
        return pa.table([pa.array(records, pa.binary())], schema=RECORD_SCHEMA)

    def _caption_chunk(self, frames: ChunkFrames, pixels: Pixels) -> ChunkRecord:
        begun, encoded_before = time.perf_counter(), self._captioner.encode_seconds
        waited = begun - self._idle_since
        captions, reused, embeddings = self._captions(frames, pixels)
        captioned, encode = time.perf_counter(), self._captioner.encode_seconds - encoded_before
        pieces = tuple(piece for piece in frames.pieces if piece.shard not in frames.failed)
        name, failed = "", frames.failed
        if pieces:
            table = captions_table(captions, reused, self._options, embeddings)
            try:
                name = write_fragment(self._options.folder, pieces, self._options.fingerprint, table)
            except OSError as error:  # these rows are lost to this run; the others, and other shards, go on
                failed = failed | {p.shard: ShardError("unwritable", str(error)[:300]) for p in pieces}
                pieces, captions, reused = (), [], []
        self._idle_since = time.perf_counter()
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
                "wait": waited,
                "encode": encode,
                "generate": captioned - begun - encode,
                "write": self._idle_since - captioned,
            },
        )
        self._metrics.observe(record, frames.rows() / self._options.batch_size)
        return record

    def _captions(self, frames: ChunkFrames, pixels: Pixels) -> _Captioned:
        first_row: dict[int, int] = {}
        for row, slot in enumerate(frames.slots):
            if slot >= 0:
                first_row.setdefault(slot, row)
        threshold, embeds = self._options.reuse_similarity, self._options.embedding_size is not None
        made = self._known(frames, first_row) if threshold is None else {}
        marks = dict.fromkeys(made, REUSED_IDENTICAL)
        encoded = self._encode(pixels, [slot for slot in first_row if embeds or slot not in made])
        features = {slot: found for slot, found in encoded.items() if isinstance(found, ImageFeatures)}
        made = {slot: found for slot, found in encoded.items() if isinstance(found, Caption)} | made
        embeddings = _unit(features) if embeds or threshold is not None else {}
        followers: dict[int, int] = {}
        if threshold is not None:
            encoded_rows = {slot: first_row[slot] for slot in features}
            followers = similar_frames(frames, encoded_rows, embeddings, threshold)

        def ask(slots: list[int]) -> None:
            seeds = {slot: frames.seeds[first_row[slot]] for slot in slots}
            answers = self._caption(features, seeds)
            made.update(answers)
            self._remember(frames, answers)

        ask([slot for slot in features if slot not in made and slot not in followers])
        # What broke one frame need not break those near it.
        left_alone = {slot for slot, leader in followers.items() if made[leader].status == "error"}
        ask(sorted(left_alone))
        followers = {slot: leader for slot, leader in followers.items() if slot not in left_alone}
        if followers:
            made.update(self._shared(followers, made, embeddings))
        marks.update(dict.fromkeys(followers, REUSED_SIMILAR))
        return _Captioned(
            [
                made[slot] if slot >= 0 else Caption("", status="error", error=frames.errors[row])
                for row, slot in enumerate(frames.slots)
            ],
            [
                None if slot < 0 else marks.get(slot) or (REUSED_IDENTICAL if first_row[slot] != row else None)
                for row, slot in enumerate(frames.slots)
            ],
            [embeddings[slot].astype(np.float16) if slot in embeddings else None for slot in frames.slots],
        )

    def _known(self, frames: ChunkFrames, slots: Iterable[int]) -> dict[int, Caption]:
        """Captions of frames with the same bytes, made before."""
        known = {}
        if self._options.share_identical:
            for slot in slots:
                if (caption := self._remembered.get(frames.digests[slot])) is not None:
                    known[slot] = caption
                    self._remembered.move_to_end(frames.digests[slot])
        return known

    def _remember(self, frames: ChunkFrames, captions: Mapping[int, Caption]) -> None:
        if not self._options.share_identical or self._options.reuse_similarity is not None:
            return
        for slot, caption in captions.items():
            if caption.status != "error":
                self._remembered[frames.digests[slot]] = caption
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    def _encode(self, pixels: Pixels, slots: list[int]) -> dict[int, ImageFeatures | Caption]:
        """Features of each of ``slots``, N = 1; an error caption for one that cannot be encoded."""

        def work(part: list[int]) -> list[ImageFeatures]:
            chosen = pixels if len(part) == len(pixels) else pixels[part]  # the rule, and saves a copy
            return self._captioner.features(chosen).split()

        return self._halve(slots, work)

    def _caption(self, features: Mapping[int, ImageFeatures], seeds: Mapping[int, int]) -> dict[int, Caption]:
        """Captions of the slots that have a seed, from their features."""

        def work(slots: list[int]) -> list[Caption]:
            joined = ImageFeatures.join([features[slot] for slot in slots])
            options = self._options
            own = [seeds[slot] for slot in slots]
            return self._captioner.caption_features(joined, options.decode, own, options.similarity)

        return self._halve(list(seeds), work)

    def _shared(
        self, followers: dict[int, int], made: dict[int, Caption], embeddings: Mapping[int, np.ndarray]
    ) -> dict[int, Caption]:
        """The caption of each follower's leader, with the follower's own similarity to it."""
        if not (self._options.similarity and self._captioner.encoder.has_text):
            return {slot: made[leader] for slot, leader in followers.items()}

        def work(slots: list[int]) -> list[Caption]:
            captions = [made[followers[slot]] for slot in slots]
            texts = self._captioner.embed_texts([caption.text for caption in captions])
            cosines = (np.stack([embeddings[slot] for slot in slots]) * texts).sum(axis=1).tolist()
            return [
                replace(caption, similarity=round(cosine, DECIMALS))
                for caption, cosine in zip(captions, cosines, strict=True)
            ]

        return self._halve(list(followers), work)

    def _halve(self, slots: list[int], work: Callable[[list[int]], Sequence[_T]]) -> dict[int, _T | Caption]:
        """What ``work`` gives for each slot, a batch at a time; whatever breaks a batch costs only the frame that
        did it, which gets an error caption."""
        found: list[_T | Caption] = []
        while len(found) < len(slots):
            found += self._attempt(slots[len(found) : len(found) + self._rows], work)
        return dict(zip(slots, found, strict=True))

    def _attempt(self, slots: list[int], work: Callable[[list[int]], Sequence[_T]]) -> list[_T | Caption]:
        try:
            return list(work(slots))
        except Exception as error:  # halved until the frame at fault stands alone
            if _is_device_lost(error):
                # An exception would end the whole run; a dead actor costs its batch and is replaced.
                log.error("this GPU answers no more (%s); the actor gives way to a new one", error)
                logging.shutdown()
                os._exit(1)
            out_of_memory = _is_out_of_memory(error)
            log.warning("a batch of %d failed (%s); halving it", len(slots), error)
            if len(slots) == 1:
                cause = "out of memory" if out_of_memory else type(error).__name__
                return [Caption.failed(FrameError("model", f"{cause}: {str(error)[:200]}"))]
        middle = len(slots) // 2
        if out_of_memory:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._rows = max(1, min(self._rows, middle))
        return self._attempt(slots[:middle], work) + self._attempt(slots[middle:], work)


def _unit(features: Mapping[int, ImageFeatures]) -> dict[int, np.ndarray]:
    """L2-normalised float32 [D] of each slot."""
    if not features:
        return {}
    pooled = ImageFeatures.join(list(features.values())).pooled.float()
    return dict(zip(features, torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy(), strict=True))


def _are_retried(pieces: Chunk) -> list[bool]:
    """For each row of ``pieces`` whether it failed in an earlier run."""
    return [bool(piece.basis) for piece in pieces for _ in range(piece.start, piece.stop)]


def similar_frames(
    frames: ChunkFrames, first_row: dict[int, int], embeddings: Mapping[int, np.ndarray], threshold: float
) -> dict[int, int]:
    """slot → the slot whose caption it may share: the last frame of its group that gets one of its own.

    ``first_row``: slot → row; ``embeddings``: slot → float32 [D], L2-normalised.
    """
    followers: dict[int, int] = {}
    leaders: dict[str, int] = {}
    for slot, row in sorted(first_row.items(), key=lambda item: item[1]):
        group = frames.groups[row]
        if group is None:
            continue
        leader = leaders.get(group)
        if leader is not None and float(embeddings[slot] @ embeddings[leader]) >= threshold:
            followers[slot] = leader
        else:
            leaders[group] = slot
    return followers


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()


def _is_device_lost(error: Exception) -> bool:
    """After such an error no call on this device succeeds: the actor must go, not the frames."""
    return "CUDA error" in str(error) and not _is_out_of_memory(error)


def captions_table(
    captions: Sequence[Caption],
    reused: Sequence[str | None],
    options: ActorOptions,
    embeddings: Sequence[np.ndarray | None] = (),
) -> pa.Table:
    """Captions as the columns of ``caption_schema``."""
    candidates = options.decode.num_return_sequences > 1
    schema = caption_schema(candidates, options.embedding_size)
    failed = [caption.status == "error" for caption in captions]
    columns: dict[str, list[object]] = {
        "caption": [None if bad else c.text for c, bad in zip(captions, failed, strict=True)],
        "caption_status": [c.status for c in captions],
        "caption_error": [c.error for c in captions],
        "caption_logprob": [c.logprob for c in captions],
        "caption_min_logprob": [c.min_logprob for c in captions],
        "caption_tokens": [None if bad else c.tokens for c, bad in zip(captions, failed, strict=True)],
        "caption_similarity": [c.similarity for c in captions],
        "caption_reused": list(reused),
    }
    if candidates:
        columns["caption_candidates"] = [list(c.candidates) or None for c in captions]
    if options.embedding_size is not None:
        columns[EMBEDDING_COLUMN] = list(embeddings)
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
