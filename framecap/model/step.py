"""One decoding step, and the shapes it comes in.

``decode_step`` reads and writes tensors that were allocated beforehand and never asks the host, so that on a GPU
it is captured once per shape as a CUDA graph and replayed: a launch instead of some three hundred. On a CPU the
same function runs as it stands, in exactly the shape that is needed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from framecap.model.kv_cache import KvCache, whole_units
from framecap.model.rugpt import RuGpt
from framecap.model.stopping import Candidate

log = logging.getLogger(__name__)

# Flags of a slot: its caption is finished (or it has none), or may have completed a stop text: the host looks.
FINISHED, WATCHED = 1, 2

LEAST_BUCKET = 16  # fewer rows take as long
ENTRY_BUCKET = 16  # generated tokens
MOST_GRAPHS = 64

Step = Callable[[int, int], None]


class Search(Protocol):
    """How tokens are chosen, for slots 0 … n-1; each feeds ``beams`` tokens a step.

    ``steps`` int64 [slots]: tokens chosen so far. ``flags`` uint8 [slots]: FINISHED, WATCHED or 0; nothing of a
    finished slot changes any more. ``asks_host``: ``advance`` waits for the device, so it cannot be captured.
    """

    beams: int
    asks_host: bool
    steps: Tensor
    flags: Tensor

    def admit(self, rows: slice, seeds: list[tuple[int, int]]) -> None: ...

    def advance(self, logits: Tensor, rows: slice) -> None: ...

    def last_ids(self, rows: slice) -> Tensor: ...

    def seen(self, rows: slice, entries: int) -> Tensor: ...

    def collect(self, rows: Tensor) -> tuple[Tensor, ...]: ...

    def candidates(self, collected: tuple[Tensor, ...], place: int, length: int | None) -> list[Candidate]: ...

    def state(self) -> list[Tensor]: ...


@dataclass(frozen=True)
class Shapes:
    """In how many rows, and over how many generated tokens, steps are taken.

    ``rows``: sizes to choose from, rising (empty: any number of rows); ``tokens``: the cache is read up to a
    multiple of this; ``lag``: so many steps are under way when the host looks at the flags of one.
    """

    rows: tuple[int, ...] = ()
    tokens: int = 1
    lag: int = 0

    @classmethod
    def static(cls, slots: int) -> Shapes:
        """Few shapes, each at most 1.5 times the one before: 16, 24, 32, 48, 64 … ``slots``."""
        powers = [LEAST_BUCKET << power for power in range(32)]
        sizes = sorted(size for power in powers for size in (power, power * 3 // 2) if size < slots)
        return cls((*sizes, slots), ENTRY_BUCKET, 1)

    def rows_for(self, live: int) -> int:
        """The least size that holds ``live`` rows."""
        return next((size for size in self.rows if size >= live), live)

    def tokens_for(self, steps: int, limit: int) -> int:
        """The least length that holds ``steps`` tokens, at most ``limit``."""
        return min(-(-steps // self.tokens) * self.tokens, limit)


def decode_step(decoder: RuGpt, cache: KvCache, search: Search, prefix_len: int, rows: int, tokens: int) -> None:
    """Feed the last tokens of slots 0 … ``rows`` - 1 and choose the next; none has more than ``tokens``."""
    live = slice(0, rows)
    logits = decode_one_token(decoder, cache, search, prefix_len, live, tokens)
    search.advance(logits.float(), live)


def decode_one_token(
    decoder: RuGpt, cache: KvCache, search: Search, prefix_len: int, live: slice, tokens: int
) -> Tensor:
    """Logits [n, K, V] of what follows the last tokens."""
    fed = (search.steps[live] - 1).clamp_min_(0)
    places = torch.arange(search.beams, device=fed.device)
    columns = prefix_len + fed[:, None] * search.beams + places
    entries = tokens * search.beams
    mask = decoder.wte.weight.new_zeros(live.stop, 1, search.beams, whole_units(prefix_len + entries))
    mask[:, 0, :, prefix_len : prefix_len + entries].masked_fill_(~search.seen(live, entries), float("-inf"))
    mask[:, 0, :, prefix_len + entries :] = float("-inf")
    return decoder.decode_one_token(search.last_ids(live), prefix_len + fed, columns, mask, cache)


class Recorder(Protocol):
    """What ``GraphedStep`` records with; ``CudaGraphs`` on a GPU."""

    def warm_up(self, run: Callable[[], None]) -> None: ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]: ...


class CudaGraphs:
    """CUDA graphs in one memory pool: they never run at the same time and keep no result of their own.

    Written to torch's documentation and not yet run on a GPU; the tests record with a stand-in.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run on the stream that captures, so that libraries have their handles and workspaces there."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record ``run`` without running it; what replays it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class GraphedStep:
    """A step that is captured when a shape first occurs, and replayed from then on.

    The first step of a shape runs as it stands: it is the warm-up, and counts. At most ``MOST_GRAPHS`` shapes are
    captured, which is all of them for captions of up to 64 tokens; one warning tells of the others. Where capturing
    fails, all other shapes run as they stand, and one warning says so.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        self._works = True

    def __call__(self, rows: int, tokens: int) -> None:
        replay = self._replays.get((rows, tokens))
        run = functools.partial(self._step, rows, tokens)
        if replay is not None:
            replay()
        elif not self._works or len(self._replays) == MOST_GRAPHS:
            if self._works:
                self._works = False
                log.warning("%d shapes of a decoding step are captured; others run slower", MOST_GRAPHS)
            run()
        else:
            self._recorder.warm_up(run)
            try:
                self._replays[rows, tokens] = self._recorder.capture(run)
            except RuntimeError as error:
                self._works = False
                log.warning("a decoding step could not be captured as a CUDA graph, so steps run slower: %s", error)
