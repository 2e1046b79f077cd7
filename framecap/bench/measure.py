"""Contestants side by side: interleaved rounds, medians, peak memory, and whether their results agree."""

from __future__ import annotations

import gc
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

Clock = Literal["wall", "cpu"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Work:
    """What a frame costs on paper: floating-point operations, and bytes that must move."""

    operations: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Contestant:
    """``run`` processes ``frames`` frames. ``result`` turns its return value into one value a frame that must
    equal the first contestant's (None: nothing to compare); ``subset`` says which of the first contestant's
    frames these are (None: all). ``peer`` is False for framecap's own."""

    name: str
    frames: int
    run: Callable[[], Any]
    peer: bool = True
    result: Callable[[Any], Sequence[Any]] | None = None
    subset: Sequence[int] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. ``ratio``: framecap's frames/s (the stage's first row) over this row's, of the
    medians; ``agreement``: share of results equal to the first row's; ``roofline``: share of what the
    ceilings allow; memory: peak in MiB while it ran, of the process, or of what it added to a GPU's memory (what
    others keep there is not its own; its warm-up counts). A peer that failed has none of these, no ``seconds``,
    and says why in its ``note``."""

    stage: str
    contestant: str
    frames_per_second: float | None
    ratio: float | None
    seconds: tuple[float, ...]
    frames: int
    peer: bool
    peak_mib: float | None = None
    roofline: float | None = None
    agreement: float | None = None
    note: str = ""


@dataclass
class _Log:
    seconds: list[float] = field(default_factory=list)
    peak: float | None = None
    result: Any = None
    failure: str = ""


@dataclass(frozen=True)
class Stopwatch:
    """How rounds are timed: ``cpu`` counts this process's own CPU seconds, for a machine that others use."""

    repeats: int
    clock: Clock
    device: torch.device

    def compare(self, stage: str, contestants: Sequence[Contestant]) -> list[Row]:
        """``repeats`` rounds, each from another contestant on; on a GPU all run once before, to warm up.

        A peer that raises, whatever its libraries do, is left out from there on and gets an empty row that says
        why; what framecap's own raise is raised.
        """
        _release(self.device)  # what the last comparison kept for its rounds
        logs = [_Log() for _ in contestants]
        if self.device.type == "cuda":
            for contestant, log in zip(contestants, logs, strict=True):
                self._attempt(contestant, log)
                log.seconds.clear()
        for turn in range(self.repeats):
            for place in range(len(contestants)):
                index = (place + turn) % len(contestants)
                self._attempt(contestants[index], logs[index])
        return [_row(stage, contestants, logs, index) for index in range(len(contestants))]

    def _attempt(self, contestant: Contestant, log: _Log) -> None:
        if log.failure:
            return
        try:
            self._time(contestant.run, log)
        except Exception as error:
            if not contestant.peer:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())
            log.failure = f"failed: {textwrap.shorten(reason, 120)}"
        if log.failure:  # only here is the error gone, and with it what its traceback held
            log.seconds, log.peak, log.result = [], None, None
            _release(self.device)

    def _time(self, run: Callable[[], Any], log: _Log) -> None:
        now = CLOCKS[self.clock]
        there = _reset_peak(self.device)
        self._wait()
        start = now()
        log.result = run()
        self._wait()
        log.seconds.append(now() - start)
        if (peak := _peak_mib(self.device)) is not None:
            log.peak = max(log.peak or 0.0, peak - there)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Ceilings:
    """What this device can do, measured: operations and bytes per second."""

    operations: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """The least time for ``work``."""
        return max(work.operations / self.operations, work.bytes / self.bytes)

    def mark(self, row: Row, work: Work) -> Row:
        """The row with its share of the roofline, for frames that cost ``work`` each."""
        rate = row.frames_per_second
        return row if rate is None else replace(row, roofline=self.seconds(work) * rate)


def measure_ceilings(watch: Stopwatch, dtype: torch.dtype, seconds: float = 0.5) -> Ceilings:
    """Best of several matrix products and copies, within about ``seconds`` each, on the stopwatch's clock."""
    device = watch.device
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    operations = 2 * side**3 / _fastest(watch, lambda: torch.mm(left, right, out=out), seconds)
    block = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)  # larger than the caches
    target = torch.empty_like(block)
    moved = 2 * block.nbytes / _fastest(watch, lambda: target.copy_(block), seconds)
    return Ceilings(operations, moved)


def _fastest(watch: Stopwatch, run: Callable[[], object], seconds: float) -> float:
    log, until = _Log(), time.perf_counter() + seconds
    while len(log.seconds) < 3 or time.perf_counter() < until:
        watch._time(run, log)
    return min(log.seconds)


def _row(stage: str, contestants: Sequence[Contestant], logs: Sequence[_Log], index: int) -> Row:
    (first, contestant), (first_log, log) = (contestants[0], contestants[index]), (logs[0], logs[index])
    rate, best = _rate(contestant, log), _rate(first, first_log)
    return Row(
        stage=stage,
        contestant=contestant.name,
        frames_per_second=rate,
        ratio=best / rate if best and rate else None,
        seconds=tuple(log.seconds),
        frames=contestant.frames,
        peer=contestant.peer,
        peak_mib=log.peak,
        agreement=None if log.failure or first_log.failure else _agreement(first, first_log, contestant, log),
        note=log.failure,
    )


def _rate(contestant: Contestant, log: _Log) -> float | None:
    return contestant.frames / statistics.median(log.seconds) if log.seconds else None


def _agreement(first: Contestant, first_log: _Log, contestant: Contestant, log: _Log) -> float | None:
    if contestant.result is None or first.result is None:
        return None
    ours, theirs = first.result(first_log.result), contestant.result(log.result)
    if contestant.subset is not None:
        ours = [ours[place] for place in contestant.subset]
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> float:
    """Begin anew; the MiB that do not count: what lies in a GPU's memory now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    with suppress(OSError):  # Linux only; elsewhere the memory column stays empty
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return 0.0


def _peak_mib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next(float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
