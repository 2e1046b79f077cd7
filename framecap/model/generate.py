"""Prefixes (or memories) in, captions out, however many. See engine.py for the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from framecap.errors import BridgeMismatchError
from framecap.model.cuda_graphs import CudaGraphs, Graphs
from framecap.model.decode_options import DecodeOptions
from framecap.model.engine import Engine, FrameBatch, prepare, row_sizes
from framecap.model.rugpt import RuGpt
from framecap.model.search import Candidate

__all__ = ["Candidate", "DecodeOptions", "FrameBatch", "Generator", "generate"]

MAX_ROWS = {"cpu": 128, "cuda": 1024}


class Generator:
    """A decoder that writes captions, at most ``max_rows`` sequences (frames × beams) at a time.

    ``static`` (default: on a GPU): steps come in few shapes, the host looks a step later, and the engine with its
    recordings is kept for the next call with the same options and lengths. ``graphs`` (default: CUDA graphs on a GPU,
    else none) captures such steps. Captions are the same.
    """

    def __init__(
        self,
        decoder: RuGpt,
        max_rows: int | None = None,
        static: bool | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        on_gpu = decoder.device.type == "cuda"
        self.decoder = decoder
        self.max_rows = max_rows or MAX_ROWS.get(decoder.device.type, MAX_ROWS["cpu"])
        self.static = on_gpu if static is None else static
        self._graphs = CudaGraphs if graphs is None and on_gpu and self.static else graphs
        self._kept: Engine | None = None

    def generate(
        self, prefix: Tensor | None, memory: Tensor | None, options: DecodeOptions, seeds: list[int] | None = None
    ) -> list[list[Candidate]]:
        """Decode N frames: for each its candidates, best first; see ``generate``."""
        given = prefix if prefix is not None else memory
        if given is None:
            raise BridgeMismatchError("the bridge gave neither a prefix nor a memory; one of them is needed.")
        frames = given.shape[0]
        batch = FrameBatch(prefix, memory, [options.seed] * frames if seeds is None else seeds)
        for _ in self.stream([batch] if frames else [], options, frames):
            pass
        return batch.candidates

    def stream(
        self, batches: Iterable[FrameBatch], options: DecodeOptions, frames: int | None = None
    ) -> Iterator[FrameBatch]:
        """Decode ``batches`` without draining between them; yields each as it is done, with its candidates.

        A batch is taken from the iterator only when slots are free for it. All prefixes must have one length, all
        memories too. ``frames``: how many there will be, if that is known: few need few slots, so what does not fit the
        memory does when it is halved.
        """
        engine: Engine | None = None
        waiting: Iterator[FrameBatch] | None = iter(batches)
        while True:
            while waiting is not None and (engine is None or engine.wants_more):
                if (batch := next(waiting, None)) is None:
                    waiting = None
                    break
                lengths = prepare(self.decoder, batch)
                engine = engine or self.engine(options, lengths, self.slots(options, frames))
                engine.add(batch)
            if engine is None or engine.is_idle:
                break
            yield from engine.turn()
        if engine is not None:
            self.keep(engine)

    def slots(self, options: DecodeOptions, frames: int | None = None) -> int:
        """How many captions are made at a time, where ``frames`` are to come (None: any number)."""
        rows = self.max_rows
        if frames is not None:
            rows = min(rows, frames * max(options.num_beams, options.num_return_sequences))
            if self.static:
                rows = next(size for size in row_sizes(self.max_rows) if size >= rows)
        return max(1, rows // options.num_beams)

    def engine(self, options: DecodeOptions, lengths: tuple[int, int], slots: int) -> Engine:
        """The kept engine if it fits, else a new one; whoever stops half-way leaves none behind."""
        kept, self._kept = self._kept, None
        options = replace(options, seed=0)  # seeds come with the frames
        if kept is not None and kept.fits(options, lengths, slots):
            return kept
        del kept  # its memory is for the new one
        return Engine(self.decoder, options, lengths, slots, self.static, self._graphs)

    def keep(self, engine: Engine) -> None:
        """Keep an engine that is idle, with its recordings, for the next call like it."""
        if self.static:
            self._kept = engine

    def forget(self) -> None:
        """Give back the memory of the kept engine."""
        self._kept = None


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
    ``max_rows`` sequences (frames × beams) are decoded at a time. A frame's captions do not depend on the
    other frames. Raises BridgeMismatchError, PositionLimitError.
    """
    return Generator(decoder, max_rows).generate(prefix, memory, options, seeds)
