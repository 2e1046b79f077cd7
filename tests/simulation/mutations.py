"""Faults put into the job on purpose: the simulation must find each, or it finds nothing."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Mutation:
    """``old`` of a function's source becomes ``new``. ``seed``: from there on the simulation soon finds it."""

    what: str
    module: str
    function: str
    old: str
    new: str
    seed: int = 0


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """The job with one mutation; whoever has imported the function gets the mutated one too.

    Raises ``ValueError`` if the source does not hold ``old`` exactly once: the job has changed, adapt the mutation.
    """
    module = importlib.import_module(f"framecap.{mutation.module}")
    found: Any = module
    for name in mutation.function.split("."):
        found = inspect.getattr_static(found, name)
    function: FunctionType = inspect.unwrap(found)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(mutation.old) != 1:
        raise ValueError(f"{mutation.function} holds {mutation.old!r} {source.count(mutation.old)} times")
    text = source.replace(mutation.old, mutation.new)
    text = text[text.index("def ") :]  # its decorators are there already
    namespace: dict[str, Any] = {}
    code = compile(f"from __future__ import annotations\n{text}", str(module.__file__), "exec")
    exec(code, module.__dict__, namespace)
    before, function.__code__ = function.__code__, namespace[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = before


MUTATIONS = [
    Mutation(
        "the fingerprint is not compared",
        "pipeline.plan", "_reason", "entry.fingerprint != wanted", "False",
    ),
    Mutation(
        "the signature is not compared",
        "pipeline.plan", "_reason", "entry.signature != signature", "False",
    ),
    Mutation(
        "the signature is not checked after reading",
        "pipeline.publish", "publish_shard", "mark_of(source_uri) != plan.signature", "False",
        seed=250,
    ),
    Mutation(
        "the ledger is believed although the caption shard is another",
        "pipeline.plan", "_published", "and e.mark == m", "",
        seed=285,
    ),
    Mutation(
        "a disk that stumbles passes for wrong settings",
        "stores", "failure_kind", "seen.errno in _MOMENTARY", "False",
    ),
    Mutation(
        "foreign files are pruned",
        "pipeline.plan", "make_plan", "and name not in foreign", "",
    ),
    Mutation(
        "a fragment of another captioner is used",
        "pipeline.recover", "take_up_fragments", "fragment.fingerprint != fingerprint", "False",
    ),
    Mutation(
        "fragments of earlier runs are not used",
        "pipeline.recover", "take_up_fragments", "publisher.add(fragment.pieces, name, needed)", "pass",
    ),
    Mutation(
        "fragments are deleted when publishing begins",
        "pipeline.publish", "Publisher.publish_if_complete", "del self._waiting[shard]",
        "del self._waiting[shard]; self._forget(shard)",
    ),
    Mutation(
        "fragments of tasks that ran twice are not swept",
        "pipeline.publish", "Publisher.sweep", "if self.unfinished:", "if True:",
    ),
    Mutation(
        "a lock is taken from whoever holds it",
        "pipeline.lock", "OutputLock.__enter__", "not self._is_stale(holder)", "False",
        seed=50,
    ),
    Mutation(
        "captions are taken from the beginning of a fragment",
        "pipeline.publish", "_FragmentCache.rows", "span.offset", "0",
    ),
    Mutation(
        "rows that are kept are not passed over when others are tried again",
        "pipeline.publish", "_captioned", "old.skip(rows)", "pass",
        seed=30,
    ),
    Mutation(
        "a repeated record is counted twice",
        "pipeline.run", "_caption_and_publish", "record.fragment not in counted", "True",
    ),
    Mutation(
        "unfinished shards do not count for the exit code",
        "pipeline.run", "_exit_code", "publisher.unfinished and", "False and",
    ),
    Mutation(
        "a file is renamed before it is on the disk",
        "storage", "atomic_path", "os.fsync(file.fileno())", "pass",
    ),
    Mutation(
        "a lock is written whoever holds it",
        "pipeline.lock", "OutputLock._create", 'mode="create"', 'mode="overwrite"',
        seed=510,
    ),
    Mutation(
        "the age of a lock on a store is told by the reader's clock",
        "pipeline.lock", "_remote_age", "fs, path = open_fs(uri)", "return None",
        seed=100,
    ),
    Mutation(
        "a lock does not expire",
        "pipeline.lock", "OutputLock._is_stale", "age > expiry", "False",
    ),
    Mutation(
        "a lock is not given up",
        "pipeline.lock", "OutputLock.__exit__", "self._remove(holder)", "pass",
    ),
]  # fmt: skip
