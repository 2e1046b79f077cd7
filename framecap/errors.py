"""Every error framecap raises on purpose: one tree, one sentence per class.

A message holds the offending value and the fix. Knows nothing of the rest of the package.
"""

from __future__ import annotations


class FramecapError(Exception):
    """Root of all errors raised on purpose; catching it catches nothing accidental."""


class SettingsError(FramecapError, ValueError):
    """A flag, environment variable, YAML key or option is unknown or has an impossible value (exit 2)."""


class StorageError(FramecapError, OSError):
    """A path or URI cannot be listed, read or written."""


class BackendError(StorageError):
    """A storage backend raised an error of its own kind (botocore, aiohttp, google, azure): an ``OSError`` here."""


class StoreUnavailableError(StorageError):
    """A store did not answer, for minutes: nothing need be wrong with the settings (exit 75: run again)."""


class CaptionerError(FramecapError):
    """A captioner directory cannot be used as it stands."""


class MissingFileError(CaptionerError, FileNotFoundError):
    """A file that a checkpoint must have is not there."""


class WeightsError(CaptionerError):
    """A weight file is truncated, is not a weight file, or holds something other than weights."""


class UnsafePickleError(WeightsError):
    """A pickle checkpoint wants to run code while it is being loaded; it is refused."""


class StateDictError(WeightsError):
    """The tensors of a checkpoint are not those the model needs.

    ``missing``, ``unexpected`` and ``mis_shaped`` hold the offending key names.
    """

    def __init__(
        self,
        source: str,
        missing: list[str] | None = None,
        unexpected: list[str] | None = None,
        mis_shaped: list[str] | None = None,
    ) -> None:
        self.missing = sorted(missing or [])
        self.unexpected = sorted(unexpected or [])
        self.mis_shaped = sorted(mis_shaped or [])
        parts = [
            f"{name} key{'s' if len(keys) > 1 else ''}: {', '.join(keys[:8])}"
            + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            for name, keys in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("mis-shaped", self.mis_shaped),
            )
            if keys
        ]
        super().__init__(
            f"{source} does not hold the tensors its config asks for; {'; '.join(parts)}. "
            "Check that config and weights belong together."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_state_dict_error, (str(self), self.missing, self.unexpected, self.mis_shaped))


def _rebuild_state_dict_error(
    message: str, missing: list[str], unexpected: list[str], mis_shaped: list[str]
) -> StateDictError:
    error = StateDictError.__new__(StateDictError)
    Exception.__init__(error, message)
    error.missing, error.unexpected, error.mis_shaped = missing, unexpected, mis_shaped
    return error


class ChecksumError(CaptionerError):
    """A file differs from what manifest.json says of it."""


class CaptionerChangedError(CaptionerError):
    """Another captioner lies at a URI than the one that a run was planned with (exit 75: run again).

    ``uri``: where it lies.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        super().__init__(
            f"the captioner at {uri} was replaced while the run was under way; run the same command again, "
            "so that all captions are of the new one"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (CaptionerChangedError, (self.uri,))


class BridgeMismatchError(CaptionerError):
    """The bridge's sizes do not fit the encoder or the decoder."""


class PositionLimitError(CaptionerError, ValueError):
    """Prefix, prompt and new tokens together exceed the decoder's position embeddings."""


class FrameError(FramecapError):
    """One frame cannot be used; it becomes a row with a status, never a stopped job.

    ``kind`` is one of ``FRAME_ERROR_KINDS``; the row's ``caption_error`` reads ``kind: message``.
    """

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        self.message = message
        super().__init__(f"{kind}: {message}")

    def __reduce__(self) -> tuple[object, ...]:
        return (FrameError, (self.kind, self.message))


FRAME_ERROR_KINDS = (
    "missing",  # null, or the URI or path leads nowhere
    "not_allowed",  # the URI is of a kind, or leads to a place, that the operator did not allow
    "empty",  # zero bytes, or zero pixels
    "truncated",  # the file ends before the picture does
    "not_an_image",  # no decoder knows the bytes
    "too_large",  # more pixels, bytes or memory than the limits: a decompression bomb
    "too_slow",  # fetching or decoding it takes longer than the limit
    "model",  # the captioner failed on this very frame
)


class ShardError(FramecapError):
    """One shard cannot be read or lacks its columns; it goes to the summary, the others go on."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        self.message = message
        super().__init__(f"{kind}: {message}")

    def __reduce__(self) -> tuple[object, ...]:
        return (ShardError, (self.kind, self.message))


class LockedError(FramecapError):
    """Another run holds the output's lock (exit 75)."""


class NoProgressError(FramecapError):
    """Nothing moves on the cluster (exit 1); the same command goes on where the run stopped."""


class TrainingError(FramecapError):
    """Training cannot start or go on: no usable pairs, sizes that do not fit, no space left."""


class EvaluationError(FramecapError):
    """Captions and references cannot be compared, for example because they share no frame_id."""
