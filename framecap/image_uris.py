"""Pictures named by a URI: which places a row may name, and fetching from those.

A row of a shard is not trusted, so the text in it never chooses a backend. `decide` looks for an allowed place that
the URI lies in, and the place, as the operator wrote it, is what is opened. Job, training, pairs, report, search and
notebook all fetch through this module. Knows nothing of what is in a picture.
"""

from __future__ import annotations

import argparse
import errno
import os
import posixpath
import queue
import re
import stat
import threading
import time
import unicodedata
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fsspec.asyn import sync

from framecap.errors import BackendError, FramecapError, FrameError, SettingsError, StoreUnavailableError
from framecap.model.picture_limits import DEFAULT_LIMITS
from framecap.shards import printable
from framecap.storage import absolute_uri, is_local, open_fs, same_store

FLAG = "--image-uri-allow"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER = re.compile(r"(^|[/\\\s])[^/\\\s]*:[^/\\\s]*@")
_HTTP = ("http", "https")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_PIECE = 1 << 16
_SHOWN = 200  # characters of a URI in an error
_CHAIN = re.compile(r"::[A-Za-z][A-Za-z0-9+.-]*://")
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL})
_WAITS = (0.2, 1.0, 3.0, 5.0, 10.0)  # seconds between tries


@dataclass(frozen=True)
class FetchRules:
    """From where pictures are fetched, and what one may cost.

    ``allowed``: places as `allowed_places` gives them; the folder of a row's shard is allowed beside them.
    ``max_bytes``: of a picture. ``seconds``: for one picture, all tries together. ``retries``: after the first try.
    """

    allowed: tuple[str, ...] = ()
    max_bytes: int = DEFAULT_LIMITS.max_bytes
    seconds: float = 60.0
    retries: int = 3


DEFAULT_RULES = FetchRules()


@dataclass(frozen=True)
class Target:
    """A file that may be fetched: ``path`` below ``store``, or, if that is empty, a local path without links."""

    store: str
    path: str
    shown: str  # for errors: without what may be secret


def allowed_places(root: str, allow: Sequence[str] = (), called: str = FLAG) -> tuple[str, ...]:
    """The places that rows of the shards below ``root`` may name: ``allow``, by default where ``root`` itself is, the
    folder or the scheme and bucket.

    Raises SettingsError for a place that is none.
    """
    if not allow:
        if is_local(root):
            folder = absolute_uri(root)
            return () if folder == "/" else (folder,)
        scheme, _, rest = root.partition("://")
        return (f"{scheme}://{rest.partition('/')[0]}",)
    for place in allow:
        if _CHAIN.search(place):
            raise SettingsError(f"{called} {shown(place)}: chains of file systems are not read; give one place")
        if not is_local(place):
            if not place.partition("://")[2].partition("/")[0]:
                raise SettingsError(f"{called} {shown(place)} names no bucket or host; write it like s3://archive/")
            if place.startswith(tuple(f"{name}://" for name in _HTTP)) and re.search(r"[?#]", place):
                raise SettingsError(f"{called} {shown(place)}: leave out what follows the path (? or #)")
    return tuple(absolute_uri(place) if is_local(place) else place for place in allow)


def add_allow_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """The flag ``--image-uri-allow`` of a command; ``default``: what is allowed without it."""
    parser.add_argument(
        FLAG,
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        metavar="A,B",
        help=f"folders and s3://bucket/… that rows may name pictures in (default: {default})",
    )


def decide(uri: str, folder: str, allowed: Sequence[str]) -> Target:
    """The file that ``uri``, of a row whose shard lies in ``folder``, names: the only way from a row to a file.

    Relative URIs are relative to ``folder``; ``..`` may lead out of it but not out of ``allowed``.
    Raises FrameError of kind not_allowed.
    """
    _check_text(uri)
    path, is_file_uri = uri, False
    match = _SCHEME.match(uri)
    if match is not None and is_local(uri):
        host, slash, path = uri[match.end() :].partition("/")
        if host not in ("", "localhost"):
            raise _refused(uri, "is on another host")
        path, is_file_uri = slash + path, True
    if any(map(_hides_dots, path.split("/"))):
        raise _refused(uri, "hides dots in its path")
    if is_file_uri or path.startswith("/") or (match is None and is_local(folder)):
        return _local_target(uri, path, folder, allowed, is_file_uri)
    full = uri if match is not None else f"{folder.rstrip('/')}/{path}"
    return _remote_target(uri, full, (*allowed, folder))


def _check_text(uri: str) -> None:
    """Raise FrameError for what is no URI of a picture, whatever places are allowed."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise _refused(uri, "is not Unicode") from None
    if any(unicodedata.category(letter) == "Cc" for letter in uri):
        raise _refused(uri, "has control characters")
    if uri[:5].lower() == "data:":
        raise _refused("data:…", "holds the picture itself; put its bytes into the image column")
    if _CHAIN.search(uri):
        raise _refused(uri, "chains file systems; name the picture itself")


def _hides_dots(segment: str) -> bool:
    """Whether some server or backend may take a segment that is not ``..`` for that: encoded, with backslashes, in
    other forms of Unicode, or with parameters behind it."""
    reading = segment
    for _ in range(6):
        if reading != segment or segment not in (".", ".."):
            parts = (part.partition(";")[0].strip() for part in reading.split("/"))
            if any(part in (".", "..") for part in parts):
                return True
        before, reading = reading, urllib.parse.unquote(unicodedata.normalize("NFKC", reading).replace("\\", "/"))
        if reading == before:
            return False
    return True  # encoded so often that nobody means well


def _local_target(uri: str, path: str, folder: str, allowed: Sequence[str], is_file_uri: bool) -> Target:
    """``path``, which may be relative, with its links resolved; in a ``file://`` URI %XX is a byte (RFC 8089), unless
    a file has that very name."""
    roots = [os.path.realpath(absolute_uri(place)) for place in (*allowed, folder) if is_local(place)]
    readings = [path, urllib.parse.unquote(path, errors="surrogateescape")] if is_file_uri else [path]
    found = []
    for reading in readings:
        base = absolute_uri(folder) if is_local(folder) else "/"
        real = os.path.realpath(posixpath.join(base, reading))
        if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
            raise _outside(uri)
        found.append(real)
    exists = next((real for real in found if os.path.lexists(real)), found[-1])
    return Target("", exists, shown(uri))


def _remote_target(uri: str, full: str, places: Sequence[str]) -> Target:
    """``full`` in the place that it lies in; scheme and host are taken from the place, never from the row."""
    scheme, host, path = _split(full)
    query = ""
    if scheme in _HTTP:  # what follows "#" never reaches a server
        path, mark, query = path.partition("#")[0].partition("?")
        query = mark + query
    plain = _collapsed(path)
    for place in places if plain is not None else ():
        own_scheme, own_host, below = _split(place)
        if is_local(place) or not same_store(scheme, own_scheme):
            continue
        is_host = scheme in _HTTP and host.lower() == own_host.rpartition("@")[2].lower()
        below = below.rstrip("/")
        if (is_host or host == own_host) and f"{plain}/".startswith(f"{below}/"):
            return Target(f"{place.partition('://')[0]}://{own_host}", f"{plain}{query}", shown(uri))
    raise _outside(uri)


def _split(uri: str) -> tuple[str, str, str]:
    """(scheme in small letters, host or bucket, path with its slash)."""
    scheme, _, rest = uri.partition("://")
    end = re.search(r"[/\\?#]", rest)
    at = end.start() if end is not None else len(rest)
    return scheme.lower(), rest[:at], rest[at:]


def _collapsed(path: str) -> str | None:
    """``path`` without ``.`` and ``..``; None if those lead above its beginning. Empty parts are as good as others in
    a key of an object store."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if len(parts) < 2:
                return None
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def shown(uri: str) -> str:
    """``uri`` for an error: without password, query and fragment, and short."""
    text = printable(_USER.sub(r"\1", re.split(r"[?#]", uri, maxsplit=1)[0]))
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _refused(uri: str, why: str) -> FrameError:
    return FrameError("not_allowed", f"{shown(uri)} {why}.")


def _outside(uri: str) -> FrameError:
    return _refused(uri, f"is outside the places that rows may name; allow its place with {FLAG}")


def fetch(uri: str, folder: str, retries: int | None = None, rules: FetchRules = DEFAULT_RULES) -> bytes | FrameError:
    """The bytes that ``uri`` of a row names, whose shard lies in ``folder``; whatever fails is returned.

    ``retries``: in place of those of ``rules``.
    """
    try:
        target = decide(uri, folder, rules.allowed)
        return _fetch(target, folder, rules, rules.retries if retries is None else retries)
    except FrameError as error:
        return error.with_traceback(None)  # which would keep the whole batch alive


def _fetch(target: Target, folder: str, rules: FetchRules, retries: int) -> bytes:
    """Read ``target``, again after a failure that may pass. Raises FrameError."""
    deadline = time.monotonic() + rules.seconds
    for attempt in range(retries + 1):
        try:
            if not target.store:
                return read_regular(target.path, rules.max_bytes)
            return _read_remote(target, folder, rules, deadline)
        except FrameError:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FrameError("missing", f"{target.shown} does not exist.") from None
        except Exception as error:  # each backend raises its own; after the retries the row says which
            wait = _WAITS[min(attempt, len(_WAITS) - 1)]
            if time.monotonic() + wait > deadline:
                raise FrameError(
                    "too_slow",
                    f"fetching {target.shown} takes longer than {rules.seconds:g} s; raise it (--fetch-timeout).",
                ) from None
            if attempt == retries or not _may_pass(error):
                raise FrameError("missing", f"{target.shown} cannot be read ({_scrubbed(error)}).") from None
            time.sleep(wait)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """Whether another try makes sense."""
    if isinstance(error, FramecapError):
        return isinstance(error, StoreUnavailableError | BackendError)
    return not isinstance(error, OSError) or error.errno not in _LASTING


def _scrubbed(error: BaseException) -> str:
    """An error of a backend without the secrets of the URL that it may quote."""
    text = " ".join(str(error).split())
    text = re.sub(r"\?\S*", "?…", _USER.sub(r"\1", text))[:_SHOWN]
    return text if isinstance(error, FramecapError) else f"{type(error).__name__}: {text}".rstrip(": ")


def read_regular(path: str, max_bytes: int) -> bytes:
    """A local file; a device, pipe or socket, which may never end, is refused unread.

    Raises FrameError (missing, too_large) and OSError.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise _irregular(path) from error
        raise
    with open(number, "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(path)
        if not stat.S_ISREG(status.st_mode):
            raise _irregular(path)
        data = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    if status.st_size > max_bytes or len(data) > max_bytes:
        raise _too_large(shown(path), max_bytes)
    return data


def _irregular(path: str) -> FrameError:
    return _refused(path, "is no regular file")


def _too_large(name: str, max_bytes: int) -> FrameError:
    return FrameError("too_large", f"{name} has more than {max_bytes} bytes; raise the limit (--max-image-bytes).")


def _read_remote(target: Target, folder: str, rules: FetchRules, deadline: float) -> bytes:
    """One try at a file of a store or a web server, within bytes and seconds."""
    left = max(0.1, deadline - time.monotonic())
    fs, base = open_fs(target.store, patience=0)
    if target.store.startswith(tuple(f"{name}://" for name in _HTTP)):
        data: bytes = sync(fs.loop, _get, fs, base.rstrip("/") + target.path, folder, rules, timeout=left)
        return data
    path, most = base.rstrip("/") + target.path, rules.max_bytes + 1
    try:
        if getattr(fs, "async_impl", False):
            data = bytes(fs.cat_file(path, start=0, end=most, timeout=left))
        else:
            data = _within(left, lambda: bytes(fs.cat_file(path, start=0, end=most)))
    except BackendError:  # to S3 the range of an empty object is an error
        if fs.info(path)["size"] == 0:
            return b""
        raise
    if len(data) > rules.max_bytes:
        raise _too_large(target.shown, rules.max_bytes)
    return data


def _within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """What ``read`` returns, or a TimeoutError; then its thread is left behind, since nothing can end it."""
    done: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put(read())
        except Exception as error:  # raised below, in the thread that waits
            done.put(error)

    threading.Thread(target=work, name="fetch", daemon=True).start()
    try:
        result = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return result


async def _get(fs: Any, url: str, folder: str, rules: FetchRules) -> bytes:
    """GET ``url``; a redirect is followed only to where a row might point as well."""
    session = await fs.set_session()
    headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    options = {**fs.kwargs, "headers": headers, "allow_redirects": False}
    for _ in range(_MOST_REDIRECTS):
        async with session.get(fs.encode_url(url), **options) as answer:
            if answer.status in _REDIRECTS:
                location = urllib.parse.urljoin(url, answer.headers.get("Location", ""))
                target = decide(location, folder, rules.allowed)
                if not target.store or not url.startswith(target.store + "/"):
                    raise FrameError("not_allowed", f"{shown(url)} redirects to another host.")
                url = target.store + target.path
                continue
            if answer.status in (404, 410):
                raise FileNotFoundError(url)
            answer.raise_for_status()
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise FrameError("not_an_image", f"{shown(url)} is sent compressed; serve pictures as they are.")
            received = bytearray()
            async for piece in answer.content.iter_chunked(_PIECE):
                received += piece
                if len(received) > rules.max_bytes:
                    raise _too_large(shown(url), rules.max_bytes)
            return bytes(received)
    raise FrameError("not_allowed", f"{shown(url)} redirects more than {_MOST_REDIRECTS} times.")
