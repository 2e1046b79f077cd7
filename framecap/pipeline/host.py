"""The machine that a driver runs on: its clock, its threads, its name. The crash simulation passes one of its own.

Knows nothing of shards and stores.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol


class Background(Protocol):
    """A function that runs in the background."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has returned, for at most ``timeout`` seconds."""


class Host:
    """This machine and this process."""

    def now(self) -> float:
        """Seconds since the epoch, as this machine believes; machines differ."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""
        return time.monotonic()

    def date(self) -> datetime:
        """``now`` in UTC."""
        return datetime.fromtimestamp(self.now(), UTC)

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until ``event`` is set (True) or the seconds have passed (False)."""
        return event.wait(seconds)

    def start(self, function: Callable[[], None], name: str) -> Background:
        """Run ``function`` in a daemon thread."""
        thread = threading.Thread(target=function, name=name, daemon=True)
        thread.start()
        return thread

    def executor(self, threads: int, name: str) -> Executor:
        """A pool of at most ``threads`` threads."""
        return ThreadPoolExecutor(threads, thread_name_prefix=name)

    def name(self) -> str:
        """The host name."""
        return socket.gethostname()

    def boot(self) -> str:
        """This boot and process namespace: containers of one machine may share host name and boot, not pids."""
        path, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        return f"{path.read_text().strip()} {space.readlink()}" if path.exists() else ""

    def pid(self) -> int:
        """The id of this process."""
        return os.getpid()

    def process_start(self, pid: int) -> str | None:
        """When a process of this machine started, in the kernel's ticks; None if it is not there (or a zombie)."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]


THIS_HOST = Host()
