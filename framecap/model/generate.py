"""Prefixes (or memories) in, captions out: the decoding loop over a queue of frames.

Continuous batching: a caption that is finished leaves its slot, and frames waiting in the queue take the free
slots while the others go on. The number of slots is bounded, so memory does not grow with the queue. Knows
nothing of images; slots are kept by ``slots.py``, what a step is says ``step.py``, what a beam or a sample is
``beam.py`` and ``stepwise.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from framecap.errors import BridgeMismatchError
from framecap.model.decode_options import DecodeOptions
from framecap.model.rugpt import RuGpt
from framecap.model.slots import Job, SlotLoop
from framecap.model.step import CudaGraphs, Recorder, Shapes
from framecap.model.stopping import Candidate

__all__ = ["Candidate", "DecodeOptions", "Decoding", "FrameBatch", "Generator", "generate"]

MAX_ROWS = {"cpu": 128, "cuda": 1024}


@dataclass(frozen=True)
class FrameBatch:
    """Frames that wait: ``prefix`` [N, P, E] and ``memory`` [N, M, E] (either may be None), a seed each."""

    prefix: Tensor | None
    memory: Tensor | None
    seeds: list[int]


class Decoding:
    """Frames under way: those that wait for a slot, those that have one, and those whose samples are not all drawn.

    Frames are numbered from 0 in the order in which they are added; ``Generator.start`` makes one.
    """

    def __init__(self, generator: Generator, options: DecodeOptions, slots: int) -> None:
        self.options, self.slots = options, slots
        self._generator = generator
        self._samples = options.num_return_sequences if options.do_sample else 1
        self._frames = 0
        self._waiting: deque[Job] = deque()
        self._partial: dict[int, dict[int, Candidate]] = {}
        self.loop: SlotLoop | None = None

    def add(self, batch: FrameBatch) -> range:
        """Let frames wait for slots; returns their numbers. All prefixes must have one length, all memories too."""
        jobs = _jobs(self._generator.decoder, batch, self._frames, self._samples)
        if self.loop is None and jobs:
            self.loop = self._generator.take_loop(self.options, jobs[0], self.slots)
        self._waiting.extend(jobs)
        self._frames += len(batch.seeds)
        return range(self._frames - len(batch.seeds), self._frames)

    @property
    def wants_more(self) -> bool:
        """Whether more slots may become free than frames wait."""
        return len(self._waiting) < (self.loop.slots if self.loop else 1)

    @property
    def is_idle(self) -> bool:
        """Whether all frames that were added have come out."""
        return not self._waiting and (self.loop is None or self.loop.idle)

    def turn(self) -> list[tuple[int, list[Candidate]]]:
        """One token for every frame that has a slot; the frames that are finished, with their candidates."""
        finished: list[tuple[int, list[Candidate]]] = []
        for job, candidates in self.loop.turn(self._waiting) if self.loop is not None else ():
            if self._samples == 1:
                finished.append((job.frame, candidates))
                continue
            drawn = self._partial.setdefault(job.frame, {})
            drawn[job.sample] = candidates[0]
            if len(drawn) == self._samples:
                finished.append((job.frame, [drawn[place] for place in range(self._samples)]))
                del self._partial[job.frame]
        return finished


class Generator:
    """A decoder that writes captions, at most ``max_rows`` sequences (frames × beams) at a time.

    ``static`` (default: on a GPU): steps come in few shapes, the host looks a step later, and the loop with its
    recordings is kept for the next call with the same options and lengths. ``recorder`` (default: CUDA graphs on
    a GPU, else none) records such steps. Captions are the same.
    """

    def __init__(
        self,
        decoder: RuGpt,
        max_rows: int | None = None,
        static: bool | None = None,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        on_gpu = decoder.device.type == "cuda"
        self.decoder = decoder
        self.max_rows = max_rows or MAX_ROWS.get(decoder.device.type, MAX_ROWS["cpu"])
        self.static = on_gpu if static is None else static
        self._recorder = CudaGraphs if recorder is None and on_gpu and self.static else recorder
        self._kept: SlotLoop | None = None

    def generate(
        self, prefix: Tensor | None, memory: Tensor | None, options: DecodeOptions, seeds: list[int] | None = None
    ) -> list[list[Candidate]]:
        """Decode N frames: for each its candidates, best first; see ``generate``."""
        given = prefix if prefix is not None else memory
        if given is None:
            raise BridgeMismatchError("the bridge gave neither a prefix nor a memory; one of them is needed.")
        frames = given.shape[0]
        batch = FrameBatch(prefix, memory, [options.seed] * frames if seeds is None else seeds)
        found = dict(self.stream([batch], options, frames))
        return [found[frame] for frame in range(frames)]

    def stream(
        self, batches: Iterable[FrameBatch], options: DecodeOptions, frames: int | None = None
    ) -> Iterator[tuple[int, list[Candidate]]]:
        """Decode frames of ``batches`` without draining between them; yields (frame number, candidates).

        Frames are numbered from 0 through all batches and come out as they finish. A batch is taken from the
        iterator only when slots are free for it. All prefixes must have one length, all memories too. ``frames``:
        how many there will be, if that is known: few need few slots, so what does not fit the memory does when it is
        halved.
        """
        decoding = self.start(options, frames)
        source, exhausted = iter(batches), False
        while True:
            while not exhausted and decoding.wants_more:
                batch = next(source, None)
                if batch is None:
                    exhausted = True
                else:
                    decoding.add(batch)
            if decoding.is_idle:
                self.keep(decoding)
                return
            yield from decoding.turn()

    def start(self, options: DecodeOptions, frames: int | None = None) -> Decoding:
        """A decoding without frames yet, for at most ``frames`` at a time if that is given."""
        return Decoding(self, options, self.slots(options, frames))

    def slots(self, options: DecodeOptions, frames: int | None = None) -> int:
        """How many captions are made at a time, where ``frames`` are to come (None: any number)."""
        rows = self.max_rows
        if frames is not None:
            rows = min(rows, frames * max(options.num_beams, options.num_return_sequences))
            if self.static:
                rows = Shapes.static(self.max_rows).rows_for(rows)
        return max(1, rows // options.num_beams)

    def take_loop(self, options: DecodeOptions, first: Job, slots: int) -> SlotLoop:
        """The kept loop if it fits, else a new one; whoever stops half-way leaves none behind."""
        kept, self._kept = self._kept, None
        # Seeds come with the frames.
        options = replace(options, seed=0)
        if kept is not None and kept.fits(options, first, slots):
            return kept
        del kept  # its memory is for the new one
        shapes = Shapes.static(slots) if self.static else Shapes()
        return SlotLoop(self.decoder, options, first, slots, shapes, self._recorder)

    def forget(self) -> None:
        """Give back the memory of the kept loop."""
        self._kept = None

    def keep(self, decoding: Decoding) -> None:
        """Keep the loop of a decoding that is idle, with its recordings, for the next one like it."""
        if self.static and decoding.loop is not None:
            self._kept = decoding.loop


def generate(
    decoder: RuGpt,
    prefix: Tensor | None,
    memory: Tensor | None,
    options: DecodeOptions,
    seeds: list[int] | None = None,
    max_rows: int | None = None,
) -> list[list[Candidate]]:
    """Decode N frames: for each its candidates, best first (samples in the order drawn).

    ``prefix`` [N, P, E] embeddings without positions, or None to start from bos; ``memory`` [N, M, E] for a
    decoder with cross-attention. ``seeds`` has one per frame (default: ``options.seed`` for each). At most
    ``max_rows`` sequences (frames × beams) are decoded at a time. Raises PositionLimitError,
    BridgeMismatchError.
    """
    return Generator(decoder, max_rows).generate(prefix, memory, options, seeds)


def _jobs(decoder: RuGpt, batch: FrameBatch, number: int, samples: int) -> list[Job]:
    config = decoder.config
    given = batch.prefix if batch.prefix is not None else batch.memory
    if given is None:
        raise BridgeMismatchError("the bridge gave neither a prefix nor a memory; one of them is needed.")
    if config.cross_attention != (batch.memory is not None):
        raise BridgeMismatchError(
            f"decoder with cross-attention: {config.cross_attention}; "
            f"memory given: {batch.memory is not None}; bridge and decoder must agree."
        )
    if given.shape[-1] != config.n_embd or given.shape[0] != len(batch.seeds):
        raise BridgeMismatchError(
            f"the bridge gave {list(given.shape)} for {len(batch.seeds)} frames; the decoder needs "
            f"[{len(batch.seeds)}, any, {config.n_embd}]."
        )
    with torch.inference_mode():
        prefix = _start(decoder, len(batch.seeds)) if batch.prefix is None else batch.prefix
        prefix = prefix.to(decoder.device, decoder.dtype)
        memory = None if batch.memory is None else batch.memory.to(decoder.device, decoder.dtype)
    return [
        Job(number + place, sample, seed, prefix[place], None if memory is None else memory[place])
        for place, seed in enumerate(batch.seeds)
        for sample in range(samples)
    ]


def _start(decoder: RuGpt, count: int) -> Tensor:
    """The bos embedding for each of ``count`` frames: [count, 1, E]."""
    bos = decoder.config.bos_token_id
    if bos is None:
        raise BridgeMismatchError("a decoder without a bos token needs a prefix to start from.")
    return decoder.embed(torch.full((count, 1), bos, device=decoder.device))
