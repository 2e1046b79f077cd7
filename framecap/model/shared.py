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
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from framecap.model.captioner import Caption, Captioner, unit
from framecap.model.decode_options import DecodeOptions
from framecap.model.generate import Candidate, Decoding, FrameBatch
from framecap.model.ruclip import ImageFeatures
from framecap.model.transfer import pinned

log = logging.getLogger(__name__)
# Tokens of every caption before whoever else waits for the device has it.
_TURNS = 8
_T = TypeVar("_T")
Seconds = dict[str, float]


@dataclass(eq=False)
class _Share:
    """The frames of one call, their pooled features [N, D] and numbers in the decoding, and what has come out."""

    batch: FrameBatch
    pooled: Tensor
    numbers: range
    found: dict[int, list[Candidate]] = field(default_factory=dict)
    is_lost: bool = False

    @property
    def is_ended(self) -> bool:
        return self.is_lost or len(self.found) == len(self.numbers)


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
        self._decoding: Decoding | None = None
        self._shares: list[_Share] = []

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

        What another thread's frame breaks does no harm: the frames are then captioned without company, and only
        what fails then is raised.
        """
        share = self._on_device(seconds, "generate", lambda: self._join(features, seeds))
        while not share.is_ended:
            self._on_device(seconds, "generate", lambda: self._advance(share))
        return self._on_device(seconds, "generate", lambda: self._captions(share))

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

    def _join(self, features: Sequence[ImageFeatures], seeds: Sequence[int]) -> _Share:
        """Let frames take part in the decoding that is under way; one with too few slots ends before."""
        pooled = torch.cat([part.pooled for part in features])
        batch = self._with_room(lambda: self._captioner.frame_batch(ImageFeatures.join(features), seeds))
        generator = self._captioner.generator
        if self._decoding is None or self._decoding.slots < generator.slots(self._options, len(seeds)):
            self._drain()
            self._decoding = generator.start(self._options, len(seeds))
        try:
            share = _Share(batch, pooled, self._decoding.add(batch))
        except Exception:
            if not self._shares:
                self._decoding = None  # it may have no loop, for want of memory
            raise
        self._shares.append(share)
        return share

    def _advance(self, share: _Share) -> None:
        """Some tokens for all captions, unless those of ``share`` have ended meanwhile."""
        for _ in range(_TURNS):
            if share.is_ended:
                return
            self._turn(share)

    def _turn(self, asked_by: _Share | None = None) -> None:
        """One token for all captions. An error ends the decoding; it is raised if only ``asked_by`` took part, else
        all frames are lost to it: whose fault it was shows when they are captioned without company."""
        assert self._decoding is not None
        try:
            for number, candidates in self._decoding.turn():
                owner = next(share for share in self._shares if number in share.numbers)
                owner.found[number] = candidates
        except Exception as error:
            self._decoding, lost, self._shares = None, self._shares, []
            if lost == [asked_by]:
                raise
            log.warning("%d batches failed together (%s); captioning them one by one", len(lost), error)
            for share in lost:
                share.is_lost = True
        self._shares = [share for share in self._shares if not share.is_ended]

    def _drain(self) -> None:
        """Go on until nobody takes part in the decoding; its loop is kept for the next."""
        while self._shares:
            self._turn()
        if self._decoding is not None:
            self._captioner.generator.keep(self._decoding)
            self._decoding = None

    def _captions(self, share: _Share) -> list[Caption]:
        """The captions of a share that has ended; one that was lost is decoded again first, without company."""
        if share.is_lost:
            self._drain()
            batch = share.batch
            candidates = self._captioner.generator.generate(batch.prefix, batch.memory, self._options, batch.seeds)
        else:
            candidates = [share.found[number] for number in share.numbers]
        arguments = (candidates, share.pooled, self._options, self._similarity)
        return self._with_room(lambda: self._captioner.to_captions(*arguments))

    def _with_room(self, work: Callable[[], _T]) -> _T:
        """Do ``work``; where the memory is short, once more when all captions under way are made and their slots are
        given back, so that what fits alone is no fault of its frames."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning(
                "no room beside the captions under way, so they are made first; smaller batches help: %s", error
            )
        self._drain()
        self._captioner.generator.forget()
        return work()


def is_out_of_memory(error: Exception) -> bool:
    """Whether less work at a time may help."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()
