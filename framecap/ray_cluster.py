"""Joining a Ray cluster, or starting one on this machine; for captioning and training.

Imports Ray only when it is needed. Knows nothing of what runs there.
"""

from __future__ import annotations

import os
from pathlib import Path

from framecap.errors import SettingsError
from framecap.storage import is_local

_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit` in the driver's environment


def check_place_of_job(flag: str, uri: str | None) -> None:
    """Raise ``SettingsError`` if ``uri`` is a relative path and this process was started by ``ray job submit``: it
    would lie in Ray's copy of the working directory, which is deleted."""
    if uri and is_local(uri) and "://" not in uri and not Path(uri).is_absolute() and os.environ.get(_SUBMITTED):
        raise SettingsError(
            f"{flag} {uri} is relative, and under `ray job submit` that is a folder of Ray's own, which it deletes; "
            "give an absolute path that all nodes see, or a URI"
        )
