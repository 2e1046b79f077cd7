"""Importance: each score is its formula, per video; rank correlations are scipy's."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from framecap.errors import SettingsError
from framecap.importance import (
    agreement,
    caption_change,
    combine,
    kendall_tau,
    novelty,
    relevance,
    representativeness,
    shot_boundaries,
    shot_change,
    spearman_rho,
)

SIZE = 8


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return unit_rows(np.random.default_rng(3).normal(size=(12, SIZE))).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def table(embeddings: np.ndarray) -> pa.Table:
    """Two videos whose rows are interleaved and stored last frame first; the sixth row failed."""
    column = [None if row == 5 else embeddings[row].astype(np.float16) for row in range(12)]
    return pa.table(
        {
            "video_id": ["a", "b"] * 6,
            "frame_index": pa.array(range(12, 0, -1), pa.int64()),
            "caption": [None if row == 5 else f"слово {row // 4}" for row in range(12)],
            "image_embedding": pa.array(column, pa.list_(pa.float16(), SIZE)),
            "query_similarity": pa.array(
                [None if row == 5 else [row / 10, -row / 10] for row in range(12)], pa.list_(pa.float32())
            ),
        }
    )


ORDER = {"a": [10, 8, 6, 4, 2, 0], "b": [11, 9, 7, 3, 1]}


def test_novelty_is_one_minus_the_highest_cosine_to_the_last_frames(table: pa.Table, embeddings: np.ndarray) -> None:
    found = novelty(table, last=2)
    for rows in ORDER.values():
        for place, row in enumerate(rows):
            before = [float(embeddings[row] @ embeddings[other]) for other in rows[max(0, place - 2) : place]]
            assert found[row] == pytest.approx(1 - max(before) if before else 1.0, abs=1e-3)
    assert np.isnan(found[5])


def test_representativeness_is_the_cosine_to_the_mean(table: pa.Table, embeddings: np.ndarray) -> None:
    found = representativeness(table)
    for rows in ORDER.values():
        mean = embeddings[rows].mean(axis=0)
        expected = embeddings[rows] @ mean / np.linalg.norm(mean)
        np.testing.assert_allclose(found[rows], expected, atol=1e-3)


def test_shot_change_skips_a_frame_that_failed(table: pa.Table, embeddings: np.ndarray) -> None:
    found = shot_change(table)
    assert found[11] == 0
    assert found[3] == pytest.approx(1 - embeddings[3] @ embeddings[7], abs=1e-3)


def test_a_shot_begins_where_the_cosine_falls() -> None:
    rng = np.random.default_rng(0)
    scenes = np.repeat(unit_rows(rng.normal(size=(3, 64))), [10, 7, 13], axis=0)
    rows = unit_rows(scenes + 0.02 * rng.normal(size=scenes.shape)).astype(np.float16)
    table = pa.table({"image_embedding": pa.array(list(rows), pa.list_(pa.float16(), 64))})
    assert np.flatnonzero(shot_boundaries(table)).tolist() == [0, 10, 17]


def test_a_video_without_cuts_is_one_shot() -> None:
    rows = unit_rows(np.ones((20, 4)) + 0.01 * np.random.default_rng(1).normal(size=(20, 4))).astype(np.float16)
    table = pa.table({"image_embedding": pa.array(list(rows), pa.list_(pa.float16(), 4))})
    assert shot_boundaries(table).sum() == 1


def test_caption_change_compares_words_with_the_caption_before(table: pa.Table) -> None:
    found = caption_change(table)
    assert found[10] == 0  # the first of its video
    assert found[8] == 0  # «слово 2» twice
    assert found[6] == pytest.approx(1 - 2 * 1 / 4)  # «слово 2» → «слово 1»
    assert np.isnan(found[5])
    assert found[3] == pytest.approx(0.5)  # compared with row 7: row 5 failed


def test_relevance_is_the_queries_column_or_the_cosine_with_an_embedding(
    table: pa.Table, embeddings: np.ndarray
) -> None:
    assert relevance(table, 1)[3] == pytest.approx(-0.3)
    found = relevance(table, 2 * embeddings[4])
    np.testing.assert_allclose(found[[0, 4]], [embeddings[0] @ embeddings[4], 1.0], atol=2e-3)
    assert np.isnan(found[5])
    with pytest.raises(SettingsError, match="made with 2 queries"):
        relevance(table, 2)


def test_combined_scores_are_weighted_mean_ranks_within_a_video(table: pa.Table) -> None:
    scores = {"up": np.arange(12.0), "flat": np.zeros(12)}
    found = combine(table, scores, {"up": 3, "flat": 1})
    # Video a holds rows 0, 2 … 10: row 10 has rank 6 of 6 in "up" and the mean rank 3.5 of 6 in "flat".
    assert found[10] == pytest.approx((3 * 1 + 3.5 / 6) / 4)
    assert found[0] == pytest.approx((3 / 6 + 3.5 / 6) / 4)
    with pytest.raises(SettingsError, match="'down'"):
        combine(table, scores, {"down": 1})


def test_a_table_without_embeddings_says_which_flag_makes_them(table: pa.Table) -> None:
    with pytest.raises(SettingsError, match="--image-embedding"):
        novelty(table.drop_columns(["image_embedding"]))


@pytest.mark.parametrize("kind", ["distinct", "tied", "negative", "large"])
def test_rank_correlations_are_those_of_scipy(kind: str) -> None:
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 1300 if kind == "large" else 60))
    b = {"negative": -a + 0.1 * b, "tied": np.round(a + b)}.get(kind, b)
    a = np.round(a) if kind == "tied" else a
    assert kendall_tau(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
    assert spearman_rho(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_a_constant_score_has_no_rank_correlation() -> None:
    assert np.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
    assert np.isnan(spearman_rho([1, 1, 1], [1, 2, 3]))


def test_agreement_is_the_mean_over_the_annotators() -> None:
    rng = np.random.default_rng(5)
    score, humans = rng.normal(size=40), rng.integers(1, 6, size=(20, 40))
    found = agreement(score, humans)
    assert found.kendall == pytest.approx(np.mean([stats.kendalltau(score, human).statistic for human in humans]))
    assert found.spearman == pytest.approx(np.mean([stats.spearmanr(score, human).statistic for human in humans]))
    with pytest.raises(SettingsError, match="annotators"):
        agreement(score, humans.T)
