"""One decoding loop for the calls of several threads, so that the frames of one call fill the slots that those of
another leave. No thread of its own: whoever calls turns the loop until its own frames are finished, for all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from framecap.model.decode_options import DecodeOptions
from framecap.model.slots import Frames, Job, SlotLoop


@dataclass(eq=False)
class Call:
    """Frames that one thread waits for; ``rows`` sequences at most are of use to them."""

    frames: Frames
    jobs: list[Job]
    options: DecodeOptions
    rows: int


class SharedLoop:
    """``take`` gives a loop for (options, first job, rows) and ``keep`` takes it back when it is idle."""

    def __init__(self, take: Callable[[DecodeOptions, Job, int], SlotLoop], keep: Callable[[SlotLoop], None]) -> None:
        self._take, self._keep = take, keep
        self._turning = threading.Lock()
        self._arrived: deque[Call] = deque()
        # The rest is only touched by the thread that turns.
        self._under_way: list[Call] = []
        self._waiting: deque[Job] = deque()
        self._loop: SlotLoop | None = None

    def run(self, call: Call) -> None:
        """Return when all of the call's frames are finished. An error of the device ends the call that was
        turning the loop; the frames of others start again, with the same result."""
        self._arrived.append(call)
        with self._turning:
            try:
                while not call.frames.done:
                    self._turn()
            except BaseException:
                self._start_again(call)
                raise

    def _turn(self) -> None:
        while self._arrived and self._lets_in(self._arrived[0]):
            call = self._arrived.popleft()
            self._under_way.append(call)
            self._waiting.extend(call.jobs)
        if self._loop is None:
            return
        for job, candidates in self._loop.turn(self._waiting):
            job.frames.add(job, candidates)
        self._under_way = [call for call in self._under_way if not call.frames.done]
        if not self._under_way:
            self._keep(self._loop)
            self._loop = None

    def _lets_in(self, call: Call) -> bool:
        """Whether the call's frames fit the loop; one that does not waits until the loop is idle."""
        first = call.jobs[0]
        if self._loop is None:
            self._loop = self._take(call.options, first, call.rows)
        return self._loop.fits(call.options, first)

    def _start_again(self, failed: Call) -> None:
        self._loop = None
        self._waiting.clear()
        others = [call for call in (*self._under_way, *self._arrived) if call is not failed]
        for call in others:
            call.frames.clear()
        self._under_way.clear()
        self._arrived = deque(others)
