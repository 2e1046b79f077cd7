"""Remote stores that stumble: what fails for a moment is tried again, and every error is an ``OSError``.

Backends have errors of their own (botocore, aiohttp, google, azure), and some of fsspec's methods take every error
for "no". Knows nothing of URIs and options: see storage.py for those.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from framecap.errors import BackendError, FramecapError, StoreUnavailableError

log = logging.getLogger(__name__)

PATIENCE = 150.0  # seconds that a store which fails for the moment is waited for
_LONGEST_WAIT = 15.0
_READS = frozenset({"read", "readinto", "readline", "readlines"})  # of a file, what may be done again
_TRANSIENT_ERRNO = frozenset(
    {errno.EBUSY, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ENETUNREACH, errno.EHOSTUNREACH}
)  # s3fs: SlowDown and 503 are EBUSY, 500 is EREMOTEIO
_MOMENTARY = _TRANSIENT_ERRNO | {errno.EIO, errno.ESTALE}  # of a mount, which the kernel has waited for
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_NAMES = frozenset(
    {
        "HTTPClientError", "EndpointConnectionError", "ConnectionClosedError", "ResponseParserError",  # botocore
        "ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError",  # aiohttp
        "IncompleteRead", "FSTimeoutError", "TransportError", "ServiceRequestError", "ServiceResponseError",
    }
)  # fmt: skip

_given_up: set[int] = set()  # file systems that have outlasted somebody's patience, until they answer again


class Guarded:
    """A backend's file system, or a file of it. A call that fails for the moment is repeated for ``patience`` seconds
    in all, and then raises ``StoreUnavailableError``; any other error that is no ``OSError`` with a meaning of its own
    becomes a ``BackendError``. A store that nobody got an answer from is not waited for again until it answers."""

    def __init__(self, guarded: Any, patience: float, store: int | None = None) -> None:
        self._guarded, self._patience = guarded, patience
        self._store = id(guarded) if store is None else store

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._guarded, name)
        if not callable(value):
            return value
        is_file = hasattr(self._guarded, "read")
        patience = 0.0 if is_file and name not in _READS else self._patience
        return functools.partial(self._call, value, name, patience)

    def exists(self, path: str) -> bool:
        """Whether a file or folder is at ``path``; fsspec's own says no when the store does not answer."""
        return self._kind(path) is not None

    def isfile(self, path: str) -> bool:
        """Whether a file is at ``path``."""
        return self._kind(path) == "file"

    def isdir(self, path: str) -> bool:
        """Whether a folder is at ``path``."""
        return self._kind(path) == "directory"

    def _kind(self, path: str) -> str | None:
        try:
            return str(self._call(self._guarded.info, "info", self._patience, path)["type"])
        except FileNotFoundError:
            return None

    def _call(self, method: Callable[..., Any], name: str, patience: float, *arguments: Any, **keywords: Any) -> Any:
        """``method`` of the backend, repeated while it fails for the moment and ``patience`` (seconds) lasts."""
        begun, wait = time.monotonic(), 0.5
        while True:
            try:
                result = method(*arguments, **keywords)
            except FramecapError:
                raise
            except Exception as error:
                if not is_transient(error):
                    if isinstance(error, OSError) and type(error) is not OSError:
                        raise
                    raise BackendError(_described(error)) from error
                waited = time.monotonic() - begun
                if waited + wait > patience or self._store in _given_up:
                    if patience:
                        _given_up.add(self._store)
                    raise StoreUnavailableError(
                        f"the store does not answer ({name}: {_described(error)}), for {waited:.0f} s; "
                        "run the same command again"
                    ) from error
                log.warning("the store does not answer (%s: %s); trying again in %.1f s", name, _described(error), wait)
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            else:
                _given_up.discard(self._store)
                is_file = hasattr(result, "read") and hasattr(result, "seek")
                return Guarded(result, patience, self._store) if is_file else result

    def __enter__(self) -> Self:
        self._guarded.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._guarded.__exit__, "close", 0.0, kind, error, trace)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._guarded)


def is_transient(error: BaseException) -> bool:
    """Whether ``error`` of a backend says that the same call may succeed later: throttling, 5xx, lost connections."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError):
            return True
        if isinstance(seen, OSError) and seen.errno in _TRANSIENT_ERRNO:
            return True
        if _status(seen) in _TRANSIENT_STATUS or any(kind.__name__ in _TRANSIENT_NAMES for kind in type(seen).__mro__):
            return True
        seen = seen.__cause__
    return False


def failure_kind(error: BaseException, otherwise: str) -> str:
    """What a ``ShardError`` from ``error`` is called: ``unavailable`` (the store did not answer), ``no_space``, or
    ``otherwise``."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StoreUnavailableError) or (isinstance(seen, OSError) and seen.errno in _MOMENTARY):
            return "unavailable"
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return "no_space"
        seen = seen.__cause__
    return otherwise


def _status(error: BaseException) -> int | None:
    """The HTTP status that ``error`` carries, under the names that botocore, aiohttp, gcsfs and azure use."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status", "status_code", "code"):
        if isinstance(value := getattr(error, name, None), int):
            return value
    return None


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
