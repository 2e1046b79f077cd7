"""The lock of an output: on every mount, with every clock, and when a store loses its answer."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from framecap.errors import LockedError, StorageError
from framecap.pipeline import lock as lock_module
from framecap.pipeline.host import Background, Host
from framecap.pipeline.lock import OutputLock
from framecap.storage import open_fs, read_bytes, write_bytes_atomic


class NoThread:
    def join(self, timeout: float | None = None) -> None:
        return


class StoppedHost(Host):
    """A machine whose clock stands still until somebody waits, and whose background never runs."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0
        self.on_wait: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.seconds

    monotonic = now

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.seconds += seconds
        self.on_wait()
        return False

    def start(self, function: Callable[[], None], name: str) -> Background:
        return NoThread()


def refuse_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_mount_without_hard_links_and_file_locks_can_hold_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(os, "link", refuse_links)
    monkeypatch.setattr(lock_module.fcntl, "flock", no_locks)
    path = str(tmp_path / "lock")
    with (
        OutputLock(path, "first", 60) as lock,
        pytest.raises(LockedError, match="held by run first"),
        OutputLock(path, "second", 60),
    ):
        pass
    lock.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"heartbeat": "noon", "expiry_s": null}'])
def test_a_lock_that_cannot_be_read_counts_until_the_expiry(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lock"
    path.write_text(content)
    with pytest.raises(LockedError), OutputLock(str(path), "next", 60):
        pass
    os.utime(path, (time.time() - 61, time.time() - 61))
    with OutputLock(str(path), "next", 60):
        assert json.loads(path.read_text())["run_id"] == "next"


def remote_lock(heartbeat: float) -> str:
    """A lock of another machine on a store that tells no modification times."""
    holder = {"token": "x", "run_id": "other", "host": "spot-1", "expiry_s": 120, "heartbeat": heartbeat}
    write_bytes_atomic("memory://locks/lock", json.dumps(holder).encode())
    return "memory://locks/lock"


@pytest.fixture
def timeless_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def untold(fs: MemoryFileSystem, path: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(MemoryFileSystem, "modified", untold)
    yield
    MemoryFileSystem.store.clear()


@pytest.mark.usefixtures("timeless_store")
def test_a_lock_from_the_future_is_watched_for_its_expiry_and_taken_over() -> None:
    host = StoppedHost()
    uri = remote_lock(host.seconds + 86_400)
    before = host.seconds
    with OutputLock(uri, "next", 60, host):
        assert json.loads(read_bytes(uri))["run_id"] == "next"
    assert host.seconds - before == pytest.approx(120)


@pytest.mark.usefixtures("timeless_store")
def test_a_lock_from_the_future_that_beats_is_respected() -> None:
    host = StoppedHost()
    uri = remote_lock(host.seconds + 86_400)

    def beat() -> None:
        remote_lock(host.seconds + 86_400)

    host.on_wait = beat
    with pytest.raises(LockedError, match="held by run other"), OutputLock(uri, "next", 60, host):
        pass


def test_on_a_store_the_modification_time_decides_not_the_holders_clock() -> None:
    uri = remote_lock(heartbeat=time.time() - 86_400)  # alive, by a clock that is a day behind
    with pytest.raises(LockedError, match="held by run other"), OutputLock(uri, "next", 60):
        pass
    MemoryFileSystem.store.clear()


def test_a_heartbeat_may_be_driven_by_the_caller() -> None:
    host = StoppedHost()
    uri = "memory://driven/lock"
    with OutputLock(uri, "steady", 60, host) as lock:
        host.seconds += 30
        lock.renew()
        assert json.loads(read_bytes(uri))["heartbeat"] == host.seconds
        lock.check()
    MemoryFileSystem.store.clear()


class FaultyS3:
    """moto's S3; ``fault(environ)``: None to answer as it is, "drop" to do the work and reset the connection, or a
    status line: "500 …" does the work, "503 …" does not."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_: Any) -> None:
                return

        self.fault: Callable[[dict[str, Any]], str | None] = lambda environ: None
        self._inner = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Silent)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.options = {"endpoint_url": f"http://127.0.0.1:{self._server.port}", "key": "test", "secret": "test"}

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        fault = self.fault(environ)
        if fault is None:
            return self._inner(environ, start)
        if not fault.startswith("503"):
            b"".join(self._inner(environ, lambda *_: None))
        if fault == "drop":
            connection = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError("injected")
        start(fault, [("Content-Length", "0")])
        return [b""]

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture(scope="module")
def faulty_s3() -> Iterator[FaultyS3]:
    store = FaultyS3()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRAMECAP_STORAGE_OPTIONS", json.dumps({"s3": store.options}))
        open_fs("s3://faulty")[0].makedirs("faulty", exist_ok=True)
        yield store
    store.close()


@pytest.mark.parametrize("answer", ["drop", "500 Internal"])
def test_a_lock_whose_answer_was_lost_is_this_runs_own(answer: str, faulty_s3: FaultyS3) -> None:
    uri = f"s3://faulty/{answer[:3]}/_framecap/lock"
    left = [answer]

    def once(environ: dict[str, Any]) -> str | None:
        is_lock = environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith("/lock")
        return left.pop() if is_lock and left else None

    faulty_s3.fault = once
    with OutputLock(uri, "own", 120) as lock:
        assert not left
        lock.check()
        with pytest.raises(LockedError, match="held by run own"), OutputLock(uri, "rival", 120):
            pass
    fs, path = open_fs(uri)
    fs.invalidate_cache()
    assert not fs.exists(path)


def test_a_lock_that_cannot_be_written_is_said_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"), OutputLock(str(tmp_path / "file" / "lock"), "x", 60):
        pass
