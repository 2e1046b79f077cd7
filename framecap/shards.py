"""Parquet shards at a URI: listing them, their marks (which change when the file does), opening them.

Knows nothing of Ray, of captioners, or of how a run uses the shards.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fsspec.utils import glob_translate, stringify_path

from framecap.errors import BackendError, SettingsError, ShardError, StorageError, StoreUnavailableError
from framecap.page_sizes import WatchedFile
from framecap.schema import SHARD_SUFFIX
from framecap.storage import backend_errors, is_local, join, mark, open_fs
from framecap.stores import failure_kind

_MAGIC = frozenset("*?[")
_READ_BUFFER = 1 << 20  # column chunks are streamed in pieces of this size, whatever the row group's size
# Names that others give to Parquet files. Only ``*.parquet`` is read: every reader of an output knows that one.
_PARQUET_LIKE = re.compile(r"\.(parquet|parq|pq)(\.(gz|gzip|snappy|zst|zstd|br|brotli|lz4|lzo|bz2))?$", re.IGNORECASE)
_NO_DATA = ("_delta_log", "_temporary", "_spark_metadata", "_framecap")  # folders whose Parquet files are no tables
_LONGEST_NAME = 255  # bytes
_MOST_ROWS = 100_000_000  # nulls take no space: a footer of some bytes may promise billions of rows


@dataclass(frozen=True)
class Listing:
    """The shards below ``root``.

    ``marks``: relative path → mark. ``recursive``: whether new files below ``root`` would be listed. ``failed``: what
    is there but cannot be used, by its printable name; that of a folder ends in a slash. ``left_out``: files that may
    be Parquet, and are passed over by their names. ``whole``: whether this is all of ``root``, not a file or glob.
    """

    root: str
    marks: dict[str, str]
    recursive: bool
    failed: dict[str, ShardError] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    whole: bool = False

    def misses(self, name: str) -> bool:
        """Whether a shard of this name is known to be gone: it would be listed, if it were there."""
        folders = (folder for folder in self.failed if folder.endswith("/"))
        return self.whole and name not in self.marks and not any(map(name.startswith, folders))


def list_input(uri: str, called: str = "--input-uri") -> Listing:
    """The frame shards at ``uri``: a file, a folder (recursive, ``*.parquet``) or a glob.

    Names that start with ``_`` or ``.`` are no data. A file is taken whatever its name, and so is what matches a glob
    that ends in an ending of its own (``*.parq``). Raises ``SettingsError`` if there is nothing; ``called`` is the
    name of ``uri`` in its message.
    """
    try:
        listing = _list_input(uri)
    except FileNotFoundError:
        raise SettingsError(f"{called} {uri} does not exist") from None
    except Exception as error:  # every backend has errors of its own; the operator needs one line
        if isinstance(error, SettingsError | StorageError) and not isinstance(error, BackendError):
            raise
        raise SettingsError(f"{called} {uri} cannot be listed: {short_text(error)}") from error
    if not listing.marks and not listing.failed:
        there = f"; it holds {describe_names(listing.left_out)}" if listing.left_out else ""
        raise SettingsError(f"{called} {uri} holds no {SHARD_SUFFIX} file{there}")
    return listing


def _list_input(uri: str) -> Listing:
    fs, path = open_fs(uri)
    if fs.isfile(path):
        root, _, name = uri.rpartition("/")
        return Listing(root or ("/" if uri.startswith("/") else "."), {name: mark(fs.info(path))}, False)
    if fs.isdir(path):
        return _walk(uri, _Rule()).listing(uri.rstrip("/") or "/", recursive=True, whole=True)
    if not _MAGIC & set(path):
        raise FileNotFoundError(path)
    parts = uri.split("/")
    first = next(i for i in range(len(parts)) if _is_pattern(parts, i))
    root = "/".join(parts[:first]) or ("/" if uri.startswith("/") else ".")
    return _walk(root, _Rule(tuple(parts[first:]))).listing(root, recursive="**" in uri)


def _is_pattern(parts: list[str], place: int) -> bool:
    """Whether a part of a glob is one; a folder may have brackets in its name."""
    part = parts[place]
    if not _MAGIC & set(part):
        return False
    fs, path = open_fs("/".join(parts[: place + 1]))
    return bool(_MAGIC & set(part.replace("[", ""))) or not fs.isdir(path)


def list_output(uri: str, called: str = "OUT", also: Iterable[str] = ()) -> dict[str, str]:
    """`list_outputs` of a place that must be there. Raises ``SettingsError``, with ``called`` in its message."""
    with backend_errors(uri):
        fs, path = open_fs(uri)
        if fs.isfile(path):
            raise SettingsError(f"{called} {uri} is a file; give the folder that the job wrote (its --output-uri)")
        if not fs.exists(path):
            raise SettingsError(f"{called} {uri} does not exist; give the job's --output-uri")
        return list_outputs(uri, also)


def list_outputs(uri: str, also: Iterable[str] = ()) -> dict[str, str]:
    """Relative path → mark of every caption shard below ``uri``; empty if the folder does not exist.

    Every file that may be Parquet counts, and those of ``also``, the names of the input: a frame shard that was named
    by its full path may have any name. Raises ``StorageError`` if a folder cannot be listed.
    """
    rule = _Rule(any_parquet=True)
    found = _walk(uri, rule)
    for name, error in found.failed.items():
        if name.endswith("/"):
            kind = StoreUnavailableError if error.kind == "unavailable" else StorageError
            raise kind(f"{join(uri, name)}: {error.message}")
    for name in also:
        if not rule.judge(name):
            try:
                found.marks[name] = mark_of(join(uri, name))
            except FileNotFoundError:
                continue
    return dict(sorted(found.marks.items()))


def is_hidden(name: str) -> bool:
    """Whether a file is no data by convention: its name, or that of a folder of its, starts with ``_`` or ``.``."""
    return any(part[:1] in ("_", ".") for part in name.split("/"))


class _Rule:
    """Which names below a folder are shards: by the parts of a glob, if there are any, and by their ending."""

    def __init__(self, glob: tuple[str, ...] = (), any_parquet: bool = False) -> None:
        self._glob = glob
        self._pattern = re.compile(glob_translate("/".join(glob))) if glob else None
        self._any_parquet = any_parquet
        self._own_ending = bool(glob) and glob[-1][-1:] not in ("*", "?", "]") and "." in glob[-1]
        self._may_hide = any(map(is_hidden, glob))

    @property
    def names_hidden(self) -> bool:
        """Whether what is hidden is looked through, to name it."""
        return not self._any_parquet

    @property
    def depth(self) -> int | None:
        """How many levels down shards lie at most; None: any number."""
        return None if not self._glob or any("**" in part for part in self._glob) else len(self._glob)

    def enters(self, folder: str) -> bool:
        """Whether shards may lie below a folder, given by its relative path."""
        for place, part in enumerate(folder.split("/")):
            if not self._glob or "**" in self._glob[place]:
                return True
            if place >= len(self._glob) - 1 or not fnmatchcase(part, self._glob[place]):
                return False
        return True

    def judge(self, name: str) -> bool | None:
        """Whether a file is a shard; None: no, and not worth naming."""
        if self._pattern is not None and not self._pattern.match(name):
            return None
        parts = name.split("/")
        if not self._own_ending and not _PARQUET_LIKE.search(parts[-1]):
            return None
        if any(part in _NO_DATA for part in parts):
            return None
        if is_hidden(name) and not self._may_hide:
            return False
        return self._own_ending or self._any_parquet or name.endswith(SHARD_SUFFIX)


@dataclass
class _Found:
    marks: dict[str, str] = field(default_factory=dict)
    failed: dict[str, ShardError] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, name: str, rule: _Rule, read_mark: Callable[[], str]) -> None:
        """Sort one file in; ``read_mark`` is asked only if it is a shard."""
        verdict = rule.judge(name)
        if verdict is None:
            return
        if not verdict:
            self.left_out.append(printable(name))
        elif printable(name) != name:
            self.failed[printable(name)] = ShardError("bad_name", "its name is not UTF-8; rename it")
        else:
            self.marks[name] = read_mark()

    def listing(self, root: str, recursive: bool, whole: bool = False) -> Listing:
        marks = dict(sorted(self.marks.items()))
        return Listing(root, marks, recursive, self.failed, tuple(sorted(self.left_out)), whole)


def _walk(root: str, rule: _Rule) -> _Found:
    """Everything below ``root`` that ``rule`` judges; nothing if the folder does not exist."""
    fs, path = open_fs(root)
    found = _Found()
    if is_local(root):
        if Path(path).is_dir():
            _scan(path, "", rule, found, (_identity(path),))
        return found
    fs.invalidate_cache()
    base = path.rstrip("/")
    for name, info in fs.find(base, maxdepth=rule.depth, detail=True).items():
        # What follows the slash after ``base`` may itself begin with one: ``//`` is as good as any key.
        found.add(name[len(base) + 1 :], rule, lambda info=info: mark(info))  # type: ignore[misc]
    return found


def _scan(folder: str, prefix: str, rule: _Rule, found: _Found, above: tuple[tuple[int, int], ...]) -> None:
    """Recursive listing of a local folder; ten times faster than through fsspec. ``above``: the folders on the way,
    so that a link to one of them ends nowhere."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        if not prefix:
            raise StorageError(f"{folder} cannot be listed: {error.strerror or error}") from error
        _cannot_be_listed(prefix, error, found)
        return
    for entry in entries:
        name = prefix + entry.name
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link that leads to itself: whoever opens it says so
            is_folder = False
        if not is_folder:
            found.add(name, rule, lambda entry=entry: _local_mark(entry))  # type: ignore[misc]
        elif rule.enters(name) and entry.name not in _NO_DATA and (rule.names_hidden or not is_hidden(entry.name)):
            try:
                identity = _identity(entry.path)
            except OSError as error:
                _cannot_be_listed(name, error, found)
                continue
            if identity in above:
                found.left_out.append(f"{printable(name)} (a link to a folder above it)")
            else:
                _scan(entry.path, f"{name}/", rule, found, (*above, identity))


def _identity(folder: str) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def _cannot_be_listed(name: str, error: OSError, found: _Found) -> None:
    text = f"the folder cannot be listed: {error.strerror or error}"
    found.failed[printable(name.rstrip("/")) + "/"] = ShardError(failure_kind(error, "unreadable"), text)


def _local_mark(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except OSError:  # a link to nothing or to itself, or gone since: whoever opens it says so
        return "gone"
    return f"{status.st_size}-{status.st_mtime_ns}"


def mark_of(uri: str) -> str:
    """The present mark of one file. Raises ``FileNotFoundError``."""
    fs, path = open_fs(uri)
    if not is_local(uri):
        fs.invalidate_cache(path.rpartition("/")[0])
    return mark(fs.info(path))


def fit_output(listing: Listing, output_uri: str) -> Listing:
    """``listing`` less the shards whose captions cannot have the same name under ``output_uri``: a key of an object
    store may be no path of a file system, or the path of another one."""
    if not is_local(output_uri):
        return listing
    failed = dict(listing.failed)
    for name in listing.marks:
        if posixpath.normpath(name) != name or name.startswith(("/", "../")):
            failed[name] = ShardError("bad_name", f"no file under {output_uri} can have this name; rename it")
        elif any(len(part.encode()) > _LONGEST_NAME for part in name.split("/")):
            failed[name] = ShardError("bad_name", f"a name of more than {_LONGEST_NAME} bytes; rename it")
    marks = {name: value for name, value in listing.marks.items() if name not in failed}
    return replace(listing, marks=marks, failed=failed)


def check_places(listing: Listing, input_uri: str, output_uri: str) -> None:
    """Raise ``SettingsError`` if outputs would be listed as inputs, overwrite them, or the reverse."""
    source, target = absolute(listing.root), absolute(output_uri)
    if source == target:
        raise SettingsError(f"--output-uri {output_uri} is where the frame shards are; choose another folder")
    if listing.recursive and target.startswith(source.rstrip("/") + "/"):
        raise SettingsError(f"--output-uri {output_uri} lies inside --input-uri {input_uri}")
    if source.startswith(target.rstrip("/") + "/"):
        raise SettingsError(f"--input-uri {input_uri} lies inside --output-uri {output_uri}")


def absolute(uri: str) -> str:
    """One spelling for one place, to compare places by; a local one without links."""
    fs, path = open_fs(stringify_path(uri))
    if is_local(uri):
        return str(Path(path).resolve())
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return f"{protocol}://{path}"


class _Shard(pq.ParquetFile):
    """A Parquet file that closes what it reads from."""

    def close(self, force: bool = True) -> None:
        super().close(force)


def open_shard(
    root: str, shard: str, metadata: Any = None, read_dictionary: Sequence[str] = (), int96_unit: str = "us"
) -> pq.ParquetFile:
    """Open a shard for streaming. Raises ``ShardError``: ``unreadable`` if it is not a whole Parquet file,
    ``unavailable`` if its store does not answer. Reading raises it as well, of kind ``too_large``, where a page
    unpacks to far more than it takes in the file.

    ``metadata``: the footer, if it was read before; ``read_dictionary``: columns to read as Arrow dictionaries.
    INT96 timestamps are read in ``int96_unit``: microseconds, as Spark means them. In nanoseconds those outside 1677
    to 2262 would come out as other dates.
    """
    uri = join(root, shard)
    fs, path = open_fs(uri)
    try:
        if is_local(uri):
            source = WatchedFile(open(path, "rb"))  # noqa: SIM115 (closed with the shard)
        else:
            source = WatchedFile(fs.open(path, "rb", block_size=4 << 20, cache_type="readahead"))
        file = _Shard(
            source,
            metadata=metadata,
            read_dictionary=list(read_dictionary) or None,
            buffer_size=_READ_BUFFER,
            pre_buffer=False,
            coerce_int96_timestamp_unit=int96_unit,
        )
        if file.metadata.num_rows > _MOST_ROWS:
            raise ShardError("too_large", f"{file.metadata.num_rows:,} rows; a shard may have {_MOST_ROWS:,}: split it")
        source.watch(file.metadata)
        return file
    except Exception as error:  # whatever a file holds is that shard's error
        raise as_shard_error(error) from error


def as_shard_error(error: Exception, kind: str = "unreadable") -> ShardError:
    """What went wrong with one shard as its entry of the summary; ``kind``: where its store is not the cause."""
    return error if isinstance(error, ShardError) else ShardError(failure_kind(error, kind), short_text(error))


def short_text(error: BaseException) -> str:
    """An error in one printable line; with its class where the text alone says little."""
    text = " ".join(str(error).split())
    known = isinstance(error, OSError | ValueError | FileNotFoundError) and text
    return printable(text if known else f"{type(error).__name__}: {text}".rstrip(": "))[:300]


def printable(name: str) -> str:
    """``name`` with ``\\xe9`` for each byte that is not UTF-8 and Python keeps as a surrogate: such a text cannot be
    printed, nor written into JSON or Parquet."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def counted(number: int, noun: str) -> str:
    """``1 shard``, ``1,200 shards``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def describe_names(names: Sequence[str], most: int = 5) -> str:
    """``2 files that are no shards by their names: a.parq, b.parq``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    one = len(names) == 1
    what = "1 file that is no shard by its name" if one else f"{len(names)} files that are no shards by their names"
    return f"{what}: {', '.join(names[:most])}{more}"
