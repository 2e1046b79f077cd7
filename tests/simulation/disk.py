"""A local disk: a real folder whose system calls meet the world's faults, since the product works on local paths by
``os``, ``pathlib`` and pyarrow.

Renames are atomic; file locks may be missing; a file that was not fsynced may be torn when its machine is lost. Times
of change are the world's.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from framecap.pipeline import lock as lock_module
from simulation.world import Machine, Process, World

T = TypeVar("T")
_WRITES = os.O_WRONLY | os.O_RDWR


class Disk:
    """Everything below ``root``. ``file_locks``: whether ``flock`` works here."""

    def __init__(self, world: World, root: Path, file_locks: bool = True) -> None:
        self.world, self.root, self.file_locks = world, str(root), file_locks
        self.on_write: list[Callable[[str], None]] = []
        self._unsynced: dict[str, Machine] = {}
        self._locks: dict[str, tuple[int, Process]] = {}  # folder → handle and holder of its flock
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        world.on_death.append(self._tear)

    def write(self, path: str, data: bytes) -> None:
        """A file of somebody else's, written at once."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)
        self.stamp(path)

    def files(self) -> dict[str, bytes]:
        """Everything that is there now."""
        found = {}
        for folder, names, files in os.walk(self.root):
            names.sort()
            for name in sorted(files):
                path = f"{folder}/{name}"
                found[path] = Path(path).read_bytes()
        return found

    def stamp(self, path: str | int) -> None:
        """Let the time of change be the world's."""
        moment = int(self.world.now * 1_000_000) * 1000
        os.utime(path, ns=(moment, moment))

    def has(self, path: object) -> bool:
        """Whether a path lies here, and a simulated process asks."""
        return (
            self.world.current.process is not None
            and isinstance(path, str | os.PathLike)
            and (
                os.fspath(path).startswith(self.root)  # type: ignore[arg-type]
            )
        )

    def operate(self, name: str, path: object, effect: Callable[[], T]) -> T:
        """One system call that may fail."""
        text = os.fspath(path)  # type: ignore[call-overload]
        short = text.removeprefix(self.root)
        writes = name in ("write", "create", "fsync")
        number = errno.ENOSPC if writes and self.world.chance.random() < 0.3 else errno.EIO
        held: list[T] = []

        def holding() -> T:
            held.append(effect())
            return held[0]

        try:
            return self.world.operate(name, short, holding, lambda: OSError(number, os.strerror(number), text))
        except BaseException:
            for result in held:  # a handle that nobody gets
                if name in ("create", "open") and isinstance(result, int):
                    os.close(result)
                elif hasattr(result, "close"):
                    result.close()
            raise

    def written(self, path: str) -> None:
        """A file was written and not fsynced yet."""
        process = self.world.current.process
        if process is not None:
            self._unsynced[path] = process.machine
        self.stamp(path)

    def synced(self, path: str) -> None:
        """A file was fsynced."""
        self._unsynced.pop(path, None)

    def moved(self, source: str, target: str) -> None:
        """A file was renamed; what is not fsynced stays so."""
        self._unsynced.pop(target, None)
        if source in self._unsynced:
            self._unsynced[target] = self._unsynced.pop(source)
        self.stamp(target)
        for hook in self.on_write:
            hook(target)

    def lock(self, handle: int) -> None:
        """Wait for the flock of a folder."""
        if not self.file_locks:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        folder, process = _path_of(handle), self.world.current.process
        assert process is not None
        while folder in self._locks:
            self.world.sleep(0.5)
        self._locks[folder] = (handle, process)

    def unlock(self, handle: int) -> None:
        """Closing a handle gives its flock up."""
        self._locks = {folder: held for folder, held in self._locks.items() if held[0] != handle}

    def _tear(self, process: Process, with_machine: bool) -> None:
        self._locks = {folder: held for folder, held in self._locks.items() if held[1] is not process}
        if not with_machine:
            return
        for path, machine in sorted(self._unsynced.items()):
            if machine is process.machine and Path(path).is_file():
                size = Path(path).stat().st_size
                self.world.note(f"{path.removeprefix(self.root)} is torn")
                os.truncate(path, int(self.world.chance.random() * size))
                self.stamp(path)
                del self._unsynced[path]


@contextmanager
def system_calls(disk: Disk) -> Iterator[None]:
    """Let the system calls of simulated processes below the disk's root go through its world."""
    with (
        mock.patch.multiple("os", **_calls(disk)),
        mock.patch.multiple(LocalFileSystem, **_file_system(disk)),
        mock.patch.object(lock_module, "fcntl", _Fcntl(disk)),
        mock.patch.multiple(pq, **_parquet(disk)),
    ):
        yield


def _path_of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink())


def _calls(disk: Disk) -> dict[str, Any]:
    real_open, real_close, real_fsync, real_scandir = os.open, os.close, os.fsync, os.scandir

    def moving(original: Callable[..., None], name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            def effect() -> None:
                original(source, target, **options)
                disk.moved(os.fspath(source), os.fspath(target))

            if disk.has(target):
                disk.operate(name, target, effect)
            else:
                original(source, target, **options)

        return call

    def plain(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if disk.has(path):
                return disk.operate(name, path, lambda: original(path, *rest, **options))
            return original(path, *rest, **options)

        return call

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if not disk.has(path):
            return real_open(path, flags, *rest, **options)

        def effect() -> int:
            handle = real_open(path, flags, *rest, **options)
            if flags & _WRITES:
                disk.written(os.fspath(path))
                for hook in disk.on_write:
                    hook(os.fspath(path))
            return handle

        return disk.operate("create" if flags & os.O_CREAT else "open", path, effect)

    def closed(handle: int) -> None:
        disk.unlock(handle)
        real_close(handle)

    def fsynced(handle: int) -> None:
        path = _path_of(handle)
        if not disk.has(path):
            real_fsync(handle)
            return
        disk.stamp(handle)  # what was written so far
        disk.operate("fsync", path, lambda: disk.synced(path))
        disk.stamp(handle)

    return {
        "open": opened,
        "close": closed,
        "fsync": fsynced,
        "replace": moving(os.replace, "replace"),
        "rename": moving(os.rename, "rename"),
        "unlink": plain(os.unlink, "unlink"),
        "remove": plain(os.remove, "unlink"),
        "mkdir": plain(os.mkdir, "mkdir"),
        "rmdir": plain(os.rmdir, "rmdir"),
        "listdir": plain(os.listdir, "list"),
        "scandir": plain(real_scandir, "scandir"),
    }


def _file_system(disk: Disk) -> dict[str, Any]:
    real_pipe, real_cat, real_info = LocalFileSystem.pipe_file, LocalFileSystem.cat_file, LocalFileSystem.info

    def pipe_file(fs: LocalFileSystem, path: str, value: bytes, *rest: Any, **options: Any) -> None:
        def effect() -> None:
            real_pipe(fs, path, value, *rest, **options)
            disk.written(path)

        if disk.has(path):
            disk.operate("write", path, effect)
        else:
            real_pipe(fs, path, value, *rest, **options)

    def cat_file(fs: LocalFileSystem, path: str, *rest: Any, **options: Any) -> Any:
        if disk.has(path):
            return disk.operate("read", path, lambda: real_cat(fs, path, *rest, **options))
        return real_cat(fs, path, *rest, **options)

    def info(fs: LocalFileSystem, path: Any, **options: Any) -> Any:
        if disk.has(path):
            return disk.operate("stat", path, lambda: real_info(fs, path, **options))
        return real_info(fs, path, **options)

    return {"pipe_file": pipe_file, "cat_file": cat_file, "info": info}


def _parquet(disk: Disk) -> dict[str, Any]:
    class ParquetFile(pq.ParquetFile):  # type: ignore[misc]
        def __init__(self, source: Any, **options: Any) -> None:
            initialise = super().__init__
            if disk.has(source):
                disk.operate("read", source, lambda: initialise(source, **options))
            else:
                initialise(source, **options)

    class ParquetWriter(pq.ParquetWriter):  # type: ignore[misc]
        def __init__(self, where: Any, *rest: Any, **options: Any) -> None:
            initialise = super().__init__

            def effect() -> None:
                initialise(where, *rest, **options)
                disk.written(where)

            if disk.has(where):
                disk.operate("create", where, effect)
            else:
                initialise(where, *rest, **options)

    return {"ParquetFile": ParquetFile, "ParquetWriter": ParquetWriter}


class _Fcntl:
    """The ``fcntl`` of the lock's module."""

    LOCK_EX = lock_module.fcntl.LOCK_EX

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def flock(self, handle: int, operation: int) -> None:
        self._disk.lock(handle)
