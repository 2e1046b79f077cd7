"""The data contract: columns of frame shards and caption shards, status values, file metadata, versions.

Knows nothing of storage, Ray or models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from framecap.errors import ShardError

SCHEMA_VERSION = 1
STATE_FOLDER = "_framecap"  # everything under OUT that is not a caption shard
SHARD_SUFFIX = ".parquet"

STATUS_OK = "ok"
STATUS_TRUNCATED = "truncated"
STATUS_ERROR = "error"
STATUSES = (STATUS_OK, STATUS_TRUNCATED, STATUS_ERROR)

REUSED_IDENTICAL = "identical"  # the same bytes were captioned before in this run
REUSED_SIMILAR = "similar"  # the frame before it in the same video was near enough (--reuse-similarity)
# --reuse-similarity looks within blocks of so many rows of a shard, the same ones however a run was cut.
REUSE_ROWS = 64

CAPTION_FIELDS = (
    pa.field("caption", pa.string()),
    pa.field("caption_status", pa.string(), nullable=False),
    pa.field("caption_error", pa.string()),
    pa.field("caption_logprob", pa.float32()),
    pa.field("caption_min_logprob", pa.float32()),
    pa.field("caption_tokens", pa.int16()),
    pa.field("caption_similarity", pa.float32()),
    pa.field("caption_reused", pa.string()),
)
CANDIDATES_FIELD = pa.field("caption_candidates", pa.list_(pa.string()))
EMBEDDING_COLUMN = "image_embedding"
CAPTION_EMBEDDING_COLUMN = "caption_embedding"
QUERY_COLUMN = "query_similarity"
QUERY_TYPE = pa.list_(pa.float32())
# Columns that a run adds on request, in order; None: the type depends on the captioner.
OPTIONAL_TYPES = {
    CANDIDATES_FIELD.name: CANDIDATES_FIELD.type,
    EMBEDDING_COLUMN: None,
    CAPTION_EMBEDDING_COLUMN: None,
    QUERY_COLUMN: QUERY_TYPE,
}

# What each column means, for docs/reference.md.
COLUMN_MEANINGS = {
    "caption": "the description; null where the frame failed",
    "caption_status": "`ok`; `truncated`: cut at `--max-new-tokens`; `error`",
    "caption_error": "null, or `kind: message`",
    "caption_logprob": "mean natural-log probability of the tokens; nearer 0 is surer",
    "caption_min_logprob": "natural-log probability of the least likely token",
    "caption_tokens": "tokens generated",
    "caption_similarity": "ruCLIP cosine of frame and caption; null without a text tower or with `--no-similarity`",
    "caption_reused": "null; `identical`: the caption of another frame with the same bytes in this run (which of the "
    "two is marked may differ from run to run); `similar`: the caption of a similar frame before it in the same video "
    "and the same 64 rows of its shard (`--reuse-similarity`)",
    "caption_candidates": "all candidates, best first; only with `--num-return-sequences` above 1",
    "image_embedding": "L2-normalised ruCLIP embedding of the frame; only with `--image-embedding`",
    "caption_embedding": "L2-normalised ruCLIP embedding of the caption; only with `--caption-embedding`",
    "query_similarity": "ruCLIP cosine of the frame with each `--query`, in their order, which the file's metadata "
    "`framecap.queries` keeps",
}

META_VERSION = b"framecap.schema_version"
META_FINGERPRINT = b"framecap.fingerprint"
META_SOURCE = b"framecap.source"
META_SIGNATURE = b"framecap.signature"
META_ERRORS = b"framecap.error_rows"
META_QUERIES = b"framecap.queries"  # JSON list; only with --query
_OWN_METADATA = b"framecap."
# Written by other tools about columns that a caption shard no longer has.
_FOREIGN_METADATA = (b"pandas", b"huggingface", b"ARROW:schema")


@dataclass(frozen=True)
class ExtraColumns:
    """The columns that a run adds on request; sizes are those of the embeddings, None: no such column."""

    candidates: bool = False
    image_embedding: int | None = None
    caption_embedding: int | None = None
    queries: tuple[str, ...] = ()


_NO_EXTRA = ExtraColumns()


def caption_schema(extra: ExtraColumns = _NO_EXTRA) -> pa.Schema:
    """The columns that captioning adds, in order; the queries are in the schema's metadata."""
    fields = list(CAPTION_FIELDS)
    if extra.candidates:
        fields.append(CANDIDATES_FIELD)
    sizes = {EMBEDDING_COLUMN: extra.image_embedding, CAPTION_EMBEDDING_COLUMN: extra.caption_embedding}
    fields += [pa.field(name, pa.list_(pa.float16(), size)) for name, size in sizes.items() if size is not None]
    if not extra.queries:
        return pa.schema(fields)
    fields.append(pa.field(QUERY_COLUMN, QUERY_TYPE))
    return pa.schema(fields, metadata={META_QUERIES: json.dumps(extra.queries, ensure_ascii=False).encode()})


@dataclass(frozen=True)
class InputColumns:
    """Which input columns mean what, and which of them the output keeps (``None``: all but the image)."""

    frame_id: str = "frame_id"
    image: str = "image"
    image_uri: str = "image_uri"
    keep: tuple[str, ...] | None = None
    video: str | None = None  # only with --reuse-similarity

    def check(self, schema: pa.Schema, added: pa.Schema) -> None:
        """Raise ``ShardError`` (``missing_column``, ``wrong_type``, ``column_conflict``) if unusable."""
        names = set(schema.names)
        if self.frame_id not in names:
            raise ShardError("missing_column", f"no column {self.frame_id!r}; it has {_listed(schema)}")
        if self.image not in names and self.image_uri not in names:
            raise ShardError(
                "missing_column", f"neither {self.image!r} nor {self.image_uri!r}; it has {_listed(schema)}"
            )
        used = {*self.read(schema), *self.kept(schema)}
        if twice := [name for name in schema.names if name in used and schema.names.count(name) > 1]:
            number = schema.names.count(twice[0])
            raise ShardError("column_conflict", f"it has {number} columns {twice[0]!r}; rename or drop all but one")
        id_type = schema.field(self.frame_id).type
        if not (is_text(id_type) or pa.types.is_integer(id_type)):
            raise ShardError("wrong_type", f"{self.frame_id!r} is {id_type}; it must be string or integer")
        if self.image in names and not _is_image(image_type := schema.field(self.image).type):
            raise ShardError(
                "wrong_type",
                f"{self.image!r} is {image_type}; it must be binary or struct<bytes: binary, path: string>",
            )
        if self.image_uri in names and not _is_uri(uri_type := schema.field(self.image_uri).type):
            raise ShardError("wrong_type", f"{self.image_uri!r} is {uri_type}; it must be string")
        if self.video is not None and self.video not in names:
            raise ShardError(
                "missing_column", f"no --video-column {self.video!r} to group by; it has {_listed(schema)}"
            )
        if missing := [name for name in self.keep or () if name not in names]:
            raise ShardError("missing_column", f"no column {missing[0]!r} to keep; it has {_listed(schema)}")
        written = {name.casefold(): name for name in added.names}  # DuckDB and Spark ignore case
        if conflicts := sorted(name for name in self.kept(schema) if name.casefold() in written):
            name = written[conflicts[0].casefold()]
            also = "also written by framecap" if name == conflicts[0] else f"but for its case {name!r} of framecap"
            raise ShardError("column_conflict", f"column {conflicts[0]!r} is {also}; leave it out of --keep-columns")

    def kept(self, schema: pa.Schema) -> list[str]:
        """The input columns that the output carries, in the input's order; the id is always among them."""
        if self.keep is None:
            return [name for name in schema.names if name != self.image]
        return [name for name in schema.names if name == self.frame_id or name in self.keep]

    def read(self, schema: pa.Schema) -> list[str]:
        """The input columns that captioning itself reads."""
        return [name for name in schema.names if name in (self.frame_id, self.image, self.image_uri, self.video)]


def output_schema(source: pa.Schema, columns: InputColumns, added: pa.Schema) -> pa.Schema:
    """Schema of the caption shard that belongs to a frame shard: kept columns, then ``added``."""
    metadata = {
        key: value
        for key, value in (source.metadata or {}).items()
        if key not in _FOREIGN_METADATA and not key.startswith(_OWN_METADATA)
    }
    fields = [source.field(name) for name in columns.kept(source)] + list(added)
    return pa.schema(fields, metadata=(metadata | (added.metadata or {})) or None)


def output_metadata(source: str, signature: str, fingerprint: str, error_rows: int) -> dict[bytes, bytes]:
    """File metadata of a caption shard; ``source`` is the frame shard's path below the input."""
    return {
        META_VERSION: str(SCHEMA_VERSION).encode(),
        META_FINGERPRINT: fingerprint.encode(),
        META_SOURCE: source.encode(),
        META_SIGNATURE: signature.encode(),
        META_ERRORS: str(error_rows).encode(),
    }


def is_text(kind: Any) -> bool:
    """Whether an Arrow type holds strings (plain, large, view or dictionary-encoded)."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_binary(kind: Any) -> bool:
    """Whether an Arrow type holds bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_uri(kind: Any) -> bool:
    return is_text(kind) or pa.types.is_null(kind)  # all null, as pandas writes an unused column


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        types = {kind.field(place).name: kind.field(place).type for place in range(kind.num_fields)}
        return is_binary(types.get("bytes", pa.int8())) and _is_uri(types.get("path", pa.null()))
    return is_binary(kind) or pa.types.is_null(kind)


def _listed(schema: pa.Schema) -> str:
    names = schema.names
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
