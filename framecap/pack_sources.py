"""Where frames come from: the images and videos among files and folders, with the ids they will have.

Knows nothing of shards, nor of what is inside the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from framecap.errors import SettingsError
from framecap.storage import backend_errors, join, open_fs

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv"}
    | {".3gp", ".ogv"}
)


@dataclass(frozen=True)
class Source:
    """One file to pack: ``name`` is the frame id of an image, or the video id of a video."""

    uri: str
    name: str
    video_id: str
    position: int
    is_video: bool


def list_sources(given: Sequence[str]) -> list[Source]:
    """Every image and video among ``given``, in the order given; a folder's files in path order.

    With more than one source, a folder's names begin with the folder's own, so that ids stay apart. A video
    loses its suffix, unless two videos differ by nothing else.

    Raises:
        SettingsError: nothing to pack, a source that does not exist, or two files of one name.
    """
    files = [file for uri in given for file in _below(uri, prefix=len(given) > 1)]
    if not files:
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
    return sources


def _is_video(path: PurePosixPath) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _below(uri: str, prefix: bool) -> list[tuple[str, PurePosixPath, str]]:
    """(URI, path that names it, folder) of each file at or below ``uri``."""
    fs, path = open_fs(uri)
    root = PurePosixPath(path)
    with backend_errors(uri):
        if fs.isfile(path):
            return [(uri, PurePosixPath(root.name), root.parent.name)]
        if not fs.exists(path):
            raise SettingsError(f"{uri} does not exist; check the path")
        files = sorted(fs.find(path))
    found = []
    for file in files:
        relative = PurePosixPath(file).relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and relative.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            named = root.name / relative if prefix else relative
            folder = str(named.parent) if named.parent.name else root.name
            found.append((join(uri, str(relative)), named, folder))
    return found
