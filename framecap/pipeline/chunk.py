"""Captions of one chunk: which of its frames share one, and what to do when a batch breaks.

A batch that does not fit the memory is halved and tried again; a frame that breaks a batch is found by halving and
gets an error caption. Knows nothing of shards and fragments.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from framecap.errors import FrameError
from framecap.model.captioner import DECIMALS, Caption
from framecap.model.images import Pixels
from framecap.model.ruclip import ImageFeatures
from framecap.model.shared import Seconds, SharedCaptioner, is_out_of_memory
from framecap.pipeline.identical import CaptionMemory
from framecap.pipeline.read import ChunkFrames
from framecap.pipeline.records import ActorOptions
from framecap.schema import REUSED_IDENTICAL, REUSED_SIMILAR

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Captioned(NamedTuple):
    """Row by row: the caption, why it was not made for this row if it was not, and what was asked for besides.

    ``embeddings`` of the frame and ``caption_embeddings``: float16 [D]; ``cosines`` of the frame with each query:
    float32 [Q]. None where a row failed or nobody asked.
    """

    captions: list[Caption]
    reused: list[str | None]
    embeddings: list[np.ndarray | None]
    caption_embeddings: list[np.ndarray | None]
    cosines: list[np.ndarray | None]


class ChunkCaptioner:
    """What the chunks of an actor have in common: captioner, size of a batch, captions of identical frames.

    ``caption`` may be called by several threads at once.
    """

    def __init__(self, captioner: SharedCaptioner, options: ActorOptions) -> None:
        self.captioner, self.options, self.rows = captioner, options, options.batch_size
        self.memory = CaptionMemory() if options.share_identical and options.reuse_similarity is None else None
        queries = list(options.extra.queries)
        self.queries = captioner.embed_texts(queries, {}) if queries else None  # float32 [Q, D]

    def caption(self, frames: ChunkFrames, pixels: Pixels, seconds: Seconds) -> Captioned:
        """Captions of a chunk's rows; ``seconds``: see ``SharedCaptioner``."""
        return _Chunk(self, frames, pixels, seconds).caption()


class _Chunk:
    """One chunk on its way; slot: the place of a picture in ``pixels``."""

    def __init__(self, common: ChunkCaptioner, frames: ChunkFrames, pixels: Pixels, seconds: Seconds) -> None:
        self._common, self._options, self._captioner = common, common.options, common.captioner
        self._frames, self._pixels, self._seconds = frames, pixels, seconds
        self._first_row: dict[int, int] = {}
        for row, slot in enumerate(frames.slots):
            if slot >= 0:
                self._first_row.setdefault(slot, row)
        self._made: dict[int, Caption] = {}
        self._marks: dict[int, str] = {}
        self._features: dict[int, ImageFeatures] = {}
        self._embeddings: dict[int, np.ndarray] = {}
        self._text_embeddings: dict[int, np.ndarray] = {}

    def caption(self) -> Captioned:
        memory = self._common.memory
        if memory is None:
            self._make(list(self._first_row))
        else:
            digests = {slot: self._frames.digests[slot] for slot in self._first_row}
            with memory.claim(digests) as claim:
                self._take(claim.known)
                self._make(claim.own)
                memory.remember(digests, {slot: self._made[slot] for slot in claim.own})
            self._take(memory.await_others(claim, digests))
            self._make([slot for slot in claim.awaited if slot not in self._made])
        if self._shows_embeddings:
            known = [slot for slot, made in self._made.items() if made.status != "error"]
            self._encode(sorted(slot for slot in known if slot not in self._features))
        if self._options.extra.caption_embedding is not None:
            self._embed_captions()
        return self._by_row()

    @property
    def _shows_embeddings(self) -> bool:
        """Whether a column is made from the frames' embeddings."""
        return self._options.extra.image_embedding is not None or self._common.queries is not None

    def _take(self, known: Mapping[int, Caption]) -> None:
        self._made.update(known)
        self._marks.update(dict.fromkeys(known, REUSED_IDENTICAL))

    def _make(self, slots: list[int]) -> None:
        """Encode the pictures of ``slots`` and caption those that share no near frame's caption."""
        self._encode(slots)
        features = {slot: self._features[slot] for slot in slots if slot in self._features}
        threshold, followers = self._options.reuse_similarity, dict[int, int]()
        if threshold is not None:
            rows = {slot: self._first_row[slot] for slot in features}
            followers = similar_frames(self._frames, rows, self._embeddings, threshold)
        self._ask([slot for slot in features if slot not in followers])
        # What broke one frame need not break those near it.
        left_alone = {slot for slot, leader in followers.items() if self._made[leader].status == "error"}
        self._ask(sorted(left_alone))
        followers = {slot: leader for slot, leader in followers.items() if slot not in left_alone}
        if followers:
            self._made.update(self._shared(followers))
        self._marks.update(dict.fromkeys(followers, REUSED_SIMILAR))

    def _encode(self, slots: list[int]) -> None:
        """Features of each of ``slots``, N = 1, and embeddings where they are wanted; a picture that cannot be
        encoded gets an error caption, unless it has a caption."""

        def work(part: list[int]) -> list[ImageFeatures]:
            chosen = self._pixels if len(part) == len(self._pixels) else self._pixels[part]  # the rule, saves a copy
            return self._captioner.features(chosen, self._seconds).split()

        encoded = self._halve(slots, work)
        features = {slot: found for slot, found in encoded.items() if isinstance(found, ImageFeatures)}
        self._features.update(features)
        for slot, found in encoded.items():
            if isinstance(found, Caption):
                self._made.setdefault(slot, found)
        if features and (self._shows_embeddings or self._options.reuse_similarity is not None):
            self._embed(features)

    def _embed(self, features: Mapping[int, ImageFeatures]) -> None:
        def work(part: list[int]) -> list[np.ndarray]:
            return list(self._captioner.embeddings([features[slot] for slot in part], self._seconds))

        for slot, found in self._halve(list(features), work).items():
            if isinstance(found, Caption):
                self._made.setdefault(slot, found)
                del self._features[slot]
            else:
                self._embeddings[slot] = found

    def _embed_captions(self) -> None:
        def work(part: list[int]) -> list[np.ndarray]:
            return list(self._captioner.embed_texts([self._made[slot].text for slot in part], self._seconds))

        made = sorted(slot for slot, caption in self._made.items() if caption.status != "error")
        for slot, found in self._halve(made, work).items():
            if isinstance(found, Caption):
                self._made[slot] = found
            else:
                self._text_embeddings[slot] = found

    def _ask(self, slots: list[int]) -> None:
        """Caption ``slots``, each from its features."""

        def work(part: list[int]) -> list[Caption]:
            features = [self._features[slot] for slot in part]
            seeds = [self._frames.seeds[self._first_row[slot]] for slot in part]
            return self._captioner.caption_features(features, seeds, self._seconds)

        self._made.update(self._halve(slots, work))

    def _shared(self, followers: Mapping[int, int]) -> dict[int, Caption]:
        """The caption of each follower's leader, with the follower's own similarity to it."""
        if not (self._options.similarity and self._captioner.has_text):
            return {slot: self._made[leader] for slot, leader in followers.items()}

        def work(slots: list[int]) -> list[Caption]:
            captions = [self._made[followers[slot]] for slot in slots]
            texts = self._captioner.embed_texts([caption.text for caption in captions], self._seconds)
            cosines = (np.stack([self._embeddings[slot] for slot in slots]) * texts).sum(axis=1).tolist()
            return [
                replace(caption, similarity=round(cosine, DECIMALS))
                for caption, cosine in zip(captions, cosines, strict=True)
            ]

        return self._halve(list(followers), work)

    def _by_row(self) -> Captioned:
        captions: list[Caption] = []
        reused: list[str | None] = []
        for row, slot in enumerate(self._frames.slots):
            if slot < 0:
                captions.append(Caption("", status="error", error=self._frames.errors[row]))
                reused.append(None)
            else:
                captions.append(self._made[slot])
                reused.append(self._marks.get(slot) or (REUSED_IDENTICAL if self._first_row[slot] != row else None))
        frames = [self._embeddings.get(slot) for slot in self._frames.slots]
        texts = [self._text_embeddings.get(slot) for slot in self._frames.slots]
        queries = self._common.queries
        return Captioned(
            captions,
            reused,
            [None if frame is None else frame.astype(np.float16) for frame in frames],
            [None if text is None else text.astype(np.float16) for text in texts],
            [None if frame is None or queries is None else queries @ frame for frame in frames],
        )

    def _halve(self, slots: list[int], work: Callable[[list[int]], Sequence[_T]]) -> dict[int, _T | Caption]:
        """What ``work`` gives for each slot, a batch at a time; whatever breaks a batch costs only the frame that
        did it, which gets an error caption."""
        found: list[_T | Caption] = []
        while len(found) < len(slots):
            found += self._attempt(slots[len(found) : len(found) + self._common.rows], work)
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
            out_of_memory = is_out_of_memory(error)
            log.warning("a batch of %d failed (%s); halving it", len(slots), error)
            if len(slots) == 1:
                cause = "out of memory" if out_of_memory else type(error).__name__
                return [Caption.failed(FrameError("model", f"{cause}: {str(error)[:200]}"))]
        middle = len(slots) // 2
        if out_of_memory:
            self._common.rows = max(1, min(self._common.rows, middle))
        return self._attempt(slots[:middle], work) + self._attempt(slots[middle:], work)


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


def _is_device_lost(error: Exception) -> bool:
    """After such an error no call on this device succeeds: the actor must go, not the frames."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)
