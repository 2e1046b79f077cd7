"""One run per output folder: a lock file with a heartbeat, which expires or is taken over from a dead run.

Two holders would do no damage (every file is published atomically and determined by its content), only
double work; so the lock favours simplicity. Knows nothing of shards.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from framecap.errors import LockedError, StorageError
from framecap.storage import is_local, open_fs, read_bytes, write_bytes_atomic

log = logging.getLogger(__name__)


class OutputLock:
    """``with OutputLock(uri, run_id, expiry):`` holds the lock; ``check()`` raises if it was lost."""

    def __init__(self, uri: str, run_id: str, expiry: float) -> None:
        self._uri, self._expiry = uri, expiry
        self._me: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "run_id": run_id,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "expiry_s": expiry,
        }
        self._made: list[Path] = []  # folders that were not there before, the lowest first
        self._ended = threading.Event()
        self._lost: str | None = None
        self._heart = threading.Thread(target=self._beat, name="framecap-lock", daemon=True)

    def __enter__(self) -> Self:
        """Raises ``LockedError`` naming the holder, or ``StorageError`` if the place cannot be written."""
        if is_local(self._uri):
            self._made = [folder for folder in Path(open_fs(self._uri)[1]).parents if not folder.exists()]
        with _one_at_a_time(self._uri):
            for _ in range(3):
                if self._create():
                    self._heart.start()
                    return self
                holder = _read(self._uri)
                if holder is not None and not _is_void(holder):
                    raise LockedError(f"{self._uri} is held by {_describe(holder)}; wait for it, or stop it")
                if holder is not None:
                    log.warning("taking over the lock of %s", _describe(holder))
                self._remove(holder)
        raise LockedError(f"{self._uri} is being taken by another run; try again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join(timeout=5)
        try:
            holder = _read(self._uri)
            if holder is not None and holder.get("token") == self._me["token"]:
                self._remove(holder)
        except OSError as failure:
            log.warning("the lock %s cannot be removed (%s); it expires", self._uri, failure)
        for folder in self._made:
            with suppress(OSError):  # not empty: something was written
                folder.rmdir()

    @property
    def lost(self) -> bool:
        """Whether another run was seen to hold the lock."""
        return self._lost is not None

    def check(self) -> None:
        """Raises ``LockedError`` if another run holds the lock by now."""
        if self._lost is not None:
            raise LockedError(self._lost)

    def _content(self) -> bytes:
        return json.dumps({**self._me, "heartbeat": time.time()}).encode()

    def _create(self) -> bool:
        fs, path = open_fs(self._uri)
        try:
            if is_local(self._uri):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                # Written whole and then linked: no reader ever sees half a lock.
                temporary = f"{path}.{self._me['token']}"
                Path(temporary).write_bytes(self._content())
                try:
                    os.link(temporary, path)
                finally:
                    Path(temporary).unlink()
            else:
                fs.invalidate_cache()
                if fs.exists(path):
                    return False
                fs.pipe_file(path, self._content(), mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(f"{self._uri} cannot be written: {error}") from error
        return True

    def _remove(self, holder: dict[str, Any] | None) -> None:
        """Remove a void lock; locally by a rename, which only one of two rivals can win."""
        fs, path = open_fs(self._uri)
        try:
            if is_local(self._uri):
                grave = Path(f"{path}.{self._me['token']}.void")
                Path(path).rename(grave)
                grave.unlink()
            else:
                fs.rm_file(path)
        except FileNotFoundError:
            log.debug("the lock %s was already gone (%s)", self._uri, holder)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._expiry / 4):
            begun = time.monotonic()
            try:
                holder = _read(self._uri)
                if holder is None or holder.get("token") != self._me["token"]:
                    self._lost = f"{self._uri} was taken over by {_describe(holder or {})}; this run stops"
                    return
                write_bytes_atomic(self._uri, self._content())
                last = begun
            except Exception as error:  # whatever it is, the lock must go on being kept
                log.warning("heartbeat of %s failed: %s", self._uri, error)
                if begun - last > self._expiry:
                    self._lost = f"{self._uri} could not be renewed for {begun - last:.0f} s; this run stops"
                    return


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Between rivals of one file system: read, remove, create without another in between. The kernel's lock is
    on the folder, so that nothing is left behind; object stores have none, there a heartbeat notices a rival."""
    if not is_local(uri):
        yield
        return
    folder = Path(open_fs(uri)[1]).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StorageError(f"{uri} cannot be written: {error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(uri: str) -> dict[str, Any] | None:
    fs, _ = open_fs(uri)
    fs.invalidate_cache()
    try:
        content = json.loads(read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_void(holder: dict[str, Any]) -> bool:
    """Expired, or of a process of this very machine that no longer runs."""
    if time.time() - float(holder.get("heartbeat", 0)) > float(holder.get("expiry_s", 0)):
        return True
    if holder.get("host") != socket.gethostname() or holder.get("boot") != _boot_id():
        return False
    return _process_start(int(holder.get("pid", -1))) != holder.get("process_start")


def _describe(holder: dict[str, Any]) -> str:
    age = time.time() - float(holder.get("heartbeat", 0))
    return (
        f"run {holder.get('run_id', '?')} (host {holder.get('host', '?')}, pid {holder.get('pid', '?')}, "
        f"last heartbeat {age:.0f} s ago)"
    )


def _boot_id() -> str:
    """This boot and process namespace: containers of one machine may share host name and boot, not pids."""
    path, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{path.read_text().strip()} {space.readlink()}" if path.exists() else ""


def _process_start(pid: int) -> str | None:
    """When the process started, in the kernel's ticks; None if it is not there (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
