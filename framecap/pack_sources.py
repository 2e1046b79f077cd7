"""Where frames come from: the images and videos among files and folders, with the ids they will have.

Knows nothing of shards, nor of what is inside the files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from framecap.errors import SettingsError
from framecap.shards import printable
from framecap.storage import backend_errors, is_local, join, open_fs

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv"}
    | {".3gp", ".ogv"}
)
_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


@dataclass(frozen=True)
class Source:
    """One file to pack: ``name`` is the frame id of an image, or the video id of a video."""

    uri: str
    name: str
    video_id: str
    position: int
    is_video: bool


@dataclass(frozen=True)
class Lost:
    """A file or folder below a source that cannot be packed."""

    uri: str
    error: str


def list_sources(given: Sequence[str], follow_links: bool = False) -> tuple[list[Source], list[Lost]]:
    """Every image and video among ``given``, in the order given; a folder's files in path order. And what is lost:
    folders that cannot be listed, names that are not UTF-8, pipes and devices, and, unless ``follow_links``, links that
    lead out of a folder.

    With more than one source, a folder's names begin with the folder's own, so that ids stay apart. A video
    loses its suffix, unless two videos differ by nothing else.

    Raises:
        SettingsError: nothing to pack, a source that does not exist, or two files of one name.
    """
    lost: list[Lost] = []
    files = [file for uri in given for file in _below(uri, len(given) > 1, follow_links, lost)]
    if not files and not lost:
        raise SettingsError(f"{', '.join(given) or 'no source'}: no image or video to pack there; check the path")
    stems = Counter(str(path.with_suffix("")) for _, path, _ in files if _is_video(path))
    sources, seen, positions = [], dict[str, str](), Counter[str]()
    for uri, path, folder in files:
        stem, video = str(path.with_suffix("")), _is_video(path)
        name = stem if video and stems[stem] == 1 else str(path)
        if name in seen:
            raise SettingsError(f"{seen[name]} and {uri} would share the id {name!r}; pack a folder that holds both")
        seen[name] = uri
        video_id = name if video else folder
        sources.append(Source(uri, name, video_id, positions[video_id], video))
        positions[video_id] += 1
    return sources, lost


def _is_video(path: PurePosixPath) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _below(uri: str, prefix: bool, follow_links: bool, lost: list[Lost]) -> list[tuple[str, PurePosixPath, str]]:
    """(URI, path that names it, folder) of each file at or below ``uri``; to ``lost`` go those that cannot be read."""
    fs, path = open_fs(uri)
    root = PurePosixPath(path)
    with backend_errors(uri):
        if fs.isfile(path):
            return [(uri, PurePosixPath(root.name), root.parent.name)]
        if not fs.exists(path):
            raise SettingsError(f"{uri} does not exist; check the path")
        files = sorted(
            _local_files(path, os.path.realpath(path), follow_links, lost) if is_local(uri) else fs.find(path)
        )
    found = []
    for file in files:
        relative = PurePosixPath(file).relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or relative.suffix.lower() not in _SUFFIXES:
            continue
        if printable(file) != file:
            lost.append(Lost(printable(join(uri, str(relative))), "its name is not UTF-8; rename it"))
        else:
            named = root.name / relative if prefix else relative
            folder = str(named.parent) if named.parent.name else root.name
            found.append((join(uri, str(relative)), named, folder))
    return found


def _local_files(
    folder: str, root: str, follow_links: bool, lost: list[Lost], above: tuple[str, ...] = ()
) -> Iterator[str]:
    """Paths of the files below a local folder. A link to a folder ``above`` it is not entered, nor, unless
    ``follow_links``, one that leads out of ``root``; all these are real paths."""
    try:
        with os.scandir(folder) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        lost.append(Lost(printable(folder), f"the folder cannot be listed: {error.strerror or error}"))
        return
    above = (*above, os.path.realpath(folder))
    for entry in entries:
        real, is_folder = os.path.realpath(entry.path), entry.is_dir()
        wanted = not entry.name.startswith(".") and (is_folder or Path(entry.name).suffix.lower() in _SUFFIXES)
        if entry.is_symlink() and not follow_links and not f"{real}/".startswith(root.rstrip("/") + "/"):
            if wanted:
                text = f"it is a link to {printable(real)}; --follow-links packs what such links lead to"
                lost.append(Lost(printable(entry.path), text))
        elif is_folder:
            if real not in above:
                yield from _local_files(entry.path, root, follow_links, lost, above)
        elif entry.is_file() or not Path(real).exists():  # a link to nothing: whoever opens it says so
            yield entry.path
        elif wanted:
            lost.append(Lost(printable(entry.path), "it is no regular file"))
