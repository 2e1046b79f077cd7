"""Caption datasets and references, read from Parquet or JSONL and matched by frame_id.

Knows nothing of scores. frame ids are compared as text, so that ``7`` and ``"7"`` are one frame.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from framecap.errors import EvaluationError
from framecap.storage import open_fs

REFERENCE_COLUMNS = ("references", "reference", "captions", "caption")


@dataclass(frozen=True)
class CaptionedFrame:
    """One row of a caption dataset: text ("" where captioning failed), status, cosine with the frame."""

    caption: str
    status: str
    similarity: float | None


def list_data_files(uri: str, endings: tuple[str, ...] = (".parquet",)) -> tuple[Any, list[str]]:
    """File system and paths of the data files at ``uri``: a file, a folder (recursive) or a glob.

    Names that begin with ``_`` or ``.`` are not data (Spark's and Arrow's rule).
    Raises EvaluationError when there are none.
    """
    fs, path = open_fs(uri)
    if "*" in path:
        paths = sorted(fs.glob(path))
    elif fs.isfile(path):
        return fs, [path]
    else:
        root = PurePosixPath(path)
        paths = [p for p in sorted(fs.find(path)) if _is_data(PurePosixPath(p).relative_to(root))]
    found = [p for p in paths if p.endswith(endings)]
    if not found:
        raise EvaluationError(f"{uri} holds no {' or '.join(endings)} file; check the path")
    return fs, found


def _is_data(relative: PurePosixPath) -> bool:
    return not any(part.startswith(("_", ".")) for part in relative.parts)


def read_columns(
    fs: Any, path: str, wanted: Collection[str], optional: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of one Parquet file, only the columns named; ``optional`` ones may be absent.

    Raises EvaluationError for a file that is not Parquet or lacks a wanted column.
    """
    try:
        with fs.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            names = set(file.schema_arrow.names)
            missing = [name for name in wanted if name not in names]
            if missing:
                known = ", ".join(sorted(names))
                raise EvaluationError(f"{path} has no column {missing[0]!r}; it has {known}")
            for batch in file.iter_batches(columns=[*wanted, *(n for n in optional if n in names)]):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise EvaluationError(f"{path} cannot be read as Parquet: {error}") from error


def read_captions(uri: str, ids: Collection[str], id_column: str, caption_column: str) -> dict[str, CaptionedFrame]:
    """Captions of the frames in ``ids``, by frame_id.

    Raises EvaluationError for a frame_id that comes twice, a missing column or a damaged file.
    """
    wanted, found = set(ids), {}
    fs, paths = list_data_files(uri)
    for path in paths:
        optional = ("caption_status", "caption_similarity")
        for row in read_columns(fs, path, (id_column, caption_column), optional):
            frame_id = str(row[id_column])
            if frame_id not in wanted:
                continue
            if frame_id in found:
                raise EvaluationError(f"{id_column} {frame_id!r} comes twice in {uri}; one row a frame, please")
            found[frame_id] = CaptionedFrame(
                caption=row[caption_column] or "",
                status=row.get("caption_status") or ("ok" if row[caption_column] else "error"),
                similarity=row.get("caption_similarity"),
            )
    return found


def read_references(uri: str, id_column: str, reference_column: str = "") -> dict[str, list[str]]:
    """References by frame_id from Parquet or JSONL; a text or a list a row, several rows add up.

    ``reference_column`` empty: the first of ``REFERENCE_COLUMNS`` that is there. Empty texts are left out.
    Raises EvaluationError for a damaged file, a missing column, or no reference at all.
    """
    fs, paths = list_data_files(uri, (".parquet", ".jsonl", ".json", ".ndjson"))
    references: dict[str, list[str]] = {}
    for path in paths:
        for row in _reference_rows(fs, path, id_column, reference_column):
            column = reference_column or next((c for c in REFERENCE_COLUMNS if c in row), "")
            if id_column not in row or not column or column not in row:
                wanted = reference_column or " or ".join(REFERENCE_COLUMNS)
                has = ", ".join(row)
                raise EvaluationError(f"{path}: a row needs {id_column} and {wanted}; it has {has}")
            value = row[column]
            texts = [value] if isinstance(value, str) else list(value or [])
            kept = [t.strip() for t in texts if isinstance(t, str) and t.strip()]
            references.setdefault(str(row[id_column]), []).extend(kept)
    references = {frame_id: texts for frame_id, texts in references.items() if texts}
    if not references:
        raise EvaluationError(f"{uri} holds no reference text; check --reference-column")
    return references


def _reference_rows(fs: Any, path: str, id_column: str, column: str) -> Iterable[dict[str, Any]]:
    if not path.endswith(".parquet"):
        return _jsonl_rows(fs, path)
    optional = (column,) if column else REFERENCE_COLUMNS
    return read_columns(fs, path, (id_column,), optional)


def _jsonl_rows(fs: Any, path: str) -> Iterator[dict[str, Any]]:
    with fs.open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise EvaluationError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise EvaluationError(f"{path}, line {number} is no JSON object")
            yield row


@dataclass(frozen=True)
class ScoredTexts:
    """Frames that have both, in one order: ids, captions, their references and similarities (NaN: none)."""

    ids: list[str]
    captions: list[str]
    references: list[list[str]]
    similarity: np.ndarray
    errors: int
    truncated: int

    @classmethod
    def of(cls, ids: list[str], captioned: dict[str, CaptionedFrame], references: dict[str, list[str]]) -> ScoredTexts:
        """The frames ``ids``, all of which both sides have."""
        rows = [captioned[i] for i in ids]
        similarity = [np.nan if row.similarity is None else row.similarity for row in rows]
        return cls(
            ids=ids,
            captions=[row.caption for row in rows],
            references=[references[i] for i in ids],
            similarity=np.array(similarity, dtype=np.float64),
            errors=sum(row.status == "error" for row in rows),
            truncated=sum(row.status == "truncated" for row in rows),
        )
