"""Where the parts of a run lie: checkpoints, pairs and the captioner on any fsspec URI, the work folder on a disk.

Checkpoints on a remote file system are copied into the work folder, which all nodes see; the captioner is put
together there and then uploaded. Knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from framecap.errors import FramecapError, MissingFileError, SettingsError, StorageError
from framecap.manifest import MANIFEST
from framecap.storage import OPTIONS_VARIABLE, check_endpoint, is_local, join, mark, name_scheme, open_fs
from framecap.training.disk import clear_disk_errors
from framecap.training.settings import TrainSettings

CAPTIONER = "captioner"  # in the work folder: what is uploaded to an out that is no folder here
_LOCATIONS = ("encoder", "decoder", "pairs", "gap_pairs", "out", "work_dir")


def reach(options: dict[str, object], uris: Iterable[str]) -> None:
    """Give ``options`` to fsspec in this process, and try the endpoints of ``uris``.

    Raises SettingsError for options without a scheme, StorageError when nobody answers.
    """
    places = [uri for uri in uris if uri]
    if options:
        os.environ[OPTIONS_VARIABLE] = json.dumps(name_scheme(options, places))
    for place in places:
        check_endpoint(place)


def with_absolute_paths(settings: TrainSettings) -> TrainSettings:
    """The same settings with local places as paths that mean the same in a worker's folder."""
    places = {name: value for name in _LOCATIONS if (value := getattr(settings, name)) and is_local(value)}
    return settings.model_copy(update={name: open_fs(value)[1] for name, value in places.items()})


def check_out(settings: TrainSettings) -> None:
    """Raise SettingsError unless ``out`` is free (but for a broken upload of the same run) and the work folder is on
    a disk; nothing is written."""
    if not is_local(settings.run_dir):
        raise SettingsError(
            f"the work folder {settings.run_dir} is no folder on a disk; give --work-dir, a folder that all nodes see"
        )
    fs, path = open_fs(settings.out)
    try:
        taken = fs.exists(path) and (fs.isfile(path) or bool(fs.ls(path)))
        if taken and not is_local(settings.out) and (Path(settings.run_dir) / CAPTIONER).is_dir():
            taken = fs.exists(join(path, MANIFEST))  # else an upload of this run broke off
    except Exception as error:  # every backend has errors of its own; the operator needs one line
        raise StorageError(f"--out {settings.out} cannot be reached: {error}") from error
    if taken:
        raise SettingsError(f"--out {settings.out} exists and is not empty; give a folder that does not exist yet")
    if is_local(settings.out):
        parent = next(place for place in Path(path).parents if place.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise SettingsError(f"--out {settings.out} cannot be written: {parent} is no folder that may be written to")


def fetch_checkpoint(uri: str, root: Path, flag: str) -> str:
    """A local folder with the files of the checkpoint at ``uri``: itself if it is local, else a copy below ``root``.

    The copy is named by the files' names, sizes and ETags, so that a checkpoint that changed is copied anew; it
    appears by rename once it is whole. Raises MissingFileError when nothing is there, StorageError.
    """
    if is_local(uri):
        return uri
    fs, path = open_fs(uri)
    try:
        found = fs.find(path, maxdepth=1, detail=True)
        files = {name: info for name, info in found.items() if not name.endswith("/") and name != path}
        if not files:
            raise MissingFileError(f"{flag} {uri} holds no files; give the folder of a checkpoint")
        marks = [[name, mark(info)] for name, info in sorted(files.items())]
        target = root / hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]
        if not target.is_dir():
            with clear_disk_errors(root):
                root.mkdir(parents=True, exist_ok=True)
                temporary = Path(tempfile.mkdtemp(prefix="copy-", dir=root))
            try:
                for name in files:
                    fs.get_file(name, str(temporary / name.rpartition("/")[2]))
                temporary.chmod(0o755)
                temporary.replace(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except FramecapError:
        raise
    except Exception as error:  # see check_out
        raise StorageError(f"{flag} {uri} cannot be copied to {root}: {error}") from error
    return str(target)


def upload(folder: Path, uri: str) -> None:
    """Copy a captioner directory to ``uri``, its manifest last, so that a reader sees all of it or nothing.

    Raises StorageError.
    """
    fs, path = open_fs(uri)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    try:
        for name in sorted(files, key=lambda name: name == MANIFEST):
            place = join(path, name)
            fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(folder / name), place)
    except Exception as error:  # see check_out
        raise StorageError(f"{uri} cannot be written: {error}; {folder} holds the captioner") from error
