"""Where the state of an output lies: in OUT/_framecap, or in a folder of its own (``--state-uri``).

In the second case no file under OUT but the caption shards holds a byte: an empty one, named after the folder,
points to it, and the folder names OUT in return. Only where both agree is it the state of that output; so no run
works beside another one, or on another's state. Knows nothing of what else the state holds.
"""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import quote, unquote

from framecap.errors import FramecapError, SettingsError
from framecap.schema import STATE_FOLDER
from framecap.shards import Listing, absolute
from framecap.storage import exists, is_local, join, names_in, open_fs, read_bytes, write_bytes_atomic

_MARKER = "state-at."  # followed by the quoted URI
_OUTPUT = "output"  # holds the URI of OUT
_OTHERS = {"fragments", "input.json", "ledger", "ledger.jsonl", "runs"}
_LONGEST = 255  # bytes of a file name


def state_of(output_uri: str) -> str:
    """The state of ``output_uri``: where its marker points to, else OUT/_framecap."""
    default = join(output_uri, STATE_FOLDER)
    markers = [name for name in _names(default) if name.startswith(_MARKER)]
    return unquote(markers[0].removeprefix(_MARKER)) if markers else default


def place_state(output_uri: str, state_uri: str | None, source: Listing) -> str:
    """Where a run keeps its state: at ``state_uri``, by default where OUT has it.

    Raises ``SettingsError`` if no state can be there.
    """
    default = join(output_uri, STATE_FOLDER)
    state_uri = state_uri or state_of(output_uri)
    if absolute(state_uri) == absolute(default):
        return default
    state_uri, state = _whole(state_uri), absolute(state_uri)
    for flag, uri, recursive in (("--output-uri", output_uri, True), ("--input-uri", source.root, source.recursive)):
        place = absolute(uri)
        if state == place or _inside(place, state) or (recursive and _inside(state, place)):
            raise SettingsError(f"--state-uri {state_uri} overlaps with {flag} {uri}; choose a folder apart from it")
    if STATE_FOLDER in state.split("/"):
        raise SettingsError(f"--state-uri {state_uri} is kept for the output above it; choose another name")
    if (excess := len(_marker(state_uri)) - _LONGEST) > 0:
        raise SettingsError(
            f"--state-uri {state_uri} is {excess} bytes too long to be the name of a file in {default}; "
            "choose a shorter one (what is no Latin letter or digit counts three times)"
        )
    return state_uri


def check_state(output_uri: str, state_uri: str) -> None:
    """Raise ``SettingsError`` unless the state of ``output_uri`` is at ``state_uri``, or can be put there."""
    default, marker = join(output_uri, STATE_FOLDER), _marker(state_uri)
    present = _names(default)
    for name in present:
        if name.startswith(_MARKER) and name != marker:
            other = unquote(name.removeprefix(_MARKER))
            raise SettingsError(
                f"the state of {output_uri} is at {other}; give --state-uri {other}, "
                f"or, if that folder was moved, delete {join(default, name)}"
            )
    if state_uri == default:
        return
    if own := [name for name in present if name != marker]:
        instead = f"delete {join(default, marker)}" if marker in present else "leave --state-uri away"
        raise SettingsError(f"{default} holds state of its own ({own[0]}); move it to {state_uri} first, or {instead}")
    inside = _names(state_uri)  # before the owner: a run that claims this state meanwhile writes one
    owner = _owner(state_uri)
    if owner is None and marker in present:
        raise SettingsError(
            f"{state_uri} does not hold the state of {output_uri}; bring it back, "
            f"or, to begin without it, delete {join(default, marker)}"
        )
    if owner not in (None, _whole(output_uri)):
        raise SettingsError(
            f"--state-uri {state_uri} is the state of {owner}; choose another folder, "
            f"or, if that output was moved, write {_whole(output_uri)} into {join(state_uri, _OUTPUT)}"
        )
    foreign = [name for name in inside if name not in _OTHERS and not name.startswith("lock")]
    if owner is None and foreign:
        fix = "move its contents up into that folder" if foreign[0] == STATE_FOLDER else "choose a folder of its own"
        raise SettingsError(f"--state-uri {state_uri} holds other files ({foreign[0]}); {fix}")


def claim_state(output_uri: str, state_uri: str) -> None:
    """Let OUT and a state elsewhere name each other; needs the lock.

    Of rivals with different states each writes first and looks then, so that not both can go on. Raises
    ``SettingsError``, having taken back what it wrote, if this one must not.
    """
    check_state(output_uri, state_uri)
    default = join(output_uri, STATE_FOLDER)
    if state_uri == default:
        return
    contents = {join(state_uri, _OUTPUT): _whole(output_uri).encode(), join(default, _marker(state_uri)): b""}
    new = [uri for uri in contents if not exists(uri)]
    try:
        for uri in new:
            write_bytes_atomic(uri, contents[uri])
        check_state(output_uri, state_uri)
    except FramecapError:
        for uri in new:
            fs, path = open_fs(uri)
            with suppress(OSError):  # it was not written, or the next run with this state finds it
                fs.rm_file(path)
        raise


def _marker(state_uri: str) -> str:
    return _MARKER + quote(state_uri, safe="")


def _whole(uri: str) -> str:
    """The URI under which another process finds the place: a local path is made absolute, no other loses a part."""
    return absolute(uri) if is_local(uri) else uri.rstrip("/")


def _inside(inner: str, outer: str) -> bool:
    return inner.startswith(outer.rstrip("/") + "/")


def _owner(state_uri: str) -> str | None:
    try:
        return read_bytes(join(state_uri, _OUTPUT)).decode(errors="replace").strip()
    except (FileNotFoundError, IsADirectoryError):
        return None


def _names(folder: str) -> list[str]:
    """What is in a folder now, without what is hidden."""
    return [name for name in names_in(folder) if not name.startswith(".")]
