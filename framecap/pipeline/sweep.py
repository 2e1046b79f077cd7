"""Tidying up OUT and its state: what killed writers left, and caption shards whose frame shard is gone."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from framecap.pipeline.job import Job
from framecap.pipeline.ledger import Ledger
from framecap.pipeline.plan import Plan, read_output_footer
from framecap.storage import is_local, join, open_fs

log = logging.getLogger(__name__)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|lock\.[0-9a-f]{32}(\.void)?")


def sweep_temporary_files(uri: str) -> int:
    """Delete temporary files of killed writers below ``uri`` (local only: objects appear whole). Needs the lock."""
    if not is_local(uri):
        return 0
    swept = 0
    for folder, _, names in os.walk(open_fs(uri)[1]):
        for name in names:
            if _TEMPORARY.fullmatch(name):
                Path(folder, name).unlink(missing_ok=True)
                swept += 1
    return swept


def prune(job: Job, plan: Plan, ledger: Ledger) -> list[str]:
    """Delete caption shards whose frame shard is gone; only such as framecap wrote. Returns their names."""
    pruned = []
    for shard in plan.gone:
        uri = join(job.output_uri, shard)
        if shard in ledger.entries or read_output_footer(job.output_uri, shard, "") is not None:
            fs, path = open_fs(uri)
            fs.rm_file(path)
            pruned.append(shard)
        else:
            log.warning("%s was not written by framecap and is left alone", uri)
    ledger.forget(pruned)
    return pruned
