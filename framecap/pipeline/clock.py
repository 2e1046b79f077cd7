"""What time it is and how to wait: one object, so that a simulation can pass in a clock of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


def _wait(ended: threading.Event, seconds: float) -> bool:
    return ended.wait(seconds)


@dataclass(frozen=True)
class Clock:
    """``now``: seconds since the epoch; ``monotonic``: seconds that never go back; ``wait(ended, seconds)``: sleep
    until ``ended`` is set (True) or the seconds have passed (False)."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    wait: Callable[[threading.Event, float], bool] = _wait


SYSTEM_CLOCK = Clock()
