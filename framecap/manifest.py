"""manifest.json: sha256 and size of every file of a captioner directory, and the check that this is what it holds.

The manifest is all that is trusted of a captioner: every file that can be loaded is listed, every listed file is there
with that content, and no name leads out of the directory. Knows nothing of URIs or of what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framecap.errors import ChecksumError, MissingFileError

MANIFEST = "manifest.json"
# What no captioner can do without; which weights and tokenizer files there are differs.
_NEEDED = ("config.json", "bridge.safetensors", "encoder/config.json", "decoder/config.json")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
# Files that may be loaded (``weights.find_weights`` takes no shard of another ending); a README may lie beside.
_LOADABLE = (".json", ".safetensors", ".bin", ".pt", ".model")
_LOADABLE_NAMES = ("merges.txt",)
_AGAIN = "assemble the captioner again"


def write_manifest(directory: str | Path) -> None:
    """Write manifest.json: sha256 and size in bytes of every file below ``directory``, in name order."""
    root = Path(directory)
    files = {
        name: {"sha256": sha256_file(root / name), "size": (root / name).stat().st_size} for name in _files_below(root)
    }
    (root / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def verify_manifest(folder: Path) -> bytes:
    """Check ``folder`` against its manifest.json, whose content is returned: every listed file is there (size, then
    sha256), and no file that could be loaded is unlisted.

    Raises:
        MissingFileError: the manifest or a file that it lists is not there.
        ChecksumError: a file differs from the manifest or is not listed, or the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; a captioner directory is made with `framecap assemble`")
    data = path.read_bytes()
    files = manifest_files(data, str(path))
    for name in _loadable_files(folder):
        if name not in files:
            raise ChecksumError(
                f"{folder / name} is not listed in {MANIFEST}; move it away, or, if it is a part of this captioner, "
                + _AGAIN
            )
    for name, entry in files.items():
        _check_file(folder / name, entry)
    return data


def _check_file(file: Path, entry: dict[str, Any]) -> None:
    if not file.is_file():
        raise MissingFileError(f"{file} is listed in {MANIFEST} but does not exist; copy the captioner again")
    size = file.stat().st_size
    if size != entry["size"]:
        raise ChecksumError(f"{file} has {size} bytes, {MANIFEST} says {entry['size']}; copy the captioner again")
    digest = sha256_file(file)
    if digest != entry["sha256"]:
        raise ChecksumError(f"{file} has sha256 {digest}, {MANIFEST} says {entry['sha256']}; copy the captioner again")


def manifest_files(data: bytes, source: str) -> dict[str, dict[str, Any]]:
    """The ``files`` table of a manifest: relative path → ``{"sha256": hex, "size": bytes}``.

    Raises:
        ChecksumError: the manifest is damaged, names a path outside its folder, or lacks a file that every captioner
            has.
    """
    try:
        files = json.loads(data)["files"]
        entries = {str(name): {"sha256": str(e["sha256"]), "size": int(e["size"])} for name, e in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ChecksumError(f"{source} is not a captioner manifest ({error!r}); {_AGAIN}") from error
    for name in entries:
        if not _stays_inside(name):
            raise ChecksumError(f"{source} lists {name!r}, which lies outside its folder; {_AGAIN}")
    for needed in _NEEDED:
        if needed not in entries:
            raise ChecksumError(f"{source} does not list {needed}; {_AGAIN}")
    for part in ("encoder", "decoder"):
        if not any(name.startswith(f"{part}/") and name.endswith(_WEIGHTS) for name in entries):
            raise ChecksumError(f"{source} lists no weights in {part}/; {_AGAIN}")
    return entries


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a local file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stays_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative path, spelt in the one way that ``write_manifest`` does."""
    parts = name.split("/")
    return bool(name) and not {"", ".", ".."} & set(parts) and "\\" not in name and "\0" not in name


def _loadable_files(root: Path) -> Iterator[str]:
    """Relative paths of all files that loading the captioner at ``root`` may open, present or not in its manifest."""
    for part in ("", "encoder", "decoder"):
        folder = root / part
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = file.relative_to(root).as_posix()
            if name != MANIFEST and (name.endswith(_LOADABLE) or file.name in _LOADABLE_NAMES):
                yield name


def _files_below(root: Path) -> Iterator[str]:
    """Relative paths of all files below ``root`` but the manifest, in name order; links are followed once."""
    seen, found = set(), []
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        seen.add(here.resolve())
        folders[:] = [name for name in folders if (here / name).resolve() not in seen]
        found += [(here / name).relative_to(root).as_posix() for name in names]
    yield from sorted(name for name in found if name != MANIFEST and (root / name).is_file())
