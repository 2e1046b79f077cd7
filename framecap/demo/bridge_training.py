"""How the mini captioner's bridge and decoder learn, on features of the frozen encoder computed once.

A short loop of its own, timed in minutes and run in one process: the command that makes the bundled captioner
has to fit a laptop. The loss is that of ``jobs/train_captioner.py``: cross-entropy of the caption's tokens
and ``</s>`` after the prefix (ClipCap) or after ``<s>`` (cross-attention).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from framecap.demo.caption_reader import CaptionReader, greedy
from framecap.demo.encoder_training import parameter_groups, progress_rate
from framecap.demo.pictures import Pictures
from framecap.demo.russian import claims_of, parse
from framecap.model.images import normalise
from framecap.model.ruclip import ImageFeatures, RuClip

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_pictures(encoder: RuClip, pictures: Pictures, batch_size: int = 256) -> ImageFeatures:
    """Features of all pictures, bfloat16, on the CPU."""
    config = encoder.config
    pooled, patches = [], []
    for start in range(0, len(pictures.captions), batch_size):
        pixels = torch.from_numpy(pictures.pixels[start : start + batch_size]).to(encoder.device)
        with torch.autocast(encoder.device.type, torch.bfloat16):
            features = encoder.image_features(normalise(pixels, config.mean, config.std))
        pooled.append(features.pooled.bfloat16().cpu())
        patches.append(features.patches.bfloat16().cpu())
    return ImageFeatures(torch.cat(pooled), torch.cat(patches))


def share_right(captions: Sequence[str], pictures: Pictures) -> float:
    """Share of captions whose kinds, colours, relation and setting are all right."""
    pairs = zip(captions, pictures.scenes, strict=False)
    return float(np.mean([parse(text).essentials() == claims_of(scene).essentials() for text, scene in pairs]))


def train_bridge(
    reader: CaptionReader,
    train: tuple[ImageFeatures, Pictures],
    test: tuple[ImageFeatures, Pictures],
    minutes: float,
    batch_size: int = 128,
    peak_rate: float = 1e-3,
    seed: int = 0,
) -> float:
    """Train bridge and decoder for ``minutes``; the share of right captions on 1,000 unseen compositions."""
    features, pictures = train
    kind = reader.bridge.config.kind
    rows = reader.token_rows(pictures.captions)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(
        parameter_groups([reader.bridge, reader.decoder], 0.02), lr=peak_rate, betas=(0.9, 0.98)
    )
    trained = [*reader.bridge.parameters(), *reader.decoder.parameters()]
    start, step, order = time.monotonic(), 0, torch.empty(0, dtype=torch.int64)
    while (elapsed := (time.monotonic() - start) / 60) < minutes:
        if len(order) < batch_size:
            order = torch.from_numpy(rng.permutation(len(pictures.captions)))
        picked, order = order[:batch_size], order[batch_size:]
        for group in optimiser.param_groups:
            group["lr"] = peak_rate * progress_rate(elapsed / minutes)
        batch = ImageFeatures(features.pooled[picked].float(), features.patches[picked].float())
        with torch.autocast("cpu", torch.bfloat16):
            loss = reader.loss(batch, rows.ids[picked], rows.targets[picked])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step += 1
        if step % 200 == 0:
            right = _measure(reader, test, 200)
            logger.info(
                "%s step %d  %.1f min  loss %.4f  right on 200 unseen %.3f", kind, step, elapsed, loss.item(), right
            )
    right = _measure(reader, test, 1000)
    logger.info("%s finished: %d steps, right on 1000 unseen %.4f", kind, step, right)
    return right


def _measure(reader: CaptionReader, test: tuple[ImageFeatures, Pictures], rows: int) -> float:
    features, pictures = test
    batch = ImageFeatures(features.pooled[:rows].float(), features.patches[:rows].float())
    return share_right(greedy(reader.bridge, reader.decoder, batch, 32), pictures)
