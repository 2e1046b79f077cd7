"""Pairs of image and captions, read from Parquet row group by row group, and sentences without images.

Knows nothing of encoders or tokens. A pair that cannot be used says why and is left to the caller to count.
"""

from __future__ import annotations

import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from framecap.errors import EvaluationError, FrameError, TrainingError
from framecap.image_uris import DEFAULT_RULES, FetchRules, fetch
from framecap.row_values import rows_of, values_of
from framecap.shards import short_text
from framecap.storage import is_local, mark, open_fs
from framecap.text_columns import find_texts, texts_in
from framecap.training.scored_texts import list_data_files
from framecap.training.settings import TrainSettings

READ_ROWS = 64  # rows of images held at once
LINES = 10_000  # sentences of a text file in one unit
TEXT_FILE = ".txt"


@dataclass(frozen=True)
class PairColumns:
    """Names of the columns; ``split`` is empty where the files have no such column, ``image`` where none is read.
    ``caption_fields``: which field of ``caption`` holds the text, where it is a struct."""

    image: str
    caption: str
    split: str
    caption_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairUnit:
    """One row group of one file, or ``LINES`` lines of a text file: the unit of encoding.

    ``index`` fixes the order of all pairs.
    """

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
    is_text = settings.train_on == "text"
    try:
        fs, paths = list_data_files(settings.pairs, (".parquet", TEXT_FILE) if is_text else (".parquet",))
    except EvaluationError as error:
        raise TrainingError(str(error)) from error
    units: list[PairUnit] = []
    with_split: dict[str, bool] = {}
    captions: dict[tuple[str, ...], str] = {}
    for path in paths:
        if is_text and path.endswith(TEXT_FILE):
            with_split[path] = False
            units += _units_of_lines(fs, path, settings.pairs, len(units))
            continue
        try:
            with fs.open(path, "rb") as stream:
                file = pq.ParquetFile(stream)
                metadata, schema = file.metadata, file.schema_arrow
        except Exception as error:  # whatever a footer holds
            raise TrainingError(f"{path} cannot be read as Parquet: {short_text(error)}") from error
        names = schema.names
        found = find_texts(schema, settings.caption_column, "--caption-column", path)
        lacks_image = settings.image_column not in names and not is_text
        if lacks_image or found is None:
            column = settings.image_column if lacks_image else settings.caption_column
            raise TrainingError(f"{path} has no column {column!r}; it has {', '.join(names)}")
        captions[found] = path
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
    if len(captions) > 1:
        named = " and ".join(f"{'.'.join(where)!r} in {path}" for where, path in captions.items())
        raise TrainingError(f"--caption-column {settings.caption_column} is {named}; make them alike")
    split = settings.split_column if all(with_split.values()) else ""
    if split:
        check_split(Counter(_splits(fs, paths, split)), settings)
    column, *fields = next(iter(captions), (settings.caption_column,))  # none: text files alone
    return units, PairColumns("" if is_text else settings.image_column, column, split, tuple(fields))


def _units_of_lines(fs: Any, path: str, uri: str, first: int) -> list[PairUnit]:
    """The units of a text file; empty lines count, so that a unit's place follows from its number."""
    with fs.open(path, "rb") as stream:
        lines = sum(1 for _ in stream)
    signature = mark(fs.info(path))
    return [
        PairUnit(first + number, uri, path, number, min(LINES, lines - number * LINES), signature)
        for number in range(-(-lines // LINES))
    ]


def check_split(found: Counter[str | None], settings: TrainSettings) -> None:
    """Raise TrainingError when splits are named and none of them is the training split."""
    if any(name is not None for name in found) and not found[settings.train_split]:
        there = ", ".join(f"{name!r} ({count})" for name, count in found.most_common())
        raise TrainingError(f"split {settings.train_split!r} is empty; column {settings.split_column!r} holds {there}")


def _splits(fs: Any, paths: list[str], column: str) -> Iterator[str | None]:
    for path in paths:
        with fs.open(path, "rb") as stream:
            yield from values_of(pq.read_table(stream, columns=[column])[column])


def read_unit(unit: PairUnit, columns: PairColumns, rules: FetchRules = DEFAULT_RULES) -> Iterator[Pair]:
    """The pairs of one unit, in row order; a picture that is named instead of held is fetched by ``rules``."""
    folder = posixpath.dirname(unit.path)
    folder = folder if is_local(unit.uri) else f"{unit.uri.partition('://')[0]}://{folder.lstrip('/')}"
    fs, _ = open_fs(unit.uri)
    if unit.path.endswith(TEXT_FILE):
        yield from _read_lines(fs, unit)
        return
    wanted = [name for name in (columns.image, columns.caption, columns.split) if name]
    try:
        with fs.open(unit.path, "rb") as stream:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(READ_ROWS, row_groups=[unit.row_group], columns=wanted):
                for row in rows_of(batch):
                    yield _pair(row, columns, folder, rules)
    except (pa.ArrowException, OSError, ValueError) as error:
        text = short_text(error)
        raise TrainingError(f"{unit.path}, row group {unit.row_group} cannot be read: {text}") from error


def _read_lines(fs: Any, unit: PairUnit) -> Iterator[Pair]:
    start = unit.row_group * LINES
    with fs.open(unit.path, "rb") as stream:
        for number, line in enumerate(itertools.islice(stream, start, start + LINES), start + 1):
            try:
                sentence = " ".join(line.decode("utf-8-sig").split())
            except UnicodeDecodeError as error:
                raise TrainingError(f"{unit.path}, line {number} is not UTF-8: {error}; convert the file") from error
            yield Pair(None, [sentence] if sentence else [], None, None if sentence else "no caption")


def _pair(row: Mapping[str, Any], columns: PairColumns, folder: str, rules: FetchRules) -> Pair:
    """One row; ``folder`` is its file's, which relative names of pictures begin at."""
    image, value = row[columns.image] if columns.image else None, row[columns.caption]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    captions = [" ".join(text.split()) for text in texts_in(value, columns.caption_fields) if text.strip()]
    split = row[columns.split] if columns.split else None
    if not captions:
        return Pair(None, [], split, "no caption")
    if any("\ufffd" in text for text in captions):
        return Pair(None, captions, split, "a caption is not UTF-8")
    if isinstance(image, str):
        image = fetch(image, folder, rules=rules)
        if isinstance(image, FrameError):
            return Pair(None, captions, split, str(image))
    if columns.image and (not isinstance(image, bytes) or not image):
        return Pair(None, captions, split, "no image")
    return Pair(image, captions, split)
