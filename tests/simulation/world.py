"""Simulated time: tasks that take turns, processes that die or stand still, and what goes wrong when.

Every task is a thread, but only the one that holds the baton runs; it hands the baton on when it sleeps. What
happens depends on the seed alone: no real clock, no thread timing, no order of hashes.
"""

from __future__ import annotations

import errno
import heapq
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

T = TypeVar("T")
EPOCH = 1_800_000_000.0
MOST_OPERATIONS = 20_000


class Crash(BaseException):
    """The process of this task is dead: unwinds its frames, none of which can reach a store any more."""


class EndlessHistoryError(Exception):
    """A history takes more operations than any should, or nobody can go on."""


@dataclass
class Machine:
    """A host: its clock differs from the true one by ``offset`` seconds."""

    name: str
    offset: float = 0.0
    boots: int = 0


@dataclass
class Process:
    """A driver, or the workers of a run. ``dead``: killed, or lost with its machine."""

    name: str
    machine: Machine
    pid: int
    dead: bool = False
    crash_at: int | None = None  # the number of its operation at which it dies
    machine_dies: bool = False  # then its machine dies with it
    operations: int = 0
    stopped_until: float = 0.0  # SIGSTOP, a frozen virtual machine
    stumbled: int = 0  # operations of this process that failed
    failed: Counter[str] = field(default_factory=Counter)  # by path
    beats: list[float] = field(default_factory=list)  # when its lock was written


class Task:
    """A thread of a process."""

    def __init__(self, name: str, process: Process | None) -> None:
        self.name, self.process = name, process
        self.baton = threading.Lock()
        self.baton.acquire()
        self.ticket = 0
        self.ended = False

    def __lt__(self, other: Task) -> bool:
        return False


@dataclass
class Faults:
    """How often an operation goes wrong; drawn for each history, and put to zero for its last runs."""

    error: float = 0.0
    lost_answer: float = 0.0
    slow: float = 0.0
    stall: float = 0.0


class World:
    """One history: time, tasks, chance, what was done and what went wrong."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.now = EPOCH
        self.faults = Faults()
        self.outages: list[tuple[float, float]] = []
        self.operations = self.faults_met = 0
        self.history: list[str] = []
        self.processes: list[Process] = []
        self.on_death: list[Callable[[Process, bool], None]] = []
        self._queue: list[tuple[float, float, int, Task]] = []
        self._tasks: list[Task] = []
        self.controller = Task("history", None)
        self.current = self.controller
        self._failure: BaseException | None = None

    # ---- tasks -------------------------------------------------------------------------------------------------
    def spawn(self, function: Callable[[], None], name: str, process: Process, delay: float = 0.0) -> Task:
        """Run ``function`` as a task of ``process`` from ``delay`` seconds on."""
        task = Task(name, process)

        def body() -> None:
            try:
                if not process.dead:
                    function()
            except Crash:
                pass
            except BaseException as error:  # reported by the controller
                self._failure = self._failure or error
            task.ended = True
            self._hand_on(task)

        self._tasks.append(task)
        _Thread.run(task, body)
        self._push(task, self.now + delay)
        return task

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass for the current task; others act meanwhile."""
        task = self.current
        self._check_alive(task)
        self._push(task, self.now + seconds)
        self._hand_on(task)
        self._check_alive(task)

    def end(self) -> None:
        """Let every task that is left unwind, so that its thread is free again."""
        for process in self.processes:
            process.dead = True
        for task in self._tasks:
            if not task.ended:
                self._failure = None
                self._push(task, self.now)
        while any(not task.ended for task in self._tasks):
            self._failure = None
            self._push(self.controller, self.now + 1)
            self._hand_on(self.controller)

    def wake(self, task: Task) -> None:
        """End the sleep of ``task`` now."""
        if not task.ended and task is not self.current:
            self._push(task, self.now)

    def _check_alive(self, task: Task) -> None:
        if self._failure is not None and task is self.controller:
            failure, self._failure = self._failure, None
            raise failure
        if task.process is not None and task.process.dead:
            raise Crash

    def _push(self, task: Task, when: float) -> None:
        task.ticket += 1
        heapq.heappush(self._queue, (when, self.chance.random(), task.ticket, task))

    def _hand_on(self, task: Task) -> None:
        following = self._next()
        if following is task:
            return
        self.current = following
        following.baton.release()
        if not task.ended:
            task.baton.acquire()

    def _next(self) -> Task:
        if self._failure is not None:
            return self.controller
        while self._queue:
            when, _, ticket, task = heapq.heappop(self._queue)
            if ticket != task.ticket or task.ended:  # woken earlier
                continue
            process = task.process
            if process is not None and not process.dead and process.stopped_until > max(when, self.now):
                self._push(task, process.stopped_until)
                continue
            self.now = max(self.now, when)
            return task
        self._failure = EndlessHistoryError("nobody can go on")
        return self.controller

    # ---- what goes wrong ---------------------------------------------------------------------------------------
    def note(self, text: str) -> None:
        """A line of the history."""
        who = self.current.process.name if self.current.process else "history"
        self.history.append(f"{self.now - EPOCH:9.2f} {who:<8} {text}")

    def kill(self, process: Process, with_machine: bool = False) -> None:
        """SIGKILL, or the loss of the whole machine."""
        victims = [process]
        if with_machine:
            process.machine.boots += 1
            victims = [p for p in self.processes if p.machine is process.machine and not p.dead]
        self.faults_met += 1
        self.note(f"{process.name} {'is lost with its machine' if with_machine else 'is killed'}")
        for victim in victims:
            victim.dead = True
            for hook in self.on_death:
                hook(victim, with_machine)
            for task in self._tasks:
                if task.process is victim:
                    self.wake(task)

    def operate(self, name: str, path: str, effect: Callable[[], T], error: Callable[[], Exception]) -> T:
        """One operation of the current task on a store: how long it takes, and whether it goes wrong, chance says."""
        task = self.current
        process = task.process
        if process is None:  # the history's own
            return effect()
        self._check_alive(task)
        self.operations += 1
        process.operations += 1
        if self.operations > MOST_OPERATIONS:
            raise EndlessHistoryError(f"more than {MOST_OPERATIONS} operations")
        chance, faults = self.chance, self.faults
        before, after = 0.001 + 0.03 * chance.random(), 0.001 + 0.02 * chance.random()
        luck = chance.random()
        if luck < faults.stall:
            after += chance.uniform(20, 300)
        elif luck < faults.stall + faults.slow:
            before, after = before + chance.uniform(0, 15), after + chance.uniform(0, 15)
        dies = process.crash_at is not None and process.operations >= process.crash_at
        dies_before = dies and chance.random() < 0.5
        self.sleep(before)
        if dies_before:
            self._die(process, f"before {name} {path}")
        luck = chance.random()
        is_out = any(start <= self.now < end for start, end in self.outages)
        if is_out or luck < faults.error:
            self._stumble(process, f"{name} {path} fails", path)
            raise error()
        result = effect()
        self.sleep(after)
        if dies:
            self._die(process, f"after {name} {path}")
        if luck < faults.error + faults.lost_answer:
            self._stumble(process, f"{name} {path}: answer lost", path)
            raise error()
        return result

    def _stumble(self, process: Process, text: str, path: str) -> None:
        self.faults_met += 1
        process.stumbled += 1
        process.failed[path] += 1
        self.note(text)

    def _die(self, process: Process, moment: str) -> None:
        self.note(f"dies {moment}")
        self.kill(process, process.machine_dies)
        raise Crash


def transient() -> Exception:
    """What an object store says when it is busy."""
    return OSError(errno.EBUSY, "SlowDown: please reduce your request rate")


class _Thread:
    """A thread that runs one task after another: starting one costs more than most operations."""

    _idle: ClassVar[list[_Thread]] = []

    def __init__(self) -> None:
        self._given = threading.Lock()
        self._given.acquire()
        self._job: tuple[Task, Callable[[], None]] | None = None
        threading.Thread(target=self._loop, daemon=True).start()

    @classmethod
    def run(cls, task: Task, body: Callable[[], None]) -> None:
        """Run ``body`` once ``task`` gets the baton."""
        thread = cls._idle.pop() if cls._idle else cls()
        thread._job = (task, body)
        thread._given.release()

    def _loop(self) -> None:
        while True:
            self._given.acquire()
            if self._job is not None:
                task, body = self._job
                self._job = None
                task.baton.acquire()
                body()
                del task, body
            self._idle.append(self)
