"""Pairs of image and captions, read from Parquet row group by row group.

Knows nothing of encoders or tokens. A pair that cannot be used says why and is left to the caller to count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from framecap.errors import EvaluationError, TrainingError
from framecap.storage import mark, open_fs
from framecap.training.scored_texts import list_data_files
from framecap.training.settings import TrainSettings

READ_ROWS = 64  # rows of images held at once


@dataclass(frozen=True)
class PairColumns:
    """Names of the columns; ``split`` is empty where the files have no such column."""

    image: str
    caption: str
    split: str


@dataclass(frozen=True)
class PairUnit:
    """One row group of one file: the unit of encoding. ``index`` fixes the order of all pairs."""

    index: int
    uri: str
    path: str
    row_group: int
    rows: int
    signature: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the key of cached features."""
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """``captions`` are stripped and not empty; ``problem`` is set where there are none."""

    image: bytes | None
    captions: list[str]
    split: str | None
    problem: str | None = None


def plan_units(settings: TrainSettings) -> tuple[list[PairUnit], PairColumns]:
    """All row groups of ``settings.pairs`` in path order, and the columns to read.

    Raises TrainingError for a file that is not Parquet, a missing column, or no rows at all.
    """
    try:
        fs, paths = list_data_files(settings.pairs)
    except EvaluationError as error:
        raise TrainingError(str(error)) from error
    units: list[PairUnit] = []
    with_split: dict[str, bool] = {}
    for path in paths:
        try:
            with fs.open(path, "rb") as stream:
                metadata = pq.ParquetFile(stream).metadata
        except (pa.ArrowInvalid, OSError) as error:
            raise TrainingError(f"{path} cannot be read as Parquet: {error}") from error
        names = metadata.schema.to_arrow_schema().names
        for column in (settings.image_column, settings.caption_column):
            if column not in names:
                raise TrainingError(f"{path} has no column {column!r}; it has {', '.join(names)}")
        with_split[path] = settings.split_column in names
        signature = mark(fs.info(path))
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            units.append(PairUnit(len(units), settings.pairs, path, group, rows, signature))
    if not sum(unit.rows for unit in units):
        raise TrainingError(f"{settings.pairs} holds no pairs; give Parquet with at least one row")
    if len(set(with_split.values())) > 1:
        lacks = next(path for path, has in with_split.items() if not has)
        raise TrainingError(
            f"{lacks} has no column {settings.split_column!r} and others do; add it, or name another --split-column"
        )
    split = settings.split_column if all(with_split.values()) else ""
    if split:
        check_split(Counter(_splits(fs, paths, split)), settings)
    return units, PairColumns(settings.image_column, settings.caption_column, split)


def check_split(found: Counter[str | None], settings: TrainSettings) -> None:
    """Raise TrainingError when splits are named and none of them is the training split."""
    if any(name is not None for name in found) and not found[settings.train_split]:
        there = ", ".join(f"{name!r} ({count})" for name, count in found.most_common())
        raise TrainingError(f"split {settings.train_split!r} is empty; column {settings.split_column!r} holds {there}")


def _splits(fs: Any, paths: list[str], column: str) -> Iterator[str | None]:
    for path in paths:
        with fs.open(path, "rb") as stream:
            yield from pq.read_table(stream, columns=[column])[column].to_pylist()


def read_unit(unit: PairUnit, columns: PairColumns) -> Iterator[Pair]:
    """The pairs of one row group, in row order."""
    fs, _ = open_fs(unit.uri)
    wanted = [name for name in (columns.image, columns.caption, columns.split) if name]
    try:
        with fs.open(unit.path, "rb") as stream:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(READ_ROWS, row_groups=[unit.row_group], columns=wanted):
                for row in batch.to_pylist():
                    yield _pair(row, columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise TrainingError(f"{unit.path}, row group {unit.row_group} cannot be read: {error}") from error


def _pair(row: Mapping[str, Any], columns: PairColumns) -> Pair:
    image, value = row[columns.image], row[columns.caption]
    if isinstance(image, dict):
        image = image.get("bytes")
    texts = [value] if isinstance(value, str) else list(value or [])
    captions = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    split = row[columns.split] if columns.split else None
    if not captions:
        return Pair(image, [], split, "no caption")
    if not isinstance(image, bytes) or not image:
        return Pair(None, captions, split, "no image")
    return Pair(image, captions, split)
