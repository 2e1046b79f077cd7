"""The host of a simulated driver: its clock, its background, its executor."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any
from unittest import mock

from framecap import stores
from framecap.pipeline import read
from framecap.pipeline.host import Background, Host
from simulation.world import Crash, Process, Task, World


class SimHost(Host):
    """What ``process`` believes of the time and of its machine."""

    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process

    def now(self) -> float:
        return self._world.now + self._process.machine.offset

    def monotonic(self) -> float:
        return self._world.now

    def sleep(self, seconds: float) -> None:
        self._world.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        until = self._world.now + seconds
        while not event.is_set() and self._world.now < until:
            self._world.sleep(min(5.0, until - self._world.now))
        return event.is_set()

    def start(self, function: Callable[[], None], name: str) -> Background:
        return _Background(self._world, self._world.spawn(function, name, self._process))

    def executor(self, threads: int, name: str) -> Executor:
        return _Executor(self._world)

    def name(self) -> str:
        return self._process.machine.name

    def boot(self) -> str:
        return f"{self._process.machine.name}-{self._process.machine.boots}"

    def pid(self) -> int:
        return self._process.pid

    def process_start(self, pid: int) -> str | None:
        machine = self._process.machine
        alive = (p for p in self._world.processes if p.machine is machine and p.pid == pid and not p.dead)
        return next((f"tick {p.pid}" for p in alive), None)


class _Background:
    def __init__(self, world: World, task: Task) -> None:
        self._world, self._task = world, task

    def join(self, timeout: float | None = None) -> None:
        until = self._world.now + (1e9 if timeout is None else timeout)
        while not self._task.ended and self._world.now < until:
            self._world.sleep(0.25)


class _Future(Future):  # type: ignore[type-arg]
    """A call that is made when somebody waits for it, or earlier."""

    def __init__(self, world: World, call: Callable[[], Any]) -> None:
        super().__init__()
        self._world, self._call = world, call
        self._made = False

    def make(self) -> None:
        if self._made:
            return
        self._made = True
        try:
            self.set_result(self._call())
        except Crash:  # whoever asks again dies again
            self._made = False
            raise
        except Exception as error:
            self.set_exception(error)

    def done(self) -> bool:
        if not self._made and self._world.chance.random() < 0.5:
            self.make()
        return self._made

    def cancel(self) -> bool:
        self._made = True
        return super().cancel()

    def result(self, timeout: float | None = None) -> Any:
        self.make()
        return super().result(timeout)


class _Executor(Executor):
    """Calls are made one at a time, at moments that chance picks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._futures: list[_Future] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        future = _Future(self._world, lambda: function(*arguments, **options))
        self._futures.append(future)
        future.done()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for future in self._futures:
            future.make()


class _Time:
    """The ``time`` of modules that wait for a store."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self._world.sleep(seconds)


@contextmanager
def simulated_time(world: World) -> Iterator[None]:
    """Waiting takes simulated time, and random names follow from the seed."""

    def uuid4() -> uuid.UUID:
        return uuid.UUID(int=world.chance.getrandbits(128), version=4)

    time = _Time(world)
    with (
        mock.patch.object(stores, "time", time),
        mock.patch.object(read, "time", time),
        mock.patch.object(uuid, "uuid4", uuid4),
    ):
        yield
