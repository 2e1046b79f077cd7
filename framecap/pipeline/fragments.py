"""Fragments: captions of one chunk, kept in the state's ``fragments/`` until their shards are published.

An Arrow IPC file whose metadata says which rows of which shards it holds; its name follows from that, so a
retried task writes the same file again. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from dataclasses import dataclass

import pyarrow as pa

from framecap.errors import StorageError
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.plan import Chunk, Piece
from framecap.storage import join, names_in, open_fs, read_bytes, write_bytes_atomic
from framecap.stores import failure_kind

log = logging.getLogger(__name__)
_RETRY_WAITS = (1.0, 5.0, 25.0)  # seconds
SUFFIX = ".fragment"
_NAME = re.compile(r"[0-9a-f]{32}\.fragment")
FOLDER = "fragments"
_PIECES = b"framecap.pieces"
_FINGERPRINT = b"framecap.fingerprint"


@dataclass(frozen=True)
class Fragment:
    """A fragment on storage: ``pieces`` in the order of its rows."""

    name: str
    fingerprint: str
    pieces: Chunk


def fragment_name(pieces: Chunk, fingerprint: str) -> str:
    """A name that the rows, their shards' signatures and the fingerprint decide, and nothing else."""
    key = json.dumps([fingerprint, _as_lists(pieces)], ensure_ascii=False)
    return hashlib.sha256(key.encode()).hexdigest()[:32] + SUFFIX


def is_fragment_name(name: str) -> bool:
    """Whether a file of this name was written by framecap."""
    return _NAME.fullmatch(name) is not None


def write_fragment(folder: str, pieces: Chunk, fingerprint: str, captions: pa.Table, host: Host = THIS_HOST) -> str:
    """Write the captions of ``pieces`` in one atomic step; returns the fragment's name.

    A store that refuses is asked again for half a minute: the captions have cost GPU time. Raises ``StorageError``
    after that, and ``ValueError`` unless there is one caption per row: rows are told apart by their place alone.
    """
    if len(captions) != (rows := sum(piece.stop - piece.start for piece in pieces)):
        raise ValueError(f"{len(captions)} captions for the {rows} rows of {pieces}")
    metadata = {_PIECES: json.dumps(_as_lists(pieces)).encode(), _FINGERPRINT: fingerprint.encode()}
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    table = captions.replace_schema_metadata(metadata)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    name = fragment_name(pieces, fingerprint)
    for wait in (*_RETRY_WAITS, None):
        try:
            write_bytes_atomic(join(folder, name), sink.getvalue())
            break
        except StorageError as error:
            if wait is None or failure_kind(error, "") == "no_space":
                raise
            log.warning("fragment %s cannot be written (%s); trying again in %.0f s", name, error, wait)
            host.sleep(wait)
    return name


def read_fragment(folder: str, name: str) -> tuple[Fragment, pa.Table]:
    """A fragment and its rows. Raises ``pa.ArrowInvalid`` or ``KeyError`` if it is not one of ours."""
    with pa.ipc.open_file(pa.py_buffer(read_bytes(join(folder, name)))) as reader:
        metadata = reader.schema.metadata or {}
        pieces = tuple(Piece(*values) for values in json.loads(metadata[_PIECES]))
        fragment = Fragment(name, metadata[_FINGERPRINT].decode(), pieces)
        return fragment, reader.read_all().replace_schema_metadata(None)


def list_fragments(folder: str) -> list[str]:
    """Names of all files in the fragments folder, leftovers of killed writers included."""
    return names_in(folder)


def delete_fragment(folder: str, name: str) -> None:
    """Delete a file of the fragments folder; one that cannot be deleted now is left for the next run."""
    fs, path = open_fs(join(folder, name))
    try:
        fs.rm_file(path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("fragment %s cannot be deleted (%s); the next run does it", name, error)


def _as_lists(pieces: Chunk) -> list[list[object]]:
    return [[piece.shard, piece.signature, piece.start, piece.stop, piece.basis] for piece in pieces]
