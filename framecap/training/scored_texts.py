"""Caption datasets and references, read from Parquet or JSONL and matched by frame_id.

Knows nothing of scores. frame ids are compared as text, so that ``7`` and ``"7"`` are one frame.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from framecap.errors import EvaluationError, SettingsError
from framecap.row_values import rows_of
from framecap.shards import short_text
from framecap.storage import open_fs
from framecap.text_columns import find_texts, texts_in
from framecap.training.wording import words

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


@contextmanager
def open_parquet(fs: Any, path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; whatever is wrong with it, also while it is read, is an EvaluationError that names it."""
    try:
        with fs.open(path, "rb") as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise EvaluationError(f"{path} cannot be read as Parquet: {short_text(error)}") from error


def rows_in(
    file: pq.ParquetFile, path: str, wanted: Collection[str], optional: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of one Parquet file, only the columns named; ``optional`` ones may be absent.

    Raises EvaluationError for a file that lacks a wanted column.
    """
    names = set(file.schema_arrow.names)
    if missing := [name for name in wanted if name not in names]:
        raise EvaluationError(f"{path} has no column {missing[0]!r}; it has {', '.join(sorted(names))}")
    for batch in file.iter_batches(columns=[*wanted, *(n for n in optional if n in names)]):
        yield from rows_of(batch)


def read_captions(uri: str, ids: Collection[str], id_column: str, caption_column: str) -> dict[str, CaptionedFrame]:
    """Captions of the frames in ``ids``, by frame_id.

    Raises EvaluationError for a frame_id that comes twice, a missing column or a damaged file, SettingsError for
    captions that are no texts.
    """
    wanted, found = set(ids), {}
    fs, paths = list_data_files(uri)
    for path in paths:
        with open_parquet(fs, path) as file:
            where = find_texts(file.schema_arrow, caption_column, "--caption-column", path)
            column, *fields = where or (caption_column,)
            for row in rows_in(file, path, (id_column, column), ("caption_status", "caption_similarity")):
                frame_id = str(row[id_column])
                if row[id_column] is None or frame_id not in wanted:
                    continue
                if frame_id in found:
                    raise EvaluationError(f"{path}: duplicate {id_column} {frame_id!r}; give one row per frame")
                texts = texts_in(row[column], fields)
                if len(texts) > 1:
                    raise EvaluationError(f"{path}: {frame_id!r} has {len(texts)} captions; give one per frame")
                caption = texts[0] if texts else ""
                found[frame_id] = CaptionedFrame(
                    caption=caption,
                    status=row.get("caption_status") or ("ok" if caption else "error"),
                    similarity=row.get("caption_similarity"),
                )
    return found


def read_references(uri: str, id_column: str, reference_column: str = "") -> dict[str, list[str]]:
    """References by frame_id from Parquet or JSONL; a text or a list a row, several rows add up.

    ``reference_column`` empty: the first of ``REFERENCE_COLUMNS`` that is there. Texts without a word are left out.
    Raises EvaluationError for a damaged file, a missing column, no reference at all, and for what is no text.
    """
    fs, paths = list_data_files(uri, (".parquet", ".jsonl", ".json", ".ndjson"))
    references: dict[str, list[str]] = {}
    for path in paths:
        read = _parquet_references if path.endswith(".parquet") else _jsonl_references
        for frame_id, texts in read(fs, path, id_column, reference_column):
            kept = [text.strip() for text in texts if words(text)]
            references.setdefault(str(frame_id), []).extend(kept)
    references = {frame_id: texts for frame_id, texts in references.items() if texts}
    if not references:
        raise EvaluationError(f"{uri} holds no reference text; check --reference-column")
    return references


def _parquet_references(fs: Any, path: str, id_column: str, reference_column: str) -> Iterator[tuple[Any, list[str]]]:
    with open_parquet(fs, path) as file:
        schema = file.schema_arrow
        name = reference_column or next((column for column in REFERENCE_COLUMNS if column in schema.names), "")
        where = find_texts(schema, name, "--reference-column", path)
        if where is None or id_column not in schema.names:
            raise _lacks(path, id_column, reference_column, schema.names)
        for number, row in enumerate(rows_in(file, path, (id_column, where[0])), 1):
            yield _id(row, id_column, f"{path}, row {number}"), texts_in(row[where[0]], where[1:])


def _jsonl_references(fs: Any, path: str, id_column: str, reference_column: str) -> Iterator[tuple[Any, list[str]]]:
    for number, row in _jsonl_rows(fs, path):
        name = reference_column or next((c for c in REFERENCE_COLUMNS if c in row), "")
        column, *fields = [name] if name in row else name.split(".")
        if id_column not in row or column not in row:
            raise _lacks(path, id_column, reference_column, row)
        try:
            yield _id(row, id_column, f"{path}, line {number}"), texts_in(row[column], fields)
        except TypeError:
            fix = "it must be a text or a list of texts"
            if isinstance(row[column], dict) and row[column]:
                fix = f"name the field that holds the text: --reference-column {name}.{next(reversed(row[column]))}"
            raise EvaluationError(f"{path}, line {number}: {name} is {row[column]!r:.60}; {fix}") from None


def _lacks(path: str, id_column: str, reference_column: str, has: Iterable[str]) -> EvaluationError:
    wanted = reference_column or " or ".join(REFERENCE_COLUMNS)
    return EvaluationError(f"{path}: a row needs {id_column} and {wanted}; it has {', '.join(has)}")


def _id(row: dict[str, Any], id_column: str, place: str) -> Any:
    if row[id_column] is None:
        raise EvaluationError(f"{place}: {id_column} is null; references are told apart by it")
    return row[id_column]


def _jsonl_rows(fs: Any, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows."""
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
            yield number, row


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
