"""Files of a training run: written whole or not at all, with one clear error on a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from framecap.errors import TrainingError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk below ``path`` into a TrainingError that says so.

    torch.save and safetensors hide the OSError behind errors of their own; those are looked through.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = _os_error(error)
        if (cause is not None and cause.errno in _FULL) or "No space left" in str(error):
            raise TrainingError(f"no space left for {path}; free some and start the same command again") from error
        if cause is None:
            raise
        raise TrainingError(f"{path} cannot be written: {cause.strerror or cause}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content appears at ``path`` in one step once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise TrainingError unless ``needed`` bytes are free where ``folder`` is or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise TrainingError(
            f"{folder} has {free / 1e6:,.0f} MB free, {purpose} need about {needed / 1e6:,.0f} MB; "
            "free some or give another --work-dir"
        )
