"""CUDA graphs: a function that only launches kernels is recorded once per shape, then replayed by one launch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

MOST_GRAPHS = 64

# A function of a shape: of rows, and of a length.
Run = Callable[[int, int], None]
# Makes a run one that is captured.
Graphs = Callable[[Run], Run]
# Runs what it is given, records it, and returns what replays it.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CudaGraphs:
    """A ``run`` that is captured when a shape first occurs, and replayed from then on.

    It must read and write tensors that were allocated beforehand, and never ask the host. The first run of a shape runs
    as it stands: it is the warm-up, and counts. At most ``MOST_GRAPHS`` shapes are captured; one warning tells of the
    others. Where capturing fails, all other shapes run as they stand, and one warning says so. ``capture``: CUDA's, or
    a stand-in for a test.
    """

    def __init__(self, run: Run, capture: Capture | None = None) -> None:
        self._run, self._capture = run, capture or cuda_capture()
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        self._works = True

    def __call__(self, rows: int, length: int) -> None:
        replay = self._replays.get((rows, length))
        if replay is not None:
            replay()
        elif self._works and len(self._replays) < MOST_GRAPHS:
            self._record(rows, length)
        else:
            if self._works:
                self._works = False
                log.warning("%d shapes of a decoding step are captured; others run slower", MOST_GRAPHS)
            self._run(rows, length)

    def _record(self, rows: int, length: int) -> None:
        ran = False

        def run() -> None:
            nonlocal ran
            self._run(rows, length)
            ran = True

        try:
            self._replays[rows, length] = self._capture(run)
        except RuntimeError as error:
            if not ran:  # not capturing failed, but the work itself
                raise
            self._works = False
            log.warning("a decoding step could not be captured as a CUDA graph, so steps run slower: %s", error)


def cuda_capture() -> Capture:
    """Captures into one memory pool: the graphs never run at the same time and keep no result of their own."""
    return functools.partial(_capture, torch.cuda.graph_pool_handle(), torch.cuda.Stream())


def _capture(pool: Any, stream: torch.cuda.Stream, run: Callable[[], None]) -> Callable[[], None]:
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # the warm-up: libraries get their handles and workspaces there
        run()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process may go on using the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay
