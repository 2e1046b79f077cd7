"""All file access by URI: fsspec opens, lists and publishes; remote captioners are copied once per node.

Local paths need no fsspec backend; ``s3://``, ``gs://`` and ``abfs://`` need the extra of that name.
Options for the backends (endpoint, keys, retries) are a JSON object in ``FRAMECAP_STORAGE_OPTIONS``, so that
they reach every Ray worker through its environment: ``{"s3": {...}, "gs": {...}}``, each for its own scheme, or
a flat object for the object store in use. Knows nothing of shards, captions or models.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from framecap import stores
from framecap.errors import (
    BackendError,
    ChecksumError,
    MissingFileError,
    SettingsError,
    StorageError,
    StoreUnavailableError,
)
from framecap.manifest import MANIFEST, manifest_files, verify_manifest

OPTIONS_VARIABLE = "FRAMECAP_STORAGE_OPTIONS"
CACHE_VARIABLE = "FRAMECAP_CACHE"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://|::[a-z0-9+.-]+://)")
_LOCAL = ("file", "local")
_BACKENDS = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs"}  # object store → package
_EXTRAS = {  # scheme → the object store, which is also the name of framecap's extra
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether ``uri`` is a plain path or a ``file://`` URI."""
    scheme = _SCHEME.match(os.fspath(uri))
    return scheme is None or scheme[0] in _LOCAL


def storage_options() -> dict[str, Any]:
    """The backend options of this process, from ``FRAMECAP_STORAGE_OPTIONS`` (a JSON object).

    Raises:
        SettingsError: the variable is not a JSON object.
    """
    text = os.environ.get(OPTIONS_VARIABLE, "")
    if not text:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{OPTIONS_VARIABLE} is not JSON ({error}); write it like '{{\"anon\": true}}'") from error
    if not isinstance(options, dict):
        raise SettingsError(f"{OPTIONS_VARIABLE} is not a JSON object; write it like '{{\"anon\": true}}'")
    return options


def options_for(uri: str) -> dict[str, Any]:
    """Those of ``storage_options`` that are meant for ``uri``: its scheme's own, or flat ones if it is on an
    object store.

    Raises:
        SettingsError: some options are by scheme and others are not.
    """
    if is_local(uri):
        return {}
    options, store = storage_options(), _store(uri)
    if _by_scheme(options):
        return next((own for scheme, own in options.items() if _EXTRAS.get(scheme, scheme) == store), {})
    return options if store in _EXTRAS.values() else {}


def name_scheme(options: dict[str, Any], uris: Iterable[str]) -> dict[str, Any]:
    """Flat ``options`` under the scheme of the one store that ``uris`` lie on, so that no other gets them.

    Raises:
        SettingsError: the URIs lie on several object stores, and the options do not say whose they are.
    """
    if not options or _by_scheme(options):
        return options
    schemes = {_store(uri): uri.partition("://")[0] for uri in uris if not is_local(uri)}
    stores = [store for store in schemes if store in _EXTRAS.values()] or list(schemes)
    if len(stores) > 1:
        named = ", ".join(f'"{schemes[store]}": {{…}}' for store in sorted(stores))
        raise SettingsError(f"--storage-options do not say which store they are for; write them as {{{named}}}")
    return {schemes[stores[0]]: options} if stores else options


def _store(uri: str) -> str:
    scheme = uri.partition("://")[0]
    return _EXTRAS.get(scheme, scheme)


def same_store(scheme: str, other: str) -> bool:
    """Whether two schemes lead to one object store, as ``s3`` and ``s3a`` do, or are the same."""
    return _EXTRAS.get(scheme, scheme) == _EXTRAS.get(other, other)


def _by_scheme(options: dict[str, Any]) -> bool:
    schemes = [name for name in options if name in fsspec.available_protocols() and isinstance(options[name], dict)]
    if schemes and len(schemes) < len(options):
        loose = next(name for name in options if name not in schemes)
        raise SettingsError(f"storage option {loose!r} stands beside {schemes[0]!r}; put it under its scheme too")
    return bool(schemes)


def open_fs(uri: str | os.PathLike[str], patience: float | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds ``uri``, and the path of ``uri`` in it; a local path is absolute.

    A remote one that fails for the moment is asked again for ``patience`` seconds (None: ``stores.PATIENCE``).

    Raises:
        StorageError: no backend is installed for the URI's scheme.
        SettingsError: the storage options are not what ``options_for`` reads.
    """
    text = os.fspath(uri)
    if is_local(text):  # not by fsspec, which takes "::" in a name for a chain of file systems
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(_local_path(text)))
    options = options_for(text)
    scheme = text.partition("://")[0]
    try:
        if _is_chain(text):
            fs, path = url_to_fs(text, **options)
        else:
            fs = fsspec.filesystem(scheme, **fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(text) | options)
            path = fs._strip_protocol(text)
    except ImportError as error:
        store = _EXTRAS.get(scheme)
        fix = f"pip install {_BACKENDS[store]}" if store else "install its fsspec backend"
        raise StorageError(f"{text}: no storage backend for {scheme}:// is installed; {fix}") from error
    except ValueError as error:
        raise StorageError(f"{text}: {error}; use a path, s3://, gs:// or abfs://") from error
    guarded = stores.Guarded(fs, stores.PATIENCE if patience is None else patience)
    return cast(fsspec.AbstractFileSystem, guarded), path


def _local_path(text: str) -> str:
    """The path of a plain path or a ``file://`` URI. In the latter %XX is a byte (RFC 8089), unless a file has that
    very name."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        return text
    path = text[len(scheme[0]) + len("://") :]
    path = path.removeprefix("localhost") if path.startswith("localhost/") else path
    return path if os.path.lexists(path) else urllib.parse.unquote(path, errors="surrogateescape")


def _is_chain(text: str) -> bool:
    """Whether ``text`` chains file systems (``zip://a.parquet::s3://b/c.zip``); else ``::`` is part of a name."""
    first, *others = text.split("::")
    return bool(others) and ("://" in others[0] or first in fsspec.available_protocols())


def check_endpoint(uri: str, seconds: float = 5.0) -> None:
    """Try whether the endpoint that the options give for ``uri`` takes connections; backends try for minutes.
    Without an endpoint of its own, or behind a proxy, nothing is tried.

    Raises:
        StorageError: there is no such host.
        StoreUnavailableError: nothing answers there.
    """
    options = options_for(uri)
    endpoint = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url")
    if not endpoint and not is_local(uri) and _store(uri) == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return
    parts = urllib.parse.urlsplit(str(endpoint))
    host, scheme = parts.hostname or "", parts.scheme or "http"
    if scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        port = parts.port or {"https": 443}.get(scheme, 80)
        socket.create_connection((host, port), timeout=seconds).close()
    except (OSError, ValueError) as error:
        known = isinstance(error, OSError) and not isinstance(error, socket.gaierror)
        raise (StoreUnavailableError if known else StorageError)(
            f"{uri}: the endpoint {endpoint} cannot be reached ({error}); check endpoint_url"
        ) from error


@contextmanager
def backend_errors(uri: str | os.PathLike[str]) -> Iterator[None]:
    """While a place is first reached: a backend's own kinds of errors become one `StorageError` naming ``uri``."""
    check_endpoint(os.fspath(uri))
    try:
        yield
    except BackendError as error:  # no credentials, no such endpoint
        raise StorageError(
            f"{os.fspath(uri)} cannot be reached: {error}; check its credentials, and {OPTIONS_VARIABLE}"
        ) from error


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """``uri`` with ``parts`` below it, with forward slashes. A part may begin with one: keys of object stores do."""
    return "/".join([os.fspath(uri).rstrip("/"), *parts])


def absolute_uri(uri: str) -> str:
    """``uri`` as every process understands it: a local path is made absolute, with the folder we are in."""
    return str(open_fs(uri)[1]) if is_local(uri) else uri


def exists(uri: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is at ``uri``."""
    fs, path = open_fs(uri)
    return bool(fs.exists(path))


def names_in(folder: str) -> list[str]:
    """Names of what lies in a folder now, sorted; none if it does not exist.

    Raises ``OSError`` where fsspec's ``find`` and ``exists`` would take an error for an empty folder.
    """
    fs, path = open_fs(folder)
    fs.invalidate_cache()
    try:
        found = [name.rstrip("/") for name in fs.ls(path, detail=False)]
    except FileNotFoundError:
        return []
    return sorted(name.rpartition("/")[2] for name in found if name != path.rstrip("/"))


def answers(uri: str | os.PathLike[str]) -> bool:
    """Whether the store of ``uri`` answers now; a local one always does."""
    if is_local(uri):
        return True
    fs, path = open_fs(uri, patience=0)
    try:
        fs.exists(path)
    except StoreUnavailableError:
        return False
    except OSError:
        return True
    return True


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """The content of one file.

    Raises:
        MissingFileError: nothing is there.
    """
    fs, path = open_fs(uri)
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError as error:
        raise MissingFileError(f"{os.fspath(uri)} does not exist; check the path") from error


def temporary_name() -> str:
    """A name for a file that is being written, hidden and of a fixed length: the target's own may have 255 bytes."""
    return f".framecap.{uuid.uuid4().hex}.tmp"


@contextmanager
def atomic_path(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[str]:
    """A path to write to; on success the finished file appears at ``path`` in one step, else not at all.

    On a local file system that is a hidden temporary file, fsync and rename. On an object store the write
    itself is atomic (an object appears when its upload completes), so ``path`` itself is given.
    """
    if "file" not in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)):
        yield path
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(temporary_name())
    try:
        yield str(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes_atomic(uri: str | os.PathLike[str], data: bytes) -> None:
    """Write one small file so that a reader sees all of it or none of it.

    Raises:
        StorageError: the place cannot be written.
    """
    fs, path = open_fs(uri)
    try:
        with atomic_path(fs, path) as target:
            fs.pipe_file(target, data)
    except OSError as error:
        raise naming(error, f"{os.fspath(uri)} cannot be written") from error


def naming(error: OSError, text: str) -> StorageError:
    """``error`` as a ``StorageError`` that begins with ``text``, and stays one of a store that does not answer."""
    kind = StoreUnavailableError if isinstance(error, StoreUnavailableError) else StorageError
    return kind(f"{text}: {error}")


def cache_root() -> Path:
    """Where copies of remote captioners live: ``$FRAMECAP_CACHE``, else ``~/.cache/framecap``."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "framecap"


class CaptionerCopy(NamedTuple):
    """A local folder that holds a captioner, and the manifest that it was checked against."""

    folder: Path
    manifest: bytes


def verified_copy(uri: str | os.PathLike[str]) -> CaptionerCopy:
    """A local folder that holds the captioner at ``uri``, with every file as its manifest says, checked now.

    A local folder is used where it stands. A remote one is copied once per node into ``cache_root()``, under
    the sha256 of its manifest, safely with many processes at once: one copies under a file lock, the others
    wait; the folder appears by rename only when every checksum is right.

    Raises:
        MissingFileError: no captioner is there.
        ChecksumError: a file differs from the manifest, or could be loaded and is not in it.
    """
    if is_local(uri):
        folder = Path(open_fs(uri)[1])
        if not folder.is_dir():
            raise MissingFileError(f"{folder} is not a captioner directory; make one with `framecap assemble`")
        return CaptionerCopy(folder, verify_manifest(folder))
    with backend_errors(uri):
        manifest = read_bytes(join(uri, MANIFEST))
    target = cache_root() / hashlib.sha256(manifest).hexdigest()
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _download(uri, manifest, target)
                return CaptionerCopy(target, manifest)
    try:
        held = verify_manifest(target)
        if held != manifest:
            raise ChecksumError(f"{target / MANIFEST} is not the one at {os.fspath(uri)}")
    except (MissingFileError, ChecksumError) as error:
        raise ChecksumError(
            f"the copy of {os.fspath(uri)} on this node was changed ({error}); delete {target}, it is made anew"
        ) from error
    return CaptionerCopy(target, manifest)


def local_copy(uri: str | os.PathLike[str]) -> Path:
    """The folder of ``verified_copy``."""
    return verified_copy(uri).folder


def _download(uri: str | os.PathLike[str], manifest: bytes, target: Path) -> None:
    """Copy a captioner to ``target``; needs its lock, whose holder may also delete what a killed one left."""
    fs, root = open_fs(uri)
    for left in target.parent.glob(f"copy-{target.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"copy-{target.name}-", dir=target.parent))
    try:
        for name in manifest_files(manifest, join(uri, MANIFEST)):
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                fs.get_file(join(root, name), str(file))
            except FileNotFoundError as error:
                raise MissingFileError(f"{join(uri, name)} is listed in {MANIFEST} but does not exist") from error
        (temporary / MANIFEST).write_bytes(manifest)
        verify_manifest(temporary)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mark(info: dict[str, Any]) -> str:
    """Size with ETag, hash or modification time: what tells one version of a file from the next."""
    if "ino" in info:  # a local file; HDFS and SFTP also have an mtime and names that begin with a slash
        status = Path(info["name"]).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"
    for key in ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "updated"):
        if info.get(key) is not None:
            return f"{info['size']}-{str(info[key]).strip(chr(34))}"
    return str(info["size"])
