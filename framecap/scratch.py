"""Folders in the temporary directory that are deleted even if their process is killed: by the next run on that host.

The kernel's lock on a folder ends with the process that made it, whatever ended it, and tells it from one at work.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
_PREFIX = "framecap-work-"
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")
_YOUNG = 60.0  # seconds in which a folder may not be locked yet


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A ``TemporaryDirectory`` that ``sweep_scratch_folders`` finds once its process is gone."""

    def __init__(self) -> None:
        super().__init__(prefix=_PREFIX)
        self._handle = os.open(self.name, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: then nobody else can lock it either, and it stays
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def cleanup(self) -> None:
        super().cleanup()
        os.close(self._handle)


def sweep_scratch_folders() -> int:
    """Delete the scratch folders of processes that are gone; what cannot be deleted is left alone."""
    swept = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not _NAME.fullmatch(folder.name):
            continue
        with suppress(OSError):  # deleted meanwhile, locked, of another user, a link, or on a file system without locks
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(handle).st_mtime > _YOUNG:
                    shutil.rmtree(folder)
                    swept += 1
            finally:
                os.close(handle)
    if swept:
        log.info("deleted %d temporary folders of processes that were killed", swept)
    return swept
