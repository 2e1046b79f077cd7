"""Train the mini captioner from nothing, with both bridges, and keep the better.

    python -m framecap.demo.mini --out DIR [--minutes 60] [--threads 1]

1. draw scenes; 2. train the encoder on them for ``--minutes``, and a decoder that reads its patches along the way; then
teach its text tower short queries;
3. draw other scenes as Parquet pairs; 4. for each bridge run what ``jobs/train_captioner.py`` runs; 5. measure on
scenes of compositions nothing has seen. DIR receives ``encoder/``, ``decoder/``, ``pairs/``, ``mlp/`` and
``cross_attention/`` (captioner directories, float16), ``figures.json``, ``training.log`` and ``best/``, a copy of the
better captioner: what lies in ``framecap/demo/mini``. Parts that are already in DIR are not made again. All learning
is done on a GPU if there is one; it takes more steps in the same minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from framecap.demo.encoder_training import EncoderTraining
from framecap.demo.evaluate import evaluate
from framecap.demo.new_models import GRID, RESOLUTION, new_encoder, new_reader
from framecap.demo.pairs import write_pairs
from framecap.demo.pictures import draw_pictures
from framecap.demo.query_training import QUERY_SCENES, QUERY_STEPS, tune_text_tower
from framecap.model.captioner import Captioner
from framecap.model.captioner_config import CONFIG_NAME, CaptionerConfig
from framecap.model.convert import write_manifest
from framecap.model.devices import choose_device
from framecap.model.ruclip import RuClip
from framecap.model.weights import read_state_dict, write_state_dict
from framecap.training.run import train_captioner
from framecap.training.settings import TrainSettings

logger = logging.getLogger(__name__)
BRIDGES = ("mlp", "cross_attention")
DOMAIN = "the drawn world of framecap's demo"
ENCODER_SEED, PROBE_SEED, PAIRS_SEED, TEST_SEED = 1, 2, 3, 12345


def train_encoder(out: Path, scenes: int, minutes: float) -> None:
    """Draw scenes and learn from them, on a GPU if there is one; leaves ``encoder/`` (float16) and ``decoder/`` as
    published checkpoints."""
    device = choose_device("auto")
    train = draw_pictures(scenes, ENCODER_SEED, "train", RESOLUTION, GRID)
    probe = draw_pictures(512, PROBE_SEED, "test", RESOLUTION, GRID)
    logger.info("drew %d scenes", scenes)
    encoder = new_encoder(train.captions, seed=0).to(device)
    reader = new_reader(train.captions, encoder.config, seed=0).to(device)
    EncoderTraining(encoder, reader, train, seed=0).train(minutes, probe)
    reader.decoder.cpu().save_pretrained(out / "decoder")
    encoder.cpu().half().save_pretrained(out / "encoder")


def teach_queries(out: Path, share: float) -> None:
    """Teach the text tower of ``out/encoder`` short queries by ``share`` of the usual scenes and steps."""
    encoder = RuClip.from_pretrained(out / "encoder")
    tune_text_tower(encoder, round(share * QUERY_SCENES), round(share * QUERY_STEPS))
    encoder.half().save_pretrained(out / "encoder")


def training_settings(out: Path, bridge: str, epochs: float, threads: int) -> TrainSettings:
    """What ``jobs/train_captioner.py`` is told, as flags would say it."""
    return TrainSettings(
        encoder=str(out / "encoder"),
        decoder=str(out / "decoder"),
        pairs=str(out / "pairs"),
        out=str(out / "trained" / bridge),
        bridge=bridge,
        prefix_length=6,
        train="bridge+decoder",
        epochs=epochs,
        batch_size=128,
        learning_rate=1e-3,
        warmup=0.03,
        weight_decay=0.02,
        precision="bf16",
        cpus_per_worker=threads,
        encode_batch_size=256,
        ray_address="local",
    )


def halved(captioner: Path, out: Path) -> Path:
    """A copy of a captioner directory with its weights in float16, which says what it knows."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(captioner, out)
    replace(CaptionerConfig.from_file(out / CONFIG_NAME), domain=DOMAIN).write(out / CONFIG_NAME)
    for weights in out.rglob("*.safetensors"):
        write_state_dict(weights, {name: tensor.half() for name, tensor in read_state_dict(weights).items()})
    write_manifest(out)
    return out


def size_in_bytes(directory: Path) -> int:
    """All files below ``directory`` together."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def keep_better(figures: dict[str, dict[str, float]], out: Path) -> str:
    """Copy the captioner with more right captions to ``out/best`` and write figures.json; its bridge."""
    best = max(figures, key=lambda bridge: figures[bridge]["right"])
    shutil.rmtree(out / "best", ignore_errors=True)
    shutil.copytree(out / best, out / "best")
    (out / "figures.json").write_text(json.dumps({"best": best} | figures, indent=2) + "\n", encoding="utf-8")
    return best


def train_mini(out: Path, minutes: float, scenes: int, pairs: int, epochs: float, threads: int) -> str:
    """All five steps of the module's docstring; the name of the better bridge."""
    if not (out / "encoder" / "config.json").is_file():
        train_encoder(out, scenes, minutes)
        teach_queries(out, min(1.0, scenes / QUERY_SCENES))
    if not (out / "pairs" / "drawn.parquet").is_file():
        write_pairs(out / "pairs" / "drawn.parquet", pairs, pairs // 40, PAIRS_SEED)
        logger.info("drew %d pairs", pairs)
    figures = {}
    for bridge in BRIDGES:
        if not (out / bridge).is_dir():
            halved(train_captioner(training_settings(out, bridge, epochs, threads)), out / bridge)
        figures[bridge] = evaluate(Captioner.from_pretrained(out / bridge), 1000, TEST_SEED)
        figures[bridge]["bytes"] = size_in_bytes(out / bridge)
        logger.info("%s: %s", bridge, json.dumps(figures[bridge]))
    return keep_better(figures, out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="minutes the encoder learns for")
    parser.add_argument("--scenes", type=int, default=120_000, help="pictures it learns from (28 kB of memory each)")
    parser.add_argument("--pairs", type=int, default=60_000, help="pictures the bridges learn from")
    parser.add_argument("--epochs", type=float, default=6, help="passes over those pairs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(args.out / "training.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    torch.set_num_threads(args.threads)
    best = train_mini(args.out.absolute(), args.minutes, args.scenes, args.pairs, args.epochs, args.threads)
    logger.info("the better bridge: %s", best)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
