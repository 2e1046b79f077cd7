"""Tidying up OUT and its state: what killed writers left, and caption shards whose frame shard is gone.

Only what framecap wrote is deleted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Container
from pathlib import Path

from framecap.pipeline.job import Job
from framecap.pipeline.ledger import Ledger
from framecap.pipeline.plan import Plan, read_output_footer
from framecap.schema import STATE_FOLDER
from framecap.shards import counted, mark_of
from framecap.storage import is_local, join, names_in, open_fs

log = logging.getLogger(__name__)
_NAMED = 20  # deleted shards that the log names; summary.json has them all
_TEMPORARY = re.compile(r"\.framecap\.[0-9a-f]{32}\.tmp")
_OF_THE_STATE = re.compile(r"lock\.[0-9a-f]{32}(\.void)?")
_NAMED_AFTER_ITS_TARGET = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{32}\.tmp")  # of versions before 27 November 2026


def sweep_temporary_files(uri: str, shards: Container[str], is_state: bool = False) -> int:
    """Delete temporary files of killed writers below ``uri``. Needs the lock.

    On a store objects appear whole; there are only those beside the lock.

    ``shards``: relative paths of caption shards; ``is_state``: whether ``uri`` is the state itself.
    """
    if not is_local(uri):
        return _sweep_beside_lock(uri) if is_state else 0
    root = Path(open_fs(uri)[1])
    swept = 0
    for folder, _, names in os.walk(root):
        place = Path(folder).relative_to(root)
        in_state = is_state or place.parts[:1] == (STATE_FOLDER,)
        for name in names:
            if _is_temporary(place, name, in_state, shards):
                Path(folder, name).unlink(missing_ok=True)
                swept += 1
    return swept


def _sweep_beside_lock(state_uri: str) -> int:
    fs, path = open_fs(state_uri)
    left = [name for name in names_in(state_uri) if _OF_THE_STATE.fullmatch(name)]
    for name in left:
        fs.rm_file(f"{path}/{name}")
    return len(left)


def _is_temporary(folder: Path, name: str, in_state: bool, shards: Container[str]) -> bool:
    if _TEMPORARY.fullmatch(name) or (in_state and _OF_THE_STATE.fullmatch(name)):
        return True
    old = _NAMED_AFTER_ITS_TARGET.fullmatch(name)
    return old is not None and (in_state or (folder / old["target"]).as_posix() in shards)


def prune(job: Job, plan: Plan, ledger: Ledger) -> list[str]:
    """Delete caption shards whose frame shard is gone; only such as framecap wrote. Returns their names."""
    pruned = []
    for shard in plan.gone:
        uri = join(job.output_uri, shard)
        try:
            now = mark_of(uri)
        except FileNotFoundError:
            continue
        if now == plan.outputs[shard] or read_output_footer(job.output_uri, shard, now) is not None:
            fs, path = open_fs(uri)
            fs.rm_file(path)
            pruned.append(shard)
        else:
            log.warning("%s was not written by framecap and is left alone", uri)
    ledger.forget(pruned)
    if pruned:
        names = ", ".join(pruned[:_NAMED]) + (f" and {len(pruned) - _NAMED} more" if len(pruned) > _NAMED else "")
        log.info("deleted %s without a frame shard: %s", counted(len(pruned), "caption shard"), names)
    return pruned
