"""Joining a Ray cluster, or starting one on this machine; for captioning and training.

Imports Ray only when it is needed. Knows nothing of what runs there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from framecap.errors import SettingsError
from framecap.storage import is_local

log = logging.getLogger(__name__)
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit` in the driver's environment
_JOIN_SECONDS = 30.0


def check_place_of_job(flag: str, uri: str | None) -> None:
    """Raise ``SettingsError`` if ``uri`` is a relative path and this process was started by ``ray job submit``: it
    would lie in Ray's copy of the working directory, which is deleted."""
    if uri and is_local(uri) and "://" not in uri and not Path(uri).is_absolute() and os.environ.get(_SUBMITTED):
        raise SettingsError(
            f"{flag} {uri} is relative, and under `ray job submit` that is a folder of Ray's own, which it deletes; "
            "give an absolute path that all nodes see, or a URI"
        )


class RayStart:
    """Ray in this process: joined or started in a thread, so that a signal is heard meanwhile."""

    def __init__(self) -> None:
        self.own = False  # whether a cluster was started, not joined
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._under_way = False

    def connect(self, address: str | None, check: Callable[[], None]) -> None:
        """Join the cluster at ``address`` (None: that of ``RAY_ADDRESS``, or one that runs here), else start one.

        ``check`` is asked all the time, and may raise. What Ray writes to standard error meanwhile is dropped: its
        errors are raised.

        Raises:
            SettingsError: nothing answers there, or Ray cannot start; with Ray's own reason.
        """
        target = _address_to_join(address)
        self.own = target is None
        log.info("%s", "starting Ray; this takes some seconds" if self.own else f"joining the Ray cluster at {target}")
        deadline = time.monotonic() + _JOIN_SECONDS
        thread = threading.Thread(target=self._init, args=(address,), name="framecap-ray", daemon=True)
        with _silenced_stderr():
            self._under_way = True
            thread.start()
            while not self._done.wait(0.1):
                check()
                if target is not None and time.monotonic() > deadline:
                    raise SettingsError(f"the Ray cluster at {target} did not let us join; {_WHICH_ADDRESS}")
            self._under_way = False
        if self._error is not None:
            raise _explained(self._error, target) from self._error

    def end(self, exit_code: int) -> None:
        """Stop a Ray that was started here. Where its start was broken off, the process ends with ``exit_code``:
        Ray's exit handlers would wait for that start, and the kernel takes Ray's processes along."""
        if self._under_way:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)
        if self.own and self._done.is_set() and self._error is None:
            import ray

            log.info("stopping Ray")
            ray.shutdown()

    def _init(self, address: str | None) -> None:
        import ray

        try:
            ray.init(
                address=address,
                log_to_driver=False,
                include_dashboard=False if self.own else None,
                configure_logging=False,
            )
        except BaseException as error:
            self._error = error
        self._done.set()
        threading.Event().wait()  # the kernel would kill Ray's processes with the thread that started them


def join_or_start(address: str | None, **how: Any) -> None:
    """``ray.init`` with ``how``, for a process that leaves signals to Ray.

    Raises:
        SettingsError: nothing answers at the address, or Ray cannot start; with Ray's own reason.
    """
    import ray

    target = _address_to_join(address)
    try:
        ray.init(address=address or None, **how)
    except Exception as error:  # Ray raises errors of its own, OSError, RuntimeError and plain Exception
        raise _explained(error, target) from error


def _explained(error: BaseException, target: str | None) -> SettingsError:
    """An error of ``ray.init`` as one line that says what to do."""
    text = _first_line(error)
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if target is not None:
        fix = "; give RAY_AUTH_MODE=token and the cluster's token" if "uthentication" in type(error).__name__ else ""
        return SettingsError(f"the Ray cluster at {target} cannot be joined: {text}{fix}")
    if "AF_UNIX" in text:
        return SettingsError(f"{folder} is too long for the names of Ray's sockets; set RAY_TMPDIR to a short path")
    if isinstance(error, OSError):
        reason = error.strerror or text
        return SettingsError(f"Ray cannot use {folder} ({reason}); set RAY_TMPDIR to a folder that can be written")
    return SettingsError(f"Ray cannot be started: {text}")


_WHICH_ADDRESS = "check --ray-address, RAY_ADDRESS, and whether the cluster is up (`ray status`)"


def _address_to_join(address: str | None) -> str | None:
    """The address of the cluster that ``ray.init`` would join; None if it would start one.

    Raises:
        SettingsError: nothing answers there. Ray itself would try for a quarter of an hour.
    """
    from ray._private.services import canonicalize_bootstrap_address

    named = address or os.environ.get("RAY_ADDRESS") or None
    try:
        found = named if named and "://" in named else canonicalize_bootstrap_address(named)
        if found is None:
            return None
        host, _, port = found.rpartition("://")[2].rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        where = named or "the address that an earlier `ray start` left behind (`ray stop` forgets it)"
        raise SettingsError(f"no Ray cluster answers at {where} ({_first_line(error)}); {_WHICH_ADDRESS}") from error
    return str(found)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Whatever this process and its children write to descriptor 2 is dropped: Ray's C++ parts know no logger."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
