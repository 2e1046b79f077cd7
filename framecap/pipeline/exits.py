"""Exit codes of the job: what a scheduler should think of how a run ended."""

from __future__ import annotations

from framecap.errors import CaptionerChangedError, CaptionerError, LockedError, SettingsError
from framecap.stores import failure_kind

EXIT_DONE, EXIT_CRASHED, EXIT_SETTINGS, EXIT_FAILED, EXIT_WORK_LEFT = 0, 1, 2, 3, 75
RUN_AGAIN_KINDS = frozenset({"unavailable", "no_space"})  # of a ``ShardError``: nothing is wrong with the shard


def exit_code_of(error: BaseException) -> int:
    """The exit code of a run that ``error`` ended."""
    if isinstance(error, CaptionerChangedError | LockedError | KeyboardInterrupt):
        return EXIT_WORK_LEFT
    if failure_kind(error, "") in RUN_AGAIN_KINDS:  # a store that does not answer, a full disk
        return EXIT_WORK_LEFT
    if isinstance(error, SettingsError | CaptionerError | OSError):
        return EXIT_SETTINGS
    return EXIT_CRASHED
