"""One captioner for several threads: continuous batching across the batches that they bring.

A caption that is finished gives its slot to whatever frame waits, whichever thread brought it, so that no batch
drains alone and the device is not idle while a thread does something else with its captions. All work on the device
is done by one thread of its own, in the order in which it was asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from framecap.model.captioner import Caption, Captioner, unit
from framecap.model.decode_options import DecodeOptions
from framecap.model.engine import Engine, FrameBatch, prepare
from framecap.model.ruclip import ImageFeatures
from framecap.model.transfer import pinned

log = logging.getLogger(__name__)
# Tokens of every caption before whoever else waits for the device has it.
_TURNS = 8
_T = TypeVar("_T")
Seconds = dict[str, float]


class SharedCaptioner:
    """A captioner, and how it is to caption; every method may be called by several threads at once.

    Every method adds the seconds for which it had the device to ``seconds``, under ``encode`` or ``generate``, and
    under ``wait`` those for which the device had nothing to do before.
    """

    def __init__(self, captioner: Captioner, options: DecodeOptions, similarity: bool) -> None:
        self._captioner, self._options, self._similarity = captioner, captioner.checked(options), similarity
        # A thread that is new does not know torch's number of threads until torch's own operations tell it.
        threads = (torch.get_num_threads(),)
        self._device = ThreadPoolExecutor(1, "framecap-device", torch.set_num_threads, threads)
        self._idle_since = time.perf_counter()
        self._engine: Engine | None = None
        self._in_flight: set[FrameBatch] = set()

    @property
    def has_text(self) -> bool:
        """Whether the encoder has a text tower."""
        return self._captioner.encoder.has_text

    def features(self, pixels: np.ndarray, seconds: Seconds) -> ImageFeatures:
        """See ``Captioner.features``; the device is not kept waiting while ``pixels`` are brought into place."""
        placed = pinned(pixels, self._captioner.device)
        return self._on_device(seconds, "encode", lambda: self._with_room(lambda: self._captioner.features(placed)))

    def embeddings(self, features: Sequence[ImageFeatures], seconds: Seconds) -> np.ndarray:
        """Embeddings of frames that are encoded, float32 [N, D], L2-normalised."""

        def work() -> np.ndarray:
            return unit(torch.cat([part.pooled for part in features]))

        return self._on_device(seconds, "encode", lambda: self._with_room(work))

    def embed_texts(self, texts: Sequence[str], seconds: Seconds) -> np.ndarray:
        """See ``Captioner.embed_texts``."""
        return self._on_device(seconds, "generate", lambda: self._with_room(lambda: self._captioner.embed_texts(texts)))

    def caption_features(
        self, features: Sequence[ImageFeatures], seeds: Sequence[int], seconds: Seconds
    ) -> list[Caption]:
        """Captions of frames that are encoded, a seed for each.

        What another thread's frame breaks does no harm: the frames are retried alone, and only what fails then is
        raised.
        """
        batch, pooled = self._on_device(seconds, "generate", lambda: self._join(features, seeds))
        while batch in self._in_flight:
            self._on_device(seconds, "generate", lambda: self._advance(batch))
        return self._on_device(seconds, "generate", lambda: self._captions(batch, pooled))

    def _on_device(self, seconds: Seconds, stage: str, work: Callable[[], _T]) -> _T:
        def timed() -> _T:
            begun = time.perf_counter()
            seconds["wait"] = seconds.get("wait", 0.0) + begun - self._idle_since
            try:
                return work()
            finally:
                self._idle_since = time.perf_counter()
                seconds[stage] = seconds.get(stage, 0.0) + self._idle_since - begun

        return self._device.submit(timed).result()

    # What follows runs in the device's thread.

    def _join(self, features: Sequence[ImageFeatures], seeds: Sequence[int]) -> tuple[FrameBatch, Tensor]:
        """Add frames to the running decode loop; one with too few slots is drained before."""
        pooled = torch.cat([part.pooled for part in features])
        batch = self._with_room(lambda: self._captioner.frame_batch(ImageFeatures.join(features), seeds))
        generator = self._captioner.generator
        lengths, slots = prepare(self._captioner.decoder, batch), generator.slots(self._options, len(seeds))
        if self._engine is None or self._engine.slots < slots:
            self._drain()
            self._engine = self._with_room(lambda: generator.engine(self._options, lengths, slots))
        self._engine.add(batch)
        self._in_flight.add(batch)
        return batch, pooled

    def _advance(self, batch: FrameBatch) -> None:
        """Some tokens for all captions, unless those of ``batch`` have ended meanwhile."""
        for _ in range(_TURNS):
            if batch in self._in_flight:
                self._turn()

    def _turn(self) -> None:
        """One token for all captions. An error ends the loop, and its batches have captions missing."""
        assert self._engine is not None
        try:
            self._in_flight.difference_update(self._engine.turn())
        except Exception as error:
            log.warning("%d batches failed together (%s); captioning them one by one", len(self._in_flight), error)
            self._engine, self._in_flight = None, set()

    def _drain(self) -> None:
        """Go on until no batch is in flight; the engine is kept for the next."""
        while self._in_flight:
            self._turn()
        if self._engine is not None:
            self._captioner.generator.keep(self._engine)
            self._engine = None

    def _captions(self, batch: FrameBatch, pooled: Tensor) -> list[Caption]:
        """The captions of a batch that has ended; one that failed in company is retried alone."""
        candidates = batch.candidates
        if batch.missing:
            self._drain()
            candidates = self._captioner.generator.generate(batch.prefix, batch.memory, self._options, batch.seeds)
        return self._with_room(lambda: self._captioner.to_captions(candidates, pooled, self._options, self._similarity))

    def _with_room(self, work: Callable[[], _T]) -> _T:
        """Do ``work``; where the memory is short, once more when all captions under way are made and their slots are
        given back, so that what fits alone is no fault of its frames."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("out of memory; draining in-flight captions first (smaller batches help): %s", error)
        self._drain()
        self._captioner.generator.forget()
        return work()


def is_out_of_memory(error: Exception) -> bool:
    """Whether less work at a time may help."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()
