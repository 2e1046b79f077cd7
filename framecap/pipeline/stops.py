"""Reasons to stop in good order: SIGTERM, SIGINT, the time budget, a lost lock."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from framecap.errors import LockedError
from framecap.pipeline.host import THIS_HOST, Host


class StopRun(Exception):  # noqa: N818 - no error: the run ends early and says why
    """The run is to end now; the message says why."""


class Stops:
    """``with Stops(budget) as stops:`` signals only leave a note; ``stops.check()`` raises ``StopRun``."""

    def __init__(self, budget: float | None, host: Host = THIS_HOST) -> None:
        self._host = host
        self._deadline = None if budget is None else host.monotonic() + budget
        self._signal: str | None = None
        self._check: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}
        self._stderr = 2

    def __enter__(self) -> Self:
        self._stderr = os.dup(2)  # that of now: while Ray starts, 2 leads nowhere
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals; again after ``ray.init``, which installs handlers of its own."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._note)
                self._before.setdefault(number, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._stderr)

    def watch(self, check: Callable[[], None]) -> None:
        """Also ask ``check``, which raises ``LockedError`` when the run must stop."""
        self._check = check

    def check(self) -> None:
        """Raise ``StopRun`` if there is a reason to stop."""
        if self._signal is not None:
            raise StopRun(f"{self._signal} was received")
        if self._deadline is not None and self._host.monotonic() > self._deadline:
            raise StopRun("the time budget is spent")
        if self._check is not None:
            try:
                self._check()
            except LockedError as error:
                raise StopRun(str(error)) from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:  # asked twice: at once
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = signal.Signals(number).name
        # Logging takes locks, and this may have interrupted their holder.
        os.write(self._stderr, f"\n{self._signal}: stopping in good order; once more ends it at once\n".encode())
