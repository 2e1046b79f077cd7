"""Cosines that the ruCLIP scores are made of: caption with frame, caption with its best reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from framecap.errors import EvaluationError, FrameError
from framecap.model.captioner import Captioner
from framecap.training.scored_texts import ScoredTexts, list_data_files, open_parquet, rows_in
from framecap.training.settings import EvaluateSettings
from framecap.training.wording import composed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cosines:
    """float64 [N] each; None where it cannot be known. A failed frame or an empty caption has 0."""

    image: np.ndarray | None
    reference: np.ndarray | None


def measure_cosines(texts: ScoredTexts, settings: EvaluateSettings) -> Cosines:
    """Cosines from the caption dataset's own column, or computed with ``--captioner`` and ``--frames``.

    Raises EvaluationError when ``--frames`` lacks a frame.
    """
    recorded = None if np.isnan(texts.similarity).all() else np.nan_to_num(texts.similarity)
    if not settings.captioner:
        return Cosines(recorded, None)
    captioner = Captioner.from_pretrained(settings.captioner, device=settings.device)
    captions = _embed(captioner.embed_texts, list(map(composed, texts.captions)), settings.batch_size)
    captions[[not caption for caption in texts.captions]] = 0
    image = recorded
    if settings.frames:
        image = np.sum(captions * _embed_frames(captioner, texts.ids, settings), axis=1)
    flat = [composed(reference) for group in texts.references for reference in group]
    embedded = _embed(captioner.embed_texts, flat, settings.batch_size)
    owner = np.repeat(np.arange(len(texts.ids)), [len(group) for group in texts.references])
    best = np.full(len(texts.ids), -np.inf)
    np.maximum.at(best, owner, np.sum(captions[owner] * embedded, axis=1))
    return Cosines(image, best)


def _embed(embed: Callable[[list[Any]], np.ndarray], items: Sequence[Any], batch_size: int) -> np.ndarray:
    batches = [list(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
    return np.concatenate([np.asarray(embed(batch), dtype=np.float64) for batch in batches])


def _embed_frames(captioner: Captioner, ids: list[str], settings: EvaluateSettings) -> np.ndarray:
    wanted = {frame_id: place for place, frame_id in enumerate(ids)}
    rows = np.zeros((len(ids), captioner.encoder.config.embed_dim))
    seen: set[str] = set()
    batch: list[tuple[int, bytes]] = []
    fs, paths = list_data_files(settings.frames)
    for path in paths:
        with open_parquet(fs, path) as file:
            for row in rows_in(file, path, (settings.id_column, settings.image_column)):
                frame_id = str(row[settings.id_column])
                if frame_id not in wanted:
                    continue
                seen.add(frame_id)
                image = row[settings.image_column]
                batch.append((wanted[frame_id], (image.get("bytes") if isinstance(image, dict) else image) or b""))
                if len(batch) == settings.batch_size:
                    _fill(rows, captioner, batch)
                    batch = []
    _fill(rows, captioner, batch)
    if len(seen) < len(ids):
        missing = next(i for i in ids if i not in seen)
        raise EvaluationError(f"{settings.frames} lacks {len(ids) - len(seen)} frames, e.g. {missing!r}")
    return rows


def _fill(rows: np.ndarray, captioner: Captioner, batch: list[tuple[int, bytes]]) -> None:
    if not batch:
        return
    try:
        rows[[place for place, _ in batch]] = captioner.embed_images([image for _, image in batch])
    except FrameError as error:
        if len(batch) == 1:
            log.warning("a frame cannot be compared with its caption and counts as 0: %s", error)
            return
        for one in batch:
            _fill(rows, captioner, [one])
