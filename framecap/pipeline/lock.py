"""One run per output folder: a lock file with a heartbeat, which expires or is taken over from a dead run.

Two holders would do no damage (every file is published atomically and determined by its content), only
double work; so the lock favours simplicity. Needs no hard links and no file locks of the file system. How old a
lock is, the place where it lies says, not the clock of the machine that wrote it. Knows nothing of shards.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from framecap.errors import LockedError, StorageError, StoreUnavailableError
from framecap.pipeline.host import THIS_HOST, Background, Host
from framecap.storage import is_local, naming, open_fs, read_bytes, write_bytes_atomic

log = logging.getLogger(__name__)
_NO_FILE_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}  # network and FUSE mounts


class OutputLock:
    """``with OutputLock(uri, run_id, expiry):`` holds the lock; ``check()`` raises if it was lost.

    ``expiry``: seconds without a heartbeat after which others may take the lock over; the heartbeat, four times in
    that, runs in the background of ``host``.
    """

    def __init__(self, uri: str, run_id: str, expiry: float, host: Host = THIS_HOST) -> None:
        self._uri, self._expiry, self._host = uri, expiry, host
        self._me: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "run_id": run_id,
            "host": host.name(),
            "boot": host.boot(),
            "pid": host.pid(),
            "process_start": host.process_start(host.pid()),
            "expiry_s": expiry,
        }
        self._made: list[Path] = []  # folders that were not there before, the lowest first
        self._ended = threading.Event()
        self._lost: str | None = None
        self._renewed = host.monotonic()
        self._heart: Background | None = None

    def __enter__(self) -> Self:
        """Raises ``LockedError`` naming the holder, or ``StorageError`` if the place cannot be written."""
        if is_local(self._uri):
            self._made = [folder for folder in Path(open_fs(self._uri)[1]).parents if not folder.exists()]
        with _one_at_a_time(self._uri):
            for _ in range(3):
                if self._create():
                    self._renewed = self._host.monotonic()
                    self._heart = self._host.start(self._beat, "framecap-lock")
                    return self
                holder = _read(self._uri)
                if holder is not None and not self._is_stale(holder):
                    raise LockedError(f"{self._uri} is held by {self._describe(holder)}; wait for it, or stop it")
                if holder is not None:
                    log.warning("taking over the lock of %s", self._describe(holder))
                self._remove(holder)
        raise LockedError(f"{self._uri} is being taken by another run; try again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._heart is not None:
            self._heart.join(timeout=5)
        try:
            holder = _read(self._uri)
            if holder is not None and self._is_mine(holder):
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

    def renew(self) -> None:
        """Write a new heartbeat. A failure is logged; only an expiry without any, or another holder, loses the lock."""
        begun = self._host.monotonic()
        try:
            holder = _read(self._uri)
            if holder is None or not self._is_mine(holder):
                self._lost = f"{self._uri} was taken over by {self._describe(holder or {})}; this run stops"
                return
            if self._ended.is_set():  # the lock is being given up: it must not come back
                return
            write_bytes_atomic(self._uri, self._content())
            self._renewed = begun
        except Exception as error:  # whatever it is, the lock must go on being kept
            log.warning("heartbeat of %s failed: %s", self._uri, error)
            if begun - self._renewed > self._expiry:
                self._lost = f"{self._uri} could not be renewed for {begun - self._renewed:.0f} s; this run stops"

    def _beat(self) -> None:
        while self._lost is None and not self._host.wait(self._ended, self._expiry / 4):
            self.renew()

    def _content(self) -> bytes:
        return json.dumps({**self._me, "heartbeat": self._host.now()}).encode()

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return bool(holder.get("token") == self._me["token"])

    def _create(self) -> bool:
        """Whether the lock is this run's now; False if somebody holds it.

        A store may have written the lock and lost its answer: then the lock holds this run's token.
        """
        try:
            if is_local(self._uri):
                _create_file(Path(open_fs(self._uri)[1]), self._content())
            else:
                fs, path = open_fs(self._uri)
                fs.invalidate_cache()
                if fs.exists(path):
                    return False
                fs.pipe_file(path, self._content(), mode="create")
        except OSError as error:
            return self._was_created(error)
        return True

    def _was_created(self, error: OSError) -> bool:
        """What ``error`` of the creation meant: the answer was lost (True), somebody holds the lock (False).

        Raises ``StorageError`` if there is no lock.
        """
        if is_local(self._uri) and isinstance(error, FileNotFoundError):
            return False  # another run that ended took the folder away, which it had made
        try:
            holder = None if is_local(self._uri) else _read(self._uri)
        except OSError:
            holder = None
        if holder is None and not isinstance(error, FileExistsError):
            raise naming(error, f"{self._uri} cannot be written") from error
        return holder is not None and self._is_mine(holder)

    def _remove(self, holder: dict[str, Any] | None) -> None:
        """Remove a stale lock; locally by a rename, which only one of two rivals can win."""
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

    def _is_stale(self, holder: dict[str, Any]) -> bool:
        """Expired, or of a process of this very machine that no longer runs.

        ``holder`` is {} where the lock cannot be read: it is being written, or its writer was killed.
        """
        expiry = _number(holder.get("expiry_s"), self._expiry)
        age = self._age(holder)
        if age > expiry:
            return True
        if holder.get("host") == self._host.name() and holder.get("boot") == self._host.boot():
            return self._host.process_start(int(_number(holder.get("pid"), -1))) != holder.get("process_start")
        return age < -expiry and self._stands_still(holder, expiry)

    def _age(self, holder: dict[str, Any]) -> float:
        """Seconds since the last heartbeat, by the modification time that the place gives: the holder's clock may be
        wrong. A store that tells none leaves the time that the holder wrote."""
        if is_local(self._uri):
            return _local_age(Path(open_fs(self._uri)[1]))
        age = _remote_age(self._uri)
        return self._host.now() - _number(holder.get("heartbeat"), 0.0) if age is None else age

    def _stands_still(self, holder: dict[str, Any], seconds: float) -> bool:
        """Whether a lock from the future goes without a heartbeat for ``seconds`` by this machine's clock."""
        log.warning("the lock of %s is from the future; watching it for %.0f s", self._describe(holder), seconds)
        begun = self._host.monotonic()
        while self._host.monotonic() - begun < seconds:
            self._host.wait(self._ended, seconds / 8)
            if _read(self._uri) != holder:
                return False
        return True

    def _describe(self, holder: dict[str, Any]) -> str:
        age = self._host.now() - _number(holder.get("heartbeat"), 0.0)
        beat = f"last heartbeat {age:.0f} s ago" if "heartbeat" in holder else "no heartbeat"
        return f"run {holder.get('run_id', '?')} (host {holder.get('host', '?')}, pid {holder.get('pid', '?')}, {beat})"


def holder_of(uri: str, host: Host = THIS_HOST) -> str | None:
    """Who holds the lock at ``uri``, in words; None if nobody does."""
    holder = _read(uri)
    return None if holder is None else OutputLock(uri, "", 0.0, host)._describe(holder)


def _create_file(path: Path, content: bytes) -> None:
    """Create ``path``, which must not exist. A reader may see it before its content: that is a lock of age 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno == errno.ESTALE:  # gcsfuse: another writer was first
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        path.unlink(missing_ok=True)
        raise


def _local_age(lock: Path) -> float:
    """Seconds since ``lock`` was written, by the clock of its own file system (of a server, perhaps)."""
    probe = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        return now - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # gone since: the next attempt creates it
    except OSError as error:
        raise StorageError(f"{lock} cannot be written: {error}") from error
    finally:
        probe.unlink(missing_ok=True)


def _remote_age(uri: str) -> float | None:
    """Seconds since the lock was written, by the clock of its store; None if the store tells no times."""
    fs, path = open_fs(uri)
    probe = f"{path}.{uuid.uuid4().hex}"
    try:
        written = fs.modified(path)
        fs.pipe_file(probe, b"probe")
        return float((fs.modified(probe) - written).total_seconds())
    except FileNotFoundError:
        return 0.0  # gone since: the next attempt creates it
    except StoreUnavailableError:
        raise
    except (OSError, AttributeError):
        return None
    finally:
        with suppress(OSError):  # it was not written, or the next run sweeps it
            fs.rm_file(probe)


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Between rivals of one file system: read, remove, create without another in between. The kernel's lock is
    on the folder, so that nothing is left behind. Object stores and some mounts have none: there a heartbeat
    notices a rival."""
    if not is_local(uri):
        yield
        return
    folder = Path(open_fs(uri)[1]).parent
    try:
        handle = _open_folder(folder)
    except OSError as error:
        raise StorageError(f"{uri} cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FILE_LOCKS:
                raise StorageError(f"{folder} cannot be locked: {error}") from error
        yield
    finally:
        os.close(handle)


def _open_folder(folder: Path, attempts: int = 5) -> int:
    """A handle of ``folder``, made if it is not there; a run that ends may take away what it had made meanwhile."""
    for _ in range(attempts - 1):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(folder, os.O_RDONLY)
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder, os.O_RDONLY)


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


def _number(value: object, default: float) -> float:
    """``value`` if it is a number: a lock may hold anything."""
    return float(value) if isinstance(value, int | float) else default
