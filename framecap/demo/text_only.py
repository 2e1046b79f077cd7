"""How far text alone takes a bridge, on the drawn world: the same bridge, the same number of captions.

    python -m framecap.demo.text_only --out DIR [--pairs 20000] [--epochs 6] [--threads 1]

Draws pairs; trains a bridge on them with ``train_captioner``; trains another on their captions alone, with the noise
measured on 500 pairs and the means subtracted, and a third with CapDec's noise and no pair at all; prints how often
each is right about 1,000 scenes of unseen compositions. Encoder and decoder are the bundled captioner's, frozen.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from framecap.demo import bundled_captioner
from framecap.demo.evaluate import evaluate
from framecap.demo.pairs import write_pairs
from framecap.model.captioner import Captioner
from framecap.training.run import train_locally
from framecap.training.settings import TrainSettings

PAIRS_SEED, GAP_SEED, TEST_SEED = 5, 6, 12345


def training_settings(out: Path, epochs: float) -> dict[str, dict[str, Any]]:
    """Settings of each training, by name."""
    base: dict[str, Any] = {
        "encoder": str(bundled_captioner() / "encoder"), "decoder": str(bundled_captioner() / "decoder"),
        "bridge": "mlp", "prefix_length": 6, "train": "bridge+decoder", "normalize_features": True, "epochs": epochs,
        "batch_size": 128, "learning_rate": 1e-3, "warmup": 0.03, "weight_decay": 0.02, "encode_batch_size": 256,
        "device": "cpu", "precision": "fp32", "log_every": 100,
    }  # fmt: skip
    text = base | {"train_on": "text", "pairs": str(out / "captions.txt")}
    return {
        "pairs": base | {"pairs": str(out / "pairs.parquet")},
        "text, noise and means from 500 pairs": text | {"gap_pairs": str(out / "gap.parquet"), "center": True},
        "text, no pair, CapDec's noise": text,
    }


def draw(out: Path, pairs: int) -> None:
    """Pairs, their captions as a text file, and the pairs that show the gap."""
    write_pairs(out / "pairs.parquet", pairs, 0, PAIRS_SEED)
    write_pairs(out / "gap.parquet", 500, 0, GAP_SEED)
    captions = pq.read_table(out / "pairs.parquet", columns=["caption"])["caption"].to_pylist()
    (out / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for pairs and captioners")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    if not (args.out / "captions.txt").is_file():
        draw(args.out, args.pairs)
    print("| trained on | right of 1,000 |\n|---|---|")
    for number, (name, values) in enumerate(training_settings(args.out, args.epochs).items()):
        folder = args.out / f"captioner-{number}"
        if not folder.is_dir():
            train_locally(TrainSettings(out=str(folder), **values))
        figures = evaluate(Captioner.from_pretrained(folder), 1000, TEST_SEED)
        print(f"| {name} | {figures['right']:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
