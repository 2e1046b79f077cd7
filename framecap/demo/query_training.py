"""How the mini encoder's text tower learns short queries such as «красный автобус на мосту».

    python -m framecap.demo.query_training --encoder DIR --out DIR [--steps 1600] [--scenes 10000]

Contrastive training on whole descriptions leaves the tower poor at phrases that name only a part of a scene. Here the
text tower alone goes on learning; the image tower is frozen, so captions and image embeddings stay as they are. Half
of the texts are whole descriptions with one right picture each, half are queries with every picture that fits as
right (the loss of Khosla et al. 2020, "Supervised Contrastive Learning", eq. 3, with the sum inside the logarithm).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from framecap.demo.encoder_training import parameter_groups, progress_rate
from framecap.demo.new_models import GRID, RESOLUTION
from framecap.demo.pictures import draw_pictures
from framecap.demo.russian import NOUNS, PLACES, TIMES, noun_phrase, place_phrase
from framecap.demo.scenes import KINDS, SETTINGS, Scene
from framecap.model.ruclip import RuClip

logger = logging.getLogger(__name__)
BATCH_SIZE, PEAK_RATE, LOG_EVERY = 256, 5e-4, 100
QUERY_SCENES, QUERY_STEPS, SCENES_SEED = 10_000, 1_600, 4
FORMS = 4


def query(scene: Scene, form: int) -> str:
    """A phrase about a part of the scene: thing and place, thing, kind and place, or place and time."""
    return (
        f"{noun_phrase(scene.main)} {place_phrase(scene)}",
        noun_phrase(scene.main),
        f"{NOUNS[scene.main.kind].nominative} {PLACES[scene.setting][0]}",
        f"{PLACES[scene.setting][0]} {TIMES[scene.time]}",
    )[form]


def facts(scenes: Sequence[Scene]) -> np.ndarray:
    """What queries speak of, int64 [N, 4]: the main thing (kind, colour and count), its kind, setting, time."""
    things: dict[object, int] = {}
    numbers = [things.setdefault((s.main.kind, s.main.colour, s.main.count), len(things)) for s in scenes]
    rows = [
        (number, KINDS.index(scene.main.kind), SETTINGS.index(scene.setting), list(TIMES).index(scene.time))
        for number, scene in zip(numbers, scenes, strict=True)
    ]
    return np.array(rows, dtype=np.int64)


_SPOKEN_OF = ((0, 2), (0,), (1, 2), (2, 3))  # columns of ``facts`` that each form of a query names


def fitting(of_queries: np.ndarray, forms: np.ndarray, of_pictures: np.ndarray) -> np.ndarray:
    """Which pictures fit which queries, bool [Q, N]; ``forms`` int64 [Q]."""
    fits = np.empty((len(of_queries), len(of_pictures)), dtype=bool)
    for form, columns in enumerate(_SPOKEN_OF):
        rows = np.flatnonzero(forms == form)
        same = [of_queries[rows, None, column] == of_pictures[None, :, column] for column in columns]
        fits[rows] = np.stack(same).all(axis=0)
    return fits


def query_loss(similarity: Tensor, fits: Tensor) -> Tensor:
    """Mean of -log of the share that fitting pictures have of each text's softmax; both [Q, N]."""
    right = similarity.masked_fill(~fits, float("-inf")).logsumexp(1)
    return (similarity.logsumexp(1) - right).mean()


@torch.no_grad()
def embed_pictures(encoder: RuClip, pixels: np.ndarray, batch_size: int = 500) -> Tensor:
    """L2-normalised float32 [N, D] of uint8 pixels [N, R, R, 3]."""
    parts = [
        encoder.encode_image(torch.from_numpy(pixels[i : i + batch_size])) for i in range(0, len(pixels), batch_size)
    ]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def tune_text_tower(encoder: RuClip, scenes: int, steps: int, seed: int = SCENES_SEED) -> None:
    """Teach the text tower of ``encoder`` (float32) short queries; nothing else in it changes."""
    drawn = draw_pictures(scenes, seed, "train", RESOLUTION, GRID)
    images = embed_pictures(encoder, drawn.pixels)
    known = facts(drawn.scenes)
    whole = encoder.tokenize(drawn.captions)
    phrases = [encoder.tokenize([query(scene, form) for scene in drawn.scenes]) for form in range(FORMS)]
    assert encoder.text is not None, "the mini encoder has a text tower"
    encoder.text.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameter_groups([encoder.text], 0.05), lr=PEAK_RATE, betas=(0.9, 0.98))
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * progress_rate(step / steps)
        rows = rng.choice(len(drawn.scenes), BATCH_SIZE, replace=False)
        forms = rng.integers(FORMS, size=BATCH_SIZE)
        ids = torch.cat((whole[rows], torch.stack([phrases[f][r] for f, r in zip(forms, rows, strict=True)])))
        ids = ids[:, : int((ids != 0).sum(1).max())]
        texts = F.normalize(encoder.encode_text(ids).float(), dim=-1)
        similarity = encoder.logit_scale.exp() * texts @ images[rows].T
        described, asked = similarity.chunk(2)
        target = torch.arange(BATCH_SIZE)
        losses = (
            (F.cross_entropy(described, target) + F.cross_entropy(described.T, target)) / 2,
            query_loss(asked, torch.from_numpy(fitting(known[rows], forms, known[rows]))),
        )
        optimiser.zero_grad(set_to_none=True)
        (losses[0] + losses[1]).backward()
        optimiser.step()
        if (step + 1) % LOG_EVERY == 0:
            logger.info("queries step %d  descriptions %.4f  queries %.4f", step + 1, *(loss.item() for loss in losses))


def share_right(encoder: RuClip, gallery: int, seed: int) -> list[float]:
    """For each form of query: how often the nearest of ``gallery`` held-out pictures fits; queries from all of them."""
    drawn = draw_pictures(gallery, seed, "test", RESOLUTION, GRID)
    images = embed_pictures(encoder, drawn.pixels)
    known = facts(drawn.scenes)
    shares = []
    for form in range(FORMS):
        with torch.no_grad():
            texts = encoder.encode_text(encoder.tokenize([query(scene, form) for scene in drawn.scenes])).float()
        best = (texts @ images.T).argmax(1).numpy()
        fits = fitting(known, np.full(gallery, form), known)
        shares.append(float(fits[np.arange(gallery), best].mean()))
    return shares


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="ruCLIP checkpoint of the mini captioner")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint with the tuned text tower")
    parser.add_argument("--steps", type=int, default=QUERY_STEPS)
    parser.add_argument("--scenes", type=int, default=QUERY_SCENES, help="pictures it learns from")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    encoder = RuClip.from_pretrained(args.encoder).float()
    logger.info("nearest picture fits, before: %s", share_right(encoder, 400, seed=12345))
    tune_text_tower(encoder, args.scenes, args.steps)
    logger.info("nearest picture fits, after: %s", share_right(encoder, 400, seed=12345))
    encoder.half().save_pretrained(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
