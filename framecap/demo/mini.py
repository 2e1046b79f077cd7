"""Train the mini captioner from nothing: ``python -m framecap.demo.mini --out DIR [--minutes 60]``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from framecap.demo.encoder_training import train_encoder
from framecap.demo.pictures import draw_pictures
from framecap.demo.tokens import train_yttm
from framecap.model.ruclip import RuClip, RuClipConfig

logger = logging.getLogger(__name__)
RESOLUTION, PATCH = 96, 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--scenes", type=int, default=80000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    train = draw_pictures(args.scenes, 1, "train", RESOLUTION, RESOLUTION // PATCH)
    test = draw_pictures(1000, 2, "test", RESOLUTION, RESOLUTION // PATCH)
    logger.info("drew %d scenes", args.scenes)
    yttm = train_yttm(train.captions[:20000], 700)
    config = RuClipConfig(
        embed_dim=192, image_resolution=RESOLUTION, vision_layers=4, vision_width=192,
        vision_patch_size=PATCH, context_length=40, vocab_size=yttm.vocab_size,
        transformer_width=128, transformer_heads=2, transformer_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = RuClip.from_config(config, yttm)
    train_encoder(encoder, train, test, args.minutes, args.out / "encoder")


if __name__ == "__main__":
    main()
