"""The one loop of decoding: requests enter slots, every step gives each of them a token, captions leave.

Continuous batching: a caption that is finished leaves its slot, and frames that wait take the free slots while the
others go on. Slots 0 … n-1 are in use; when fewer captions are left than the next smaller shape holds, the last ones
move into the gaps. On a GPU the host runs ahead: it looks at the flags of a step when the next is under way, and
fetches finished captions together, so the device never waits for it. Knows nothing of images.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framecap.errors import BridgeMismatchError
from framecap.model.attention import planless_attention
from framecap.model.beam import BeamSearch
from framecap.model.cuda_graphs import Graphs
from framecap.model.decode_options import DecodeOptions
from framecap.model.kv_cache import KvCache
from framecap.model.rugpt import RuGpt
from framecap.model.search import FINISHED, WATCHED, Candidate, Stepwise, StopRule
from framecap.model.transfer import HostCopy, index

# Frames are let in together once this share of the slots is free: a prefill reads all weights once.
REFILL_SHARE = 0.25
LEAST_ROWS = 16  # fewer take a GPU as long
TOKEN_BUCKET = 16  # generated tokens


@dataclass(eq=False)
class FrameBatch:
    """Frames to caption: ``prefix`` [N, P, E] and ``memory`` [N, M, E] (either may be None), a seed each.

    ``found``: for each frame its samples' candidates by number; filled by the engine.
    """

    prefix: Tensor | None
    memory: Tensor | None
    seeds: list[int]
    found: list[dict[int, list[Candidate]]] = field(default_factory=list)
    missing: int = 0

    @property
    def candidates(self) -> list[list[Candidate]]:
        """For each frame its candidates, best first (samples in the order drawn), once the engine is done with it."""
        return [[found for number in sorted(samples) for found in samples[number]] for samples in self.found]


@dataclass(eq=False)
class Request:
    """A caption to make: sample ``sample`` of frame ``place`` of ``batch``; then its slot, the step it began at, its
    tokens where stop texts are looked for, and whether it has left."""

    batch: FrameBatch
    place: int
    sample: int
    row: int = -1
    born: int = 0
    tokens: list[int] = field(default_factory=list)
    left: bool = False


class Engine:
    """Slots, cache and search for requests of one kind: the same options and lengths of prefix and memory.

    ``static``: steps come in few shapes and the host looks a step later. ``graphs`` captures such steps, if given.
    """

    def __init__(
        self,
        decoder: RuGpt,
        options: DecodeOptions,
        lengths: tuple[int, int],
        slots: int,
        static: bool,
        graphs: Graphs | None,
    ) -> None:
        decoder.check_positions(lengths[0], options.max_new_tokens)
        self.decoder, self.options, self.slots, self.lengths = decoder, options, slots, lengths
        self._sizes = row_sizes(slots) if static else ()
        self._lag = 1 if static else 0
        config, tokenizer = decoder.config, decoder.tokenizer if decoder.has_tokenizer else None
        self.stop = StopRule(tokenizer, config.eos_token_id, options.stop, config.vocab_size, decoder.device)
        kind = BeamSearch if options.num_beams > 1 else Stepwise
        self.search: Stepwise | BeamSearch = kind(slots, options, self.stop, decoder.device)
        self.cache = decoder.new_cache(slots, lengths[0] + options.max_new_tokens * self.search.beams, lengths[1])
        step = functools.partial(decode_step, decoder, self.cache, self.search, lengths[0])
        self.step = step if graphs is None or self.search.asks_host else graphs(step)
        self.clock = 0
        self._waiting: deque[Request] = deque()
        self._rows: list[Request | None] = []
        self._live = 0
        self._looks: deque[tuple[list[Request | None], HostCopy]] = deque()
        self._leaving: deque[tuple[list[Request], HostCopy]] = deque()

    def fits(self, options: DecodeOptions, lengths: tuple[int, int], slots: int) -> bool:
        """Whether such requests can be served here, with ``slots`` or more."""
        return (self.options, self.lengths) == (options, lengths) and self.slots >= slots

    @property
    def wants_more(self) -> bool:
        """Whether more slots may become free than requests wait."""
        return len(self._waiting) < self.slots

    @property
    def is_idle(self) -> bool:
        """Whether every request that was added has been answered."""
        return not (self._waiting or self._live or self._looks or self._leaving)

    def add(self, batch: FrameBatch) -> None:
        """Let a batch, one of ``prepare``'s, wait for slots."""
        samples = self.options.num_return_sequences if self.options.do_sample else 1
        batch.found, batch.missing = [{} for _ in batch.seeds], len(batch.seeds) * samples
        self._waiting.extend(Request(batch, place, n) for place in range(len(batch.seeds)) for n in range(samples))

    def turn(self) -> list[FrameBatch]:
        """Fill free slots if a prefill pays, give every live slot a token; returns batches that are done."""
        with torch.inference_mode(), planless_attention():
            free, waiting = self.slots - self._live, len(self._waiting)
            if waiting and free and (not self._live or free >= min(waiting, self.slots * REFILL_SHARE)):
                self._compact()
                self._prefill([self._waiting.popleft() for _ in range(min(free, waiting))])
                self._look(self._lag)
            if self._live:
                if self._size(self._live) < self._size(len(self._rows)):
                    self._compact()
                self._decode_one_token()
            self._look(self._lag if self._live else 0)
            return self._answer(self._lag if self._live else 0)

    def _size(self, live: int) -> int:
        """In how many rows ``live`` of them are stepped."""
        return next((size for size in self._sizes if size >= live), live)

    def _prefill(self, requests: list[Request]) -> None:
        """Read the prefixes of ``requests`` into the slots after the live ones, and choose their first tokens."""
        rows = slice(self._live, self._live + len(requests))
        for row, request in enumerate(requests, self._live):
            request.row, request.born = row, self.clock
        self._rows += requests
        self._live = rows.stop
        self.search.admit(rows, [(request.batch.seeds[request.place], request.sample) for request in requests])
        prefix, memory = _gather(requests)
        logits = self.decoder.prefill(prefix, memory, self.cache, rows.start)
        self.search.advance(logits[:, None], rows)
        self._ask(rows)

    def _decode_one_token(self) -> None:
        self.clock += 1
        longest = self.clock - min(request.born for request in self._rows if request is not None)
        bucket = TOKEN_BUCKET if self._sizes else 1
        tokens = min(-(-longest // bucket) * bucket, self.options.max_new_tokens)
        self.step(self._size(len(self._rows)), tokens)
        self._ask(slice(0, len(self._rows)))

    def _ask(self, rows: slice) -> None:
        """Send for the flags of ``rows``, and for their tokens where stop texts are looked for."""
        wanted = [self.search.flags[rows]]
        if self.stop.texts and not self.search.asks_host:
            wanted.append(self.search.last_ids(rows)[:, 0])
        self._looks.append((self._rows[rows], HostCopy(wanted)))

    def _look(self, lag: int) -> None:
        """See who is finished, but for the last ``lag`` steps, and let them leave their slots."""
        while len(self._looks) > lag:
            requests, copy = self._looks.popleft()
            flags, *tokens = (values.tolist() for values in copy.read())
            leaving = [
                request
                for place, request in enumerate(requests)
                if request is not None and not request.left and self._is_finished(request, place, flags, *tokens)
            ]
            if leaving:
                self._vacate(leaving)

    def _is_finished(self, request: Request, place: int, flags: list[int], tokens: list[int] | None = None) -> bool:
        if tokens is None:
            return flags[place] == FINISHED
        request.tokens.append(tokens[place])
        return flags[place] == FINISHED or (flags[place] == WATCHED and self.stop.ends_text(request.tokens))

    def _vacate(self, leaving: list[Request]) -> None:
        rows = index([request.row for request in leaving], self.decoder.device)
        self._leaving.append((leaving, HostCopy(self.search.collect(rows))))
        self.search.flags.index_fill_(0, rows, FINISHED)
        for request in leaving:
            request.left = True
            self._rows[request.row] = None
        self._live -= len(leaving)

    def _compact(self) -> None:
        """Move live slots to the front."""
        movers = [request for request in self._rows[self._live :] if request is not None]
        gaps = [row for row, request in enumerate(self._rows[: self._live]) if request is None]
        if gaps:
            device = self.decoder.device
            origin, goal = index([request.row for request in movers], device), index(gaps, device)
            longest = min(self.clock - min(request.born for request in movers), self.options.max_new_tokens)
            self.cache.move(origin, goal, self.lengths[0] + longest * self.search.beams)
            for tensor in self.search.state():
                tensor[goal] = tensor[origin]
            for request, row in zip(movers, gaps, strict=True):
                self._rows[row], request.row = request, row
        del self._rows[self._live :]
        self.search.flags[self._live :] = FINISHED

    def _answer(self, lag: int) -> list[FrameBatch]:
        """Hand out captions that have left their slots, but for the last ``lag`` lots; the batches that are done."""
        done: list[FrameBatch] = []
        while len(self._leaving) > lag:
            requests, copy = self._leaving.popleft()
            drafts = self.search.drafts(copy.read(), [len(request.tokens) for request in requests])
            texts = iter(self.stop.candidates([draft for own in drafts for draft in own]))
            for request, own in zip(requests, drafts, strict=True):
                batch = request.batch
                batch.found[request.place][request.sample] = [next(texts) for _ in own]
                batch.missing -= 1
                if not batch.missing:
                    done.append(batch)
        return done


def decode_step(
    decoder: RuGpt, cache: KvCache, search: Stepwise | BeamSearch, prefix_len: int, rows: int, tokens: int
) -> None:
    """Feed the last tokens of slots 0 … ``rows`` - 1 and choose the next; none has more than ``tokens``.

    It reads and writes tensors that were allocated beforehand and never asks the host, so that it can be captured.
    """
    live = slice(0, rows)
    steps, ancestors = search.steps[live], None if search.ancestors is None else search.ancestors[live]
    cache.start_step(live, prefix_len, steps, ancestors, tokens)
    logits = decoder.decode_one_token(search.last_ids(live), prefix_len + (steps - 1).clamp_min_(0), cache)
    search.advance(logits, live)


def row_sizes(slots: int) -> tuple[int, ...]:
    """Numbers of rows in which steps are taken, each at most 1.5 times the one before: 16, 24, 32, 48 … ``slots``."""
    powers = [LEAST_ROWS << power for power in range(32)]
    return (*sorted(size for power in powers for size in (power, power * 3 // 2) if size < slots), slots)


def prepare(decoder: RuGpt, batch: FrameBatch) -> tuple[int, int]:
    """Put ``batch`` in the decoder's device and dtype, with bos for a prefix where it has none.

    Returns the lengths of its prefixes and memories. Raises BridgeMismatchError when it does not suit the decoder.
    """
    config, count = decoder.config, len(batch.seeds)
    given = batch.prefix if batch.prefix is not None else batch.memory
    if given is None:
        raise BridgeMismatchError("the bridge gave neither a prefix nor a memory; one of them is needed.")
    if config.cross_attention != (batch.memory is not None):
        raise BridgeMismatchError(
            f"decoder with cross-attention: {config.cross_attention}; "
            f"memory given: {batch.memory is not None}; bridge and decoder must agree."
        )
    if given.shape[-1] != config.n_embd or given.shape[0] != count:
        raise BridgeMismatchError(
            f"the bridge gave {list(given.shape)} for {count} frames; the decoder needs "
            f"[{count}, any, {config.n_embd}]."
        )
    with torch.inference_mode():
        prefix = _start(decoder, count) if batch.prefix is None else batch.prefix
        batch.prefix = prefix.to(decoder.device, decoder.dtype)
        if batch.memory is not None:
            batch.memory = batch.memory.to(decoder.device, decoder.dtype)
    return batch.prefix.shape[1], 0 if batch.memory is None else batch.memory.shape[1]


def _start(decoder: RuGpt, count: int) -> Tensor:
    """The bos embedding for each of ``count`` frames: [count, 1, E]."""
    bos = decoder.config.bos_token_id
    if bos is None:
        raise BridgeMismatchError("a decoder without a bos token needs a prefix to start from.")
    return decoder.embed(torch.full((count, 1), bos, device=decoder.device))


def _gather(requests: list[Request]) -> tuple[Tensor, Tensor | None]:
    """Prefixes [n, P, E] and memories [n, M, E] of requests."""
    prefixes = [request.batch.prefix[request.place] for request in requests if request.batch.prefix is not None]
    memories = [request.batch.memory[request.place] for request in requests if request.batch.memory is not None]
    return torch.stack(prefixes), torch.stack(memories) if memories else None
