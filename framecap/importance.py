"""Features and measures for the stage that scores how important each frame is.

All functions take a table of captions in memory, such as ``read_captions`` gives, and return one float32 value per
row, in the table's order. Rows belong to the video that ``video_column`` names and are taken in the order of
``order_column``, or in the table's own order where that column is missing. A row without an embedding (a failed
frame) gets NaN and is passed over by its neighbours.

Knows nothing of storage, Ray or models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from framecap.errors import SettingsError
from framecap.schema import EMBEDDING_COLUMN, QUERY_COLUMN

_WORD = re.compile(r"\w+")
_MAD_TO_STD = 1.4826  # standard deviation of a normal distribution ÷ its median absolute deviation
_BLOCK = 512  # rows of the pair matrix that Kendall's tau holds at a time


@dataclass(frozen=True)
class VideoColumns:
    """Which columns order the frames; ``embedding`` is the one that neighbours are compared by."""

    video: str = "video_id"
    order: str = "frame_index"
    embedding: str = EMBEDDING_COLUMN


def novelty(table: pa.Table, last: int = 8, columns: VideoColumns | None = None) -> np.ndarray:
    """How little a frame resembles the ones before it: ``1 - max cos(e_t, e_s)`` over the ``last`` frames s before t.

    1 for the first frame of a video; float32 [N]. The redundancy term of maximal marginal relevance (Carbonell and
    Goldstein, SIGIR 1998) within a window.

    Raises:
        SettingsError: the table has no embeddings, or ``last`` is below 1.
    """
    if last < 1:
        raise SettingsError(f"last={last}: a frame is compared with at least one frame before it; give 1 or more")

    def of_video(embeddings: np.ndarray) -> np.ndarray:
        scores = np.ones(len(embeddings), np.float32)
        for t in range(1, len(embeddings)):
            scores[t] = 1 - (embeddings[max(0, t - last) : t] @ embeddings[t]).max()
        return scores

    return _by_video(table, columns or VideoColumns(), of_video)


def representativeness(table: pa.Table, columns: VideoColumns | None = None) -> np.ndarray:
    """How typical a frame is of its video: the cosine of its embedding and the mean of the video's embeddings.

    float32 [N] in [-1, 1]. The distance to the centroid that clustering summarisers rank by (VSUMM, de Avila et al.,
    Pattern Recognition Letters 2011), with one cluster.
    """

    def of_video(embeddings: np.ndarray) -> np.ndarray:
        mean = embeddings.mean(axis=0)
        return (embeddings @ mean) / max(float(np.linalg.norm(mean)), 1e-12)

    return _by_video(table, columns or VideoColumns(), of_video)


def shot_change(table: pa.Table, columns: VideoColumns | None = None) -> np.ndarray:
    """How far a frame is from the one before it: ``1 - cos(e_t, e_{t-1})``; 0 for the first frame. float32 [N]."""

    def of_video(embeddings: np.ndarray) -> np.ndarray:
        scores = np.zeros(len(embeddings), np.float32)
        scores[1:] = 1 - (embeddings[1:] * embeddings[:-1]).sum(axis=1)
        return scores

    return _by_video(table, columns or VideoColumns(), of_video)


def shot_boundaries(
    table: pa.Table, deviations: float = 4.0, least: float = 0.05, columns: VideoColumns | None = None
) -> np.ndarray:
    """Whether a shot begins at a frame; bool [N], True for the first frame of each video.

    A shot begins where the cosine to the frame before falls: ``shot_change`` is at least ``least``, and ``deviations``
    robust standard deviations (1.4826 times the median absolute deviation) above the video's median. An adaptive
    threshold on neighbours' differences, as compared by Lienhart (SPIE Storage and Retrieval 1999).
    """
    columns = columns or VideoColumns()
    change = shot_change(table, columns)
    starts = np.zeros(len(change), bool)
    for rows in _videos(table, columns):
        rows = rows[~np.isnan(change[rows])]
        if not len(rows):
            continue
        inner = change[rows[1:]]
        if len(inner):
            middle = np.median(inner)
            spread = _MAD_TO_STD * np.median(np.abs(inner - middle))
            starts[rows[1:]] = inner >= max(least, middle + deviations * spread)
        starts[rows[0]] = True
    return starts


def caption_change(table: pa.Table, caption_column: str = "caption", columns: VideoColumns | None = None) -> np.ndarray:
    """How much a caption differs from the one before it: ``1 - 2 |A ∩ B| / (|A| + |B|)`` over words with repetition.

    Dice's coefficient (Ecology 1945) in lower case without punctuation; 0 for the first frame, NaN without a caption.
    float32 [N].
    """
    _require(table, caption_column)
    words = [None if text is None else Counter(_WORD.findall(text.lower())) for text in _list(table, caption_column)]
    scores = np.full(len(words), np.nan, np.float32)
    for rows in _videos(table, columns or VideoColumns()):
        before: Counter[str] | None = None
        for row in rows:
            now = words[row]
            if now is None:
                continue
            total = 0 if before is None else before.total() + now.total()
            scores[row] = 1 - 2 * (before & now).total() / total if before is not None and total else 0.0
            before = now
    return scores


def relevance(table: pa.Table, query: int | np.ndarray = 0, columns: VideoColumns | None = None) -> np.ndarray:
    """The cosine of each frame with a query; float32 [N].

    ``query``: the place of a query in the ``query_similarity`` column (the job's ``--query`` flags in order), or a
    text embedding [D] of the same captioner, which is compared with the image embeddings.
    """
    if isinstance(query, np.ndarray):
        embeddings = _embeddings(table, (columns or VideoColumns()).embedding)
        return np.asarray(embeddings @ (query / np.linalg.norm(query)).astype(np.float32), np.float32)
    _require(table, QUERY_COLUMN)
    rows = _list(table, QUERY_COLUMN)
    longest = max((len(row) for row in rows if row is not None), default=0)
    if longest and not 0 <= query < longest:
        raise SettingsError(f"query={query}: the captions were made with {longest} queries, numbered from 0")
    return np.array([np.nan if row is None or row[query] is None else row[query] for row in rows], np.float32)


def combine(
    table: pa.Table,
    scores: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    columns: VideoColumns | None = None,
) -> np.ndarray:
    """One score from several: the weighted mean of each score's rank within its video, as a share in (0, 1].

    Ranks make scores of different scales comparable; ties share their mean rank. A row that lacks a score gets NaN.
    float32 [N].

    Raises:
        SettingsError: a weight names no score, or the weights do not sum to more than 0.
    """
    if unknown := sorted(set(weights) - set(scores)):
        raise SettingsError(f"weight for {unknown[0]!r}, which is no score; there are {', '.join(sorted(scores))}")
    if sum(weights.values()) <= 0:
        raise SettingsError("the weights sum to 0 or less; give at least one that is above 0")
    total = np.zeros(table.num_rows, np.float64)
    for rows in _videos(table, columns or VideoColumns()):
        for name, weight in weights.items():
            values = np.asarray(scores[name], np.float64)[rows]
            known = ~np.isnan(values)
            share = np.full(len(rows), np.nan)
            share[known] = _ranks(values[known]) / max(1, known.sum())
            total[rows] += weight * share
    return (total / sum(weights.values())).astype(np.float32)


def kendall_tau(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Kendall's τ-b of two scores of the same frames (Kendall, Biometrika 1945: corrected for ties); NaN if one is
    constant. Takes O(N²) time and O(N) memory."""
    x, y = _pair(a, b)
    concordant = ties_x = ties_y = 0
    pairs = len(x) * (len(x) - 1) // 2
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        later = np.arange(len(x))[None, :] > np.arange(len(x))[rows, None]
        sign_x, sign_y = np.sign(x[rows, None] - x[None, :]), np.sign(y[rows, None] - y[None, :])
        concordant += int((sign_x * sign_y)[later].sum())
        ties_x += int((sign_x == 0)[later].sum())
        ties_y += int((sign_y == 0)[later].sum())
    scale = np.sqrt(float(pairs - ties_x) * float(pairs - ties_y))
    return float(concordant / scale) if scale else float("nan")


def spearman_rho(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's ρ of two scores of the same frames: Pearson's correlation of their ranks (ties share their mean
    rank); NaN if one is constant."""
    x, y = (_ranks(values) for values in _pair(a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else float("nan")


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of a score with human importance, averaged over annotators."""

    kendall: float
    spearman: float


def agreement(score: np.ndarray, annotations: np.ndarray) -> Agreement:
    """How well ``score`` [N] orders the frames of one video as its annotators do: ``annotations`` [A, N].

    Each correlation is computed with every annotator and averaged, as Otani et al. (CVPR 2019, "Rethinking the
    Evaluation of Video Summaries") do on TVSum (Song et al., CVPR 2015). Average the videos' results for a dataset.

    Raises:
        SettingsError: ``annotations`` is not [A, N].
    """
    annotations = np.asarray(annotations)
    if annotations.ndim != 2 or annotations.shape[1] != len(score):
        raise SettingsError(f"annotations {list(annotations.shape)} for {len(score)} frames; give [annotators, frames]")
    return Agreement(
        kendall=float(np.mean([kendall_tau(score, human) for human in annotations])),
        spearman=float(np.mean([spearman_rho(score, human) for human in annotations])),
    )


def _pair(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both scores as float64, without the frames that lack one of them."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise SettingsError(
            f"scores of shapes {list(x.shape)} and {list(y.shape)}; both must be [N] of the same frames"
        )
    known = ~(np.isnan(x) | np.isnan(y))
    return x[known], y[known]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties share their mean rank. float64 [N]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place], np.float64)


def _by_video(table: pa.Table, columns: VideoColumns, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``score`` of each video's embeddings [n, D] in order, put back to the table's rows; NaN without an embedding."""
    embeddings = _embeddings(table, columns.embedding)
    scores = np.full(len(embeddings), np.nan, np.float32)
    for rows in _videos(table, columns):
        rows = rows[~np.isnan(embeddings[rows, 0])] if embeddings.shape[1] else rows[:0]
        if len(rows):
            scores[rows] = score(embeddings[rows])
    return scores


def _embeddings(table: pa.Table, column: str) -> np.ndarray:
    """The embedding column as float32 [N, D]; NaN where it is null.

    Raises:
        SettingsError: no such column; the message says how to get it.
    """
    if column not in table.column_names:
        raise SettingsError(
            f"no column {column!r}; caption with --{column.replace('_', '-')} to get it "
            f"(the table has {', '.join(table.column_names)})"
        )
    array = table[column].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    size = array.type.list_size
    values = np.full((len(array), size), np.nan, np.float32)
    known = ~np.asarray(array.is_null())
    values[known] = array.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
    return values


def _videos(table: pa.Table, columns: VideoColumns) -> Iterator[np.ndarray]:
    """The rows of each video, in order; a table without a video column is one video."""
    names = _list(table, columns.video) if columns.video in table.column_names else [None] * table.num_rows
    order = _list(table, columns.order) if columns.order in table.column_names else [None] * table.num_rows
    groups: dict[Any, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    for rows in groups.values():
        yield np.array(sorted(rows, key=lambda row: (order[row] is None, order[row] or 0, row)))


def _require(table: pa.Table, column: str) -> None:
    if column not in table.column_names:
        hint = "caption with --query to get it" if column == QUERY_COLUMN else "give the name of the caption column"
        raise SettingsError(f"no column {column!r}; {hint} (the table has {', '.join(table.column_names)})")


def _list(table: pa.Table, column: str) -> list[Any]:
    values: list[Any] = table[column].to_pylist()
    return values
