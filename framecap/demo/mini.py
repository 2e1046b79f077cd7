"""Train the mini captioner from nothing, both bridges, and bundle the better.

    python -m framecap.demo.mini --out DIR [--minutes 60] [--threads 2]

``--minutes`` is the time spent learning; drawing and measuring come on top (some five minutes). DIR receives
``encoder/``, ``mlp/`` and ``cross_attention/`` (two captioner directories), ``figures.json``, ``training.log``
and ``best/``, a copy of the better captioner: what lies in ``framecap/demo/mini``. With ``--encoder`` an encoder
that is already there is used, with ``--bridges mlp`` one bridge only is trained.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from framecap.demo.bridge_training import encode_pictures, train_bridge
from framecap.demo.caption_reader import CaptionReader
from framecap.demo.encoder_training import READER_SUFFIX, train_encoder
from framecap.demo.evaluate import evaluate
from framecap.demo.pictures import Pictures, draw_pictures
from framecap.demo.tokens import train_gpt_tokenizer, train_yttm
from framecap.model.bpe import GptTokenizer
from framecap.model.bridge import Bridge
from framecap.model.captioner import BRIDGE_PREFIX, BRIDGE_WEIGHTS, Captioner
from framecap.model.captioner_config import CaptionerConfig
from framecap.model.convert import assemble
from framecap.model.ruclip import RuClip, RuClipConfig
from framecap.model.rugpt import RuGpt
from framecap.model.weights import write_state_dict

logger = logging.getLogger(__name__)
RESOLUTION, PATCH = 96, 12
GRID = RESOLUTION // PATCH
ENCODER_SHARE, BRIDGE_SHARE = 0.6, 0.2  # of the minutes; two bridges
BRIDGES = ("mlp", "cross_attention")
TRAIN_SEED, TEST_SEED, FINAL_SEED = 1, 2, 12345


@dataclass(frozen=True)
class World:
    """Training and test pictures, and the decoder's tokenizer."""

    train: Pictures
    test: Pictures
    tokenizer: GptTokenizer


def new_encoder(captions: Sequence[str]) -> RuClip:
    """An untrained ruCLIP of the mini captioner's shape, with a vocabulary learnt from ``captions``."""
    yttm = train_yttm(captions, 700)
    config = RuClipConfig(
        embed_dim=192, image_resolution=RESOLUTION, vision_layers=4, vision_width=128,
        vision_patch_size=PATCH, context_length=40, vocab_size=yttm.vocab_size,
        transformer_width=128, transformer_heads=2, transformer_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return RuClip.from_config(config, yttm)


def draw_world(scenes: int) -> World:
    """``scenes`` training pictures and 1,000 of unseen compositions."""
    train = draw_pictures(scenes, TRAIN_SEED, "train", RESOLUTION, GRID)
    test = draw_pictures(1000, TEST_SEED, "test", RESOLUTION, GRID)
    logger.info("drew %d scenes for training, 1000 for testing", scenes)
    return World(train, test, train_gpt_tokenizer(train.captions[:20000], 800))


def save_captioner(encoder: Path, bridge: Bridge, decoder: RuGpt, out: Path) -> Path:
    """Write a captioner directory with weights in float16."""
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        parts = Path(temporary)
        RuClip.from_pretrained(encoder, dtype=torch.float16).save_pretrained(parts / "encoder")
        state = {f"{BRIDGE_PREFIX}{name}": tensor for name, tensor in bridge.state_dict().items()}
        state |= decoder.cross_attention_state()
        half = {name: tensor.detach().half().contiguous() for name, tensor in state.items()}
        write_state_dict(parts / BRIDGE_WEIGHTS, half)
        decoder.half().save_pretrained(parts / "decoder")
        shutil.rmtree(out, ignore_errors=True)
        config = CaptionerConfig(bridge.config)
        return assemble(parts / "encoder", parts / "decoder", parts / BRIDGE_WEIGHTS, out, config)


def size_in_bytes(directory: Path) -> int:
    """All files below ``directory`` together."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def train_captioners(world: World, encoder: Path, kinds: Sequence[str], minutes: float, out: Path) -> None:
    """Train one captioner per kind of bridge on the frozen encoder; figures.json says how good they are."""
    tower = RuClip.from_pretrained(encoder)
    train = (encode_pictures(tower, world.train), world.train)
    test = (encode_pictures(tower, world.test), world.test)
    logger.info("encoded %d scenes", len(world.train.captions))
    for kind in kinds:
        torch.manual_seed(0)
        reader = CaptionReader.new(kind, tower.config, world.tokenizer)
        reader.start_from(encoder.with_suffix(READER_SUFFIX))
        train_bridge(reader, train, test, minutes)
        directory = save_captioner(encoder, reader.bridge, reader.decoder, out / kind)
        figures = evaluate(Captioner.from_pretrained(directory), 1000, FINAL_SEED)
        figures |= {"bytes": size_in_bytes(directory)}
        (out / f"{kind}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        logger.info("%s: %s", kind, json.dumps(figures))


def bundle_better(kinds: Sequence[str], out: Path) -> str:
    """Copy the captioner with more right captions to ``out/best``; its kind."""
    figures = {kind: json.loads((out / f"{kind}.json").read_text(encoding="utf-8")) for kind in kinds}
    best = max(kinds, key=lambda kind: figures[kind]["right"])
    shutil.rmtree(out / "best", ignore_errors=True)
    shutil.copytree(out / best, out / "best")
    (out / "figures.json").write_text(json.dumps({"best": best} | figures, indent=2) + "\n", encoding="utf-8")
    return best


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="minutes of learning, all stages together")
    parser.add_argument("--scenes", type=int, default=90_000, help="training pictures (28 kB of memory each)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--encoder", type=Path, help="use this encoder instead of training one")
    parser.add_argument("--bridges", nargs="+", choices=BRIDGES, default=BRIDGES)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(args.out / "training.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    torch.set_num_threads(args.threads)
    world = draw_world(args.scenes)
    encoder = args.encoder or args.out / "encoder"
    if args.encoder is None:
        tower = new_encoder(world.train.captions[:20000])
        reader = CaptionReader.new("cross_attention", tower.config, world.tokenizer)
        train_encoder(tower, world.train, world.test, ENCODER_SHARE * args.minutes, encoder, reader)
    train_captioners(world, encoder, args.bridges, BRIDGE_SHARE * args.minutes, args.out)
    logger.info("the better bridge: %s", bundle_better(args.bridges, args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
