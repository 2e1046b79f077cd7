"""Prefixes (or memories) in, captions out: the decoding loop over a queue of frames.

Continuous batching: a caption that is finished leaves its slot at once, and frames waiting in the queue take
the free slots while the others go on. The number of slots is bounded, so memory does not grow with the
queue. Knows nothing of images; what a beam or a sample is, ``beam.py`` and ``stepwise.py`` know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from framecap.errors import BridgeMismatchError
from framecap.model.beam import BeamSearch
from framecap.model.decode_options import DecodeOptions
from framecap.model.kv_cache import KvCache
from framecap.model.rugpt import RuGpt
from framecap.model.stepwise import Stepwise
from framecap.model.stopping import Candidate, StopRule

__all__ = ["Candidate", "DecodeOptions", "FrameBatch", "generate", "generate_stream"]

MAX_ROWS = {"cpu": 128, "cuda": 1024}
# Frames are let in together once this share of the slots is free: the prefix pass reads all weights once.
REFILL_SHARE = 0.25


@dataclass(frozen=True)
class FrameBatch:
    """Frames that wait: ``prefix`` [N, P, E] and ``memory`` [N, M, E] (either may be None), a seed each."""

    prefix: Tensor | None
    memory: Tensor | None
    seeds: list[int]


class Search(Protocol):
    """How tokens are chosen. Slots 0 … n-1 are live; each feeds ``beams`` tokens a step."""

    beams: int
    steps: Tensor

    def admit(self, rows: slice, seeds: list[tuple[int, int]]) -> None: ...

    def advance(self, logits: Tensor, rows: slice) -> Tensor: ...

    def last_ids(self, rows: slice) -> Tensor: ...

    def seen(self, rows: slice, entries: int) -> Tensor: ...

    def candidates(self, row: int) -> list[Candidate]: ...

    def state(self) -> list[Tensor]: ...


@dataclass(frozen=True)
class _Job:
    frame: int
    sample: int
    seed: int
    prefix: Tensor
    memory: Tensor | None


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
    given = prefix if prefix is not None else memory
    if given is None:
        raise BridgeMismatchError("the bridge gave neither a prefix nor a memory; one of them is needed.")
    frames = given.shape[0]
    batch = FrameBatch(prefix, memory, [options.seed] * frames if seeds is None else seeds)
    # Few frames need few slots.
    rows = min(max_rows or _most_rows(decoder), frames * max(options.num_beams, options.num_return_sequences))
    found = dict(generate_stream(decoder, [batch], options, max(1, rows)))
    return [found[frame] for frame in range(frames)]


def generate_stream(
    decoder: RuGpt,
    batches: Iterable[FrameBatch],
    options: DecodeOptions,
    max_rows: int | None = None,
) -> Iterator[tuple[int, list[Candidate]]]:
    """Decode frames of ``batches`` without draining between them; yields (frame number, candidates).

    Frames are numbered from 0 through all batches and come out as they finish. A batch is taken from the
    iterator only when slots are free for it. All prefixes must have one length, all memories too.
    """
    loop: _Loop | None = None
    samples = options.num_return_sequences if options.do_sample else 1
    waiting: deque[_Job] = deque()
    partial: dict[int, dict[int, Candidate]] = {}
    source, number, exhausted = iter(batches), 0, False
    while True:
        while not exhausted and len(waiting) < (loop.slots if loop else 1):
            batch = next(source, None)
            if batch is None:
                exhausted = True
                break
            jobs = _jobs(decoder, batch, number, samples)
            number += len(batch.seeds)
            waiting.extend(jobs)
            if loop is None and jobs:
                loop = _Loop(decoder, options, jobs[0], max_rows or _most_rows(decoder))
        if loop is None or (not waiting and not loop.live):
            return
        for job, candidates in loop.turn(waiting):
            if samples == 1:
                yield job.frame, candidates
                continue
            drawn = partial.setdefault(job.frame, {})
            drawn[job.sample] = candidates[0]
            if len(drawn) == samples:
                yield job.frame, [drawn[place] for place in range(samples)]
                del partial[job.frame]


class _Loop:
    """Slots, cache and search state of one run; ``turn`` lets frames in, feeds one token, lets frames out."""

    def __init__(self, decoder: RuGpt, options: DecodeOptions, first: _Job, max_rows: int) -> None:
        self.decoder = decoder
        self.prefix_len = first.prefix.shape[0]
        memory_len = 0 if first.memory is None else first.memory.shape[0]
        decoder.check_positions(self.prefix_len, options.max_new_tokens)
        self.slots = max(1, max_rows // options.num_beams)
        config = decoder.config
        tokenizer = decoder.tokenizer if decoder.has_tokenizer else None
        stop = StopRule(tokenizer, config.eos_token_id, options.stop, config.vocab_size, decoder.device)
        kind = BeamSearch if options.num_beams > 1 else Stepwise
        self.search: Search = kind(self.slots, options, stop, decoder.device)
        entries = self.prefix_len + options.max_new_tokens * self.search.beams
        self.cache: KvCache = decoder.new_cache(self.slots, entries, memory_len)
        self.jobs: list[_Job] = []
        self.steps: list[int] = []

    @property
    def live(self) -> int:
        return len(self.jobs)

    def turn(self, waiting: deque[_Job]) -> list[tuple[_Job, list[Candidate]]]:
        """Fill free slots if it is worth a prefix pass, feed one token to every live slot; the finished."""
        with torch.inference_mode():
            free = self.slots - self.live
            finished = []
            if waiting and (not self.live or free >= min(len(waiting), self.slots * REFILL_SHARE)) and free:
                first = self.live
                logits = self._prefill([waiting.popleft() for _ in range(min(free, len(waiting)))])
                finished += self._choose(logits, slice(first, self.live))
            if self.live:
                finished += self._choose(self._decode_one_token(), slice(0, self.live))
            return finished

    def _prefill(self, jobs: list[_Job]) -> Tensor:
        first = self.live
        self.jobs += jobs
        self.steps += [0] * len(jobs)
        self.search.admit(slice(first, self.live), [(job.seed, job.sample) for job in jobs])
        prefix = torch.stack([job.prefix for job in jobs])
        memories = [job.memory for job in jobs if job.memory is not None]
        memory = torch.stack(memories) if memories else None
        return self.decoder.prefill(prefix, memory, self.cache, first)[:, None].float()

    def _decode_one_token(self) -> Tensor:
        rows, search, start = slice(0, self.live), self.search, self.prefix_len
        fed = search.steps[rows] - 1
        places = torch.arange(search.beams, device=fed.device)
        columns = start + fed[:, None] * search.beams + places
        entries = max(self.steps) * search.beams
        mask = self.decoder.wte.weight.new_zeros(self.live, 1, search.beams, start + entries)
        mask[:, 0, :, start:].masked_fill_(~search.seen(rows, entries), float("-inf"))
        logits = self.decoder.decode_one_token(search.last_ids(rows), start + fed, columns, mask, self.cache)
        return logits.float()

    def _choose(self, logits: Tensor, rows: slice) -> list[tuple[_Job, list[Candidate]]]:
        done = self.search.advance(logits, rows)
        for row in range(rows.start, rows.stop):
            self.steps[row] += 1
        places = [rows.start + place for place in done.nonzero()[:, 0].tolist()]
        finished = [(self.jobs[row], self.search.candidates(row)) for row in places]
        if places:
            self._vacate(set(places))
        return finished

    def _vacate(self, leaving: set[int]) -> None:
        """Let slots go; the last live ones move into the gaps, so that live slots stay the first ones."""
        left = self.live - len(leaving)
        gaps = [row for row in range(left) if row in leaving]
        movers = [row for row in range(left, self.live) if row not in leaving]
        if gaps:
            filled = self.prefix_len + max(self.steps[row] for row in movers) * self.search.beams
            self.cache.move(movers, gaps, min(filled, self.cache.max_len))
            for tensor in self.search.state():
                tensor[gaps] = tensor[movers]
            for gap, mover in zip(gaps, movers, strict=True):
                self.jobs[gap], self.steps[gap] = self.jobs[mover], self.steps[mover]
        del self.jobs[left:], self.steps[left:]


def _most_rows(decoder: RuGpt) -> int:
    return MAX_ROWS.get(decoder.device.type, MAX_ROWS["cpu"])


def _jobs(decoder: RuGpt, batch: FrameBatch, number: int, samples: int) -> list[_Job]:
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
        _Job(number + place, sample, seed, prefix[place], None if memory is None else memory[place])
        for place, seed in enumerate(batch.seeds)
        for sample in range(samples)
    ]


def _start(decoder: RuGpt, count: int) -> Tensor:
    """The bos embedding for each of ``count`` frames: [count, 1, E]."""
    bos = decoder.config.bos_token_id
    if bos is None:
        raise BridgeMismatchError("a decoder without a bos token needs a prefix to start from.")
    return decoder.embed(torch.full((count, 1), bos, device=decoder.device))
