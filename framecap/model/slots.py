"""Slots of a decoding loop: frames enter free ones, captions that are finished leave theirs.

The host runs ahead of the device: it looks at the flags of a step only when ``Shapes.lag`` more are under way,
and fetches finished captions together, so that a GPU never waits for it. Slots 0 … n-1 are in use; when fewer
captions are left than the next smaller shape holds, the last ones move into the gaps.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framecap.model.attention import planless_attention
from framecap.model.beam import BeamSearch
from framecap.model.decode_options import DecodeOptions
from framecap.model.kv_cache import KvCache
from framecap.model.rugpt import RuGpt
from framecap.model.step import FINISHED, WATCHED, GraphedStep, Recorder, Search, Shapes, Step, decode_step
from framecap.model.stepwise import Stepwise
from framecap.model.stopping import Candidate, StopRule
from framecap.model.transfer import HostCopy, index

# Frames are let in together once this share of the slots is free: the prefix pass reads all weights once.
REFILL_SHARE = 0.25


@dataclass(frozen=True)
class Job:
    """A caption to be made: ``prefix`` [P, E], ``memory`` [M, E] or None; number of frame and sample, seed."""

    frame: int
    sample: int
    seed: int
    prefix: Tensor
    memory: Tensor | None

    @property
    def lengths(self) -> tuple[int, int]:
        """Of prefix and memory."""
        return self.prefix.shape[0], 0 if self.memory is None else self.memory.shape[0]


@dataclass(eq=False)
class _Seat:
    """A caption in the making: its slot, the step it began at, its tokens where stop texts are looked for."""

    job: Job
    row: int
    born: int
    tokens: list[int] = field(default_factory=list)
    left: bool = False


Finished = list[tuple[Job, list[Candidate]]]


class SlotLoop:
    """Slots, cache and search state; ``turn`` lets frames in, feeds one token, lets captions out."""

    def __init__(
        self,
        decoder: RuGpt,
        options: DecodeOptions,
        first: Job,
        slots: int,
        shapes: Shapes,
        recorder: Callable[[], Recorder] | None,
    ) -> None:
        self.decoder, self.options, self.shapes, self.slots = decoder, options, shapes, slots
        self.prefix_len, memory_len = self._lengths = first.lengths
        decoder.check_positions(self.prefix_len, options.max_new_tokens)
        config, self.limit = decoder.config, options.max_new_tokens
        tokenizer = decoder.tokenizer if decoder.has_tokenizer else None
        self.stop = StopRule(tokenizer, config.eos_token_id, options.stop, config.vocab_size, decoder.device)
        kind = BeamSearch if options.num_beams > 1 else Stepwise
        self.search: Search = kind(slots, options, self.stop, decoder.device)
        entries = self.prefix_len + self.limit * self.search.beams
        self.cache: KvCache = decoder.new_cache(slots, entries, memory_len)
        step = functools.partial(decode_step, decoder, self.cache, self.search, self.prefix_len)
        self.step: Step = step if recorder is None or self.search.asks_host else GraphedStep(step, recorder())
        self.seats: list[_Seat | None] = []
        self.live, self.clock = 0, 0
        self._looks: deque[tuple[list[_Seat | None], HostCopy]] = deque()
        self._leaving: deque[tuple[list[_Seat], HostCopy]] = deque()

    def fits(self, options: DecodeOptions, first: Job, slots: int) -> bool:
        """Whether these jobs could be done here, with ``slots`` or more."""
        return (self.options, self._lengths) == (options, first.lengths) and self.slots >= slots

    @property
    def idle(self) -> bool:
        """Whether no caption is being made or fetched."""
        return not (self.live or self._looks or self._leaving)

    def turn(self, waiting: deque[Job]) -> Finished:
        """Fill free slots if it is worth a prefix pass, feed one token to every live slot; the finished."""
        with torch.inference_mode(), planless_attention():
            free = self.slots - self.live
            if waiting and (not self.live or free >= min(len(waiting), self.slots * REFILL_SHARE)) and free:
                self._move_together()
                self._prefill([waiting.popleft() for _ in range(min(free, len(waiting)))])
                self._look(self.shapes.lag)
            if self.live:
                if self.shapes.rows_for(self.live) < self.shapes.rows_for(len(self.seats)):
                    self._move_together()
                self._decode_one_token()
            self._look(self.shapes.lag if self.live else 0)
            return self._fetch(self.shapes.lag if self.live else 0)

    def _prefill(self, jobs: list[Job]) -> None:
        rows = slice(self.live, self.live + len(jobs))
        self.seats += [_Seat(job, row, self.clock) for row, job in enumerate(jobs, self.live)]
        self.live = rows.stop
        self.search.admit(rows, [(job.seed, job.sample) for job in jobs])
        prefix = torch.stack([job.prefix for job in jobs])
        memories = [job.memory for job in jobs if job.memory is not None]
        memory = torch.stack(memories) if memories else None
        logits = self.decoder.prefill(prefix, memory, self.cache, rows.start)
        self.search.advance(logits[:, None].float(), rows)
        self._ask(rows)

    def _decode_one_token(self) -> None:
        self.clock += 1
        longest = self.clock - min(seat.born for seat in self.seats if seat is not None)
        self.step(self.shapes.rows_for(len(self.seats)), self.shapes.tokens_for(longest, self.limit))
        self._ask(slice(0, len(self.seats)))

    def _ask(self, rows: slice) -> None:
        """Send for the flags of ``rows``, and for their tokens where stop texts are looked for."""
        wanted = [self.search.flags[rows]]
        if self.stop.texts and not self.search.asks_host:
            wanted.append(self.search.last_ids(rows)[:, 0])
        self._looks.append((self.seats[rows], HostCopy(wanted)))

    def _look(self, lag: int) -> None:
        """See who is finished, but for the last ``lag`` steps, and let them go."""
        while len(self._looks) > lag:
            seats, copy = self._looks.popleft()
            flags, *tokens = (values.tolist() for values in copy.read())
            leaving = [
                seat
                for place, seat in enumerate(seats)
                if seat is not None and not seat.left and self._is_finished(seat, place, flags, *tokens)
            ]
            if leaving:
                self._vacate(leaving)

    def _is_finished(self, seat: _Seat, place: int, flags: list[int], tokens: list[int] | None = None) -> bool:
        if tokens is None:
            return flags[place] == FINISHED
        seat.tokens.append(tokens[place])
        return flags[place] == FINISHED or (flags[place] == WATCHED and self.stop.ends_text(seat.tokens))

    def _vacate(self, leaving: list[_Seat]) -> None:
        rows = index([seat.row for seat in leaving], self.decoder.device)
        self._leaving.append((leaving, HostCopy(self.search.collect(rows))))
        self.search.flags[rows] = FINISHED
        for seat in leaving:
            seat.left = True
            self.seats[seat.row] = None
        self.live -= len(leaving)

    def _move_together(self) -> None:
        """Close the gaps, so that the live slots are the first ones."""
        movers = [seat for seat in self.seats[self.live :] if seat is not None]
        gaps = [row for row, seat in enumerate(self.seats[: self.live]) if seat is None]
        if gaps:
            device = self.decoder.device
            origin, goal = index([seat.row for seat in movers], device), index(gaps, device)
            longest = min(self.clock - min(seat.born for seat in movers), self.limit)
            self.cache.move(origin, goal, self.prefix_len + longest * self.search.beams)
            for tensor in self.search.state():
                tensor[goal] = tensor[origin]
            for seat, row in zip(movers, gaps, strict=True):
                self.seats[row], seat.row = seat, row
        del self.seats[self.live :]
        self.search.flags[self.live :] = FINISHED

    def _fetch(self, lag: int) -> Finished:
        """Captions that have left their slots, but for the last ``lag`` lots."""
        finished: Finished = []
        while len(self._leaving) > lag:
            seats, copy = self._leaving.popleft()
            collected = copy.read()
            for place, seat in enumerate(seats):
                finished.append((seat.job, self.search.candidates(collected, place, len(seat.tokens) or None)))
        return finished
