"""What driver and actors tell each other; knows nothing of torch or Ray, so that a driver starts fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from framecap.errors import ShardError
from framecap.model.decode_options import DecodeOptions
from framecap.pipeline.plan import Chunk
from framecap.schema import ExtraColumns


@dataclass(frozen=True)
class ActorOptions:
    """What a caption actor needs to know; ``folder`` is where fragments go, ``manifest`` the sha256 of the
    manifest that the captioner must have (the fingerprint follows from it); None for any."""

    captioner: str
    folder: str
    fingerprint: str
    decode: DecodeOptions
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    batch_size: int = 64
    similarity: bool = True
    extra: ExtraColumns = field(default_factory=ExtraColumns)
    share_identical: bool = True
    reuse_similarity: float | None = None
    manifest: str | None = None


@dataclass(frozen=True)
class ChunkRecord:
    """What the driver hears of a chunk: which rows are in which fragment, and how it went. ``retried``: of
    ``statuses``, those of rows that had failed before (``--retry-errors``)."""

    fragment: str
    pieces: Chunk
    failed: dict[str, ShardError] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    retried: dict[str, int] = field(default_factory=dict)
    error_kinds: dict[str, int] = field(default_factory=dict)
    reused: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
