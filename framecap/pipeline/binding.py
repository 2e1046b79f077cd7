"""Which input an output belongs to: recorded in the state, since shards are told apart by their paths below it.

Another input with files named alike would replace the captions of the first. The same input may be named in any way,
and a part of it (a file, a folder, a glob) keeps the names that its shards have in the whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from framecap.errors import LockedError, SettingsError, StorageError
from framecap.pipeline.plan import read_output_footer
from framecap.shards import Listing, absolute, list_outputs
from framecap.storage import absolute_uri, is_local, join, open_fs, read_bytes, write_bytes_atomic

log = logging.getLogger(__name__)
RECORD = "input.json"


@dataclass(frozen=True)
class Input:
    """A folder of frame shards: as it was named, and ``place``, one spelling for all its names (links resolved)."""

    uri: str
    place: str

    @classmethod
    def of(cls, root: str) -> Input:
        uri = absolute_uri(root).rstrip("/")
        chained = "::" in uri and not is_local(uri)  # its outermost path alone is no place
        return cls(uri, uri if chained else absolute(uri or "/").rstrip("/"))

    def path_of(self, other: Input) -> str | None:
        """The path of ``other`` below this folder; empty if it is the same one, None if it is not in it."""
        if other.uri == self.uri or other.place == self.place:
            return ""
        for inner, outer in ((other.place, self.place), (other.uri, self.uri)):
            if inner.startswith(outer + "/"):
                return inner[len(outer) + 1 :]
        return None


def read_record(state_uri: str) -> Input | None:
    """The input that the output of this state belongs to; None if it is not recorded.

    Raises ``StorageError`` if what lies there is no record.
    """
    uri = join(state_uri, RECORD)
    try:
        content = json.loads(read_bytes(uri))
        return Input(str(content["uri"]), str(content["place"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{uri} does not say to which input the output belongs ({error!r}); delete it") from error


def bind_input(source: Listing, output_uri: str, state_uri: str, moved_from: str | None = None) -> Listing:
    """``source`` with the names that its shards have in ``output_uri``; writes nothing.

    ``moved_from``: where the input was. Outputs of versions that kept no record are taken over: they belong to the
    input of their last run, or to one whose frame shards are those that were captioned. Raises ``SettingsError`` if the
    output belongs to another input.
    """
    here = Input.of(source.root)
    record = read_record(state_uri)
    owner = record or _last_input(state_uri)
    if owner is not None:
        path = owner.path_of(here)
        if path is not None:
            return _below(source, owner, here, path) if path else source
        if moved_from is not None and owner.path_of(Input.of(moved_from)) == "":
            return source
    elif moved_from is not None:
        return source
    if _is_free(source, output_uri, recorded=record is not None):
        return source
    if record is None and read_record(state_uri) is not None:  # another run began to fill it meanwhile
        return bind_input(source, output_uri, state_uri, moved_from)
    whose = f"the input {owner.uri}" if owner is not None else "another input"
    was = owner.uri if owner is not None else "with its former place"
    raise SettingsError(
        f"--output-uri {output_uri} belongs to {whose}, not to {here.uri}, whose captions would be mixed with it or "
        f"replace it; choose another --output-uri or, if the input was moved, add --input-moved-from {was}"
    )


def claim_input(source: Listing, output_uri: str, state_uri: str, moved_from: str | None = None) -> None:
    """Record the input of a listing that ``bind_input`` gave; needs the lock. Raises ``SettingsError`` or
    ``LockedError`` if another run has recorded another one since."""
    if bind_input(source, output_uri, state_uri, moved_from).root != source.root:
        raise LockedError(f"another run began to fill {output_uri} meanwhile; run the same command again")
    here, record = Input.of(source.root), read_record(state_uri)
    if record is None or record.path_of(here) is None:
        write_bytes_atomic(join(state_uri, RECORD), (json.dumps(asdict(here), ensure_ascii=False) + "\n").encode())


def _below(source: Listing, owner: Input, here: Input, path: str) -> Listing:
    """The listing of a part of ``owner``, at ``path`` below it, as one of the whole input."""
    named = here.uri.startswith(owner.uri + "/") or absolute(owner.uri).rstrip("/") == owner.place
    return replace(
        source,
        root=owner.uri if named else owner.place,
        marks={join(path, name): mark for name, mark in source.marks.items()},
        failed={join(path, name): error for name, error in source.failed.items()},
        left_out=tuple(join(path, name) for name in source.left_out),
        whole=False,
    )


def _is_free(source: Listing, output_uri: str, recorded: bool) -> bool:
    """Whether no caption shard is there or, where no input was recorded, one of them was made of these frames."""
    own = False
    for shard, signature in _captioned(output_uri, source):
        own = True
        if not recorded and source.marks.get(shard) == signature:
            return True
    return not own


def _captioned(output_uri: str, source: Listing) -> Iterator[tuple[str, str]]:
    """Caption shards that framecap wrote, with the signatures of their frame shards; those of ``source`` first."""
    outputs = list_outputs(output_uri, source.marks)
    for shard in sorted(outputs, key=lambda shard: shard not in source.marks):
        entry = read_output_footer(output_uri, shard, outputs[shard])
        if entry is not None:
            yield shard, entry.signature


def _last_input(state_uri: str) -> Input | None:
    """The input of the newest run whose summary can be read: of versions that recorded none."""
    fs, path = open_fs(join(state_uri, "runs"))
    if not fs.exists(path):
        return None
    for name in sorted(fs.find(path), reverse=True):
        try:
            uri = json.loads(fs.cat_file(name))["settings"]["input_uri"]
            return Input.of(_root_of(uri))
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.debug("%s does not tell the input of its run: %r", name, error)
    return None


def _root_of(uri: str) -> str:
    """The folder that the names of the shards at ``uri`` (a folder, a file or a glob) begin in."""
    parts = uri.split("/")
    first = next((place for place, part in enumerate(parts) if set("*?[") & set(part)), None)
    fs, path = open_fs(uri)
    if fs.isdir(path) or (first is None and not fs.isfile(path)):
        return uri
    return "/".join(parts[:first] if first is not None else parts[:-1]) or ("/" if uri.startswith("/") else ".")
