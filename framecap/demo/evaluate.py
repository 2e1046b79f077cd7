"""How often the mini captioner is right about scenes of compositions it has never seen.

    python -m framecap.demo.evaluate --scenes 1000 --seed 12345 [--captioner DIR] [--num-beams 1]

Draws test scenes, captions them through the normal path, parses each caption and compares what it says with
the scene. ``right``: kinds, colours, relation and setting all agree. ``pairs_right``: share of ordered pairs of
frames with different captions in which a frame's ruCLIP similarity to its own right description is higher
than to the other frame's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from framecap.demo import bundled_captioner
from framecap.demo.russian import Claims, claims_of, describe, parse
from framecap.demo.scenes import Scene, draw_scenes
from framecap.demo.world import draw_frame
from framecap.errors import EvaluationError
from framecap.model.captioner import Captioner
from framecap.model.generate import DecodeOptions


def draw_test_frames(count: int, seed: int) -> tuple[list[Scene], list[bytes], list[str]]:
    """``count`` scenes of held-out compositions, their JPEG frames, and a right description of each."""
    scenes = draw_scenes(count, seed, "test")
    rng = np.random.default_rng((seed, 2))
    frames = [draw_frame(scene, rng)[0] for scene in scenes]
    return scenes, frames, [describe(scene, rng) for scene in scenes]


def accuracy(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of captions that are right about each thing; ``right``: about all essentials together."""
    claimed: list[Claims] = [parse(caption) for caption in captions]
    true = [claims_of(scene) for scene in scenes]
    shares = {
        name: float(np.mean([asdict(c)[name] == asdict(t)[name] for c, t in zip(claimed, true, strict=True)]))
        for name in Claims.__dataclass_fields__
    }
    right = [c.essentials() == t.essentials() for c, t in zip(claimed, true, strict=True)]
    everything = [c == t for c, t in zip(claimed, true, strict=True)]
    return {"right": float(np.mean(right)), "everything_right": float(np.mean(everything))} | shares


def pairs_right(captioner: Captioner, frames: Sequence[bytes], texts: Sequence[str]) -> float:
    """Share of ordered pairs in which the own description beats another frame's (differing in wording)."""
    if len(frames) < 2:
        raise EvaluationError(f"{len(frames)} frame makes no pair; give --scenes of at least 2.")
    similarity = captioner.embed_images(frames) @ captioner.embed_texts(texts).T
    differs = np.array(texts)[:, None] != np.array(texts)[None, :]
    return float((similarity.diagonal()[:, None] > similarity)[differs].mean())


def evaluate(captioner: Captioner, scenes: int, seed: int, num_beams: int = 1) -> dict[str, float]:
    """Accuracy and similarity figures on ``scenes`` scenes of unseen compositions."""
    drawn, frames, texts = draw_test_frames(scenes, seed)
    captions = captioner.caption(frames, DecodeOptions(num_beams=num_beams))
    figures = accuracy([caption.text for caption in captions], drawn)
    return figures | {"pairs_right": pairs_right(captioner, frames, texts)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--captioner", default=str(bundled_captioner()))
    parser.add_argument("--num-beams", type=int, default=1)
    args = parser.parse_args(argv)
    figures = evaluate(Captioner.from_pretrained(args.captioner), args.scenes, args.seed, args.num_beams)
    json.dump({name: round(value, 4) for name, value in figures.items()}, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
