"""The stages that caption whole frames: from pixels, from JPEG bytes, and how much memory that takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from framecap.bench import peers
from framecap.bench.measure import Contestant, Row
from framecap.bench.subject import EIGHT_BITS, NO_PEERS, Bench, typical
from framecap.bench.table import DECODING
from framecap.errors import BridgeMismatchError
from framecap.model.captioner import Captioner
from framecap.model.decode_options import DecodeOptions
from framecap.model.images import normalise
from framecap.model.ruclip import ImageFeatures


def caption_stage(bench: Bench) -> list[Row]:
    """Pixels (uint8) → captions: encoder and greedy generation, framecap and transformers in batches."""
    options, config, count = bench.options, bench.encoder.config, len(bench.pixels)
    some = typical(bench.caption_lengths, options.batch)
    chosen = torch.from_numpy(bench.pixels[some])

    def ours(captioner: Captioner) -> list[str]:
        return [caption.text for caption in bench.caption_pixels(captioner)]

    def theirs() -> list[str]:
        return _by_transformers(bench, normalise(chosen.to(options.device), config.mean, config.std, options.dtype))

    contestants = [Contestant("framecap", count, functools.partial(ours, bench.captioner), False, result=list)]
    if bench.has_peers:
        contestants.append(Contestant("transformers CLIP + generate", len(some), theirs, result=list, subset=some))
    if bench.eight_bits is not None:
        rounded = functools.partial(ours, bench.eight_bits)
        contestants.append(Contestant(EIGHT_BITS, count, rounded, False, result=list))
    return _compare(bench, "caption", contestants)


def captioner_stage(bench: Bench) -> list[Row]:
    """JPEG bytes in, captions out: framecap, Pillow + transformers in batches, and ClipCap's script. framecap's
    JPEG decoding alone stands beside them: with ``caption`` it says what the whole could reach."""
    options, config = bench.options, bench.encoder.config
    frames = bench.jpegs("720p", options.frames)
    some, few = (typical(bench.caption_lengths, count) for count in (options.batch, options.slow_frames))
    greedy = DecodeOptions(max_new_tokens=options.max_new_tokens)

    def pixels() -> list[np.ndarray]:
        return bench.crop(frames, threads=options.threads)

    def ours(captioner: Captioner) -> list[str]:
        if not captioner.encoder.has_text:
            return [caption.text for caption in captioner.caption(frames, greedy)]
        # Peers have no text tower.
        made = captioner.caption_pixels(np.stack(pixels()), greedy, similarity=False)
        return [caption.text for caption in made]

    def values(places: Sequence[int]) -> Tensor:
        part = [frames[place] for place in places]
        return peers.ruclip_transform(part, config.image_resolution, config.mean, config.std, options.threads)

    def script() -> list[str]:
        found = []
        for place in few:
            prefix = _prefixes(bench, values([place]))
            found += peers.clipcap_generate(bench.gpt2, prefix, options.max_new_tokens)
        return [bench.decoder.tokenizer.decode(ids) for ids in found]

    def theirs() -> list[str]:
        return _by_transformers(bench, values(some))

    contestants = [Contestant("framecap", len(frames), functools.partial(ours, bench.captioner), False, result=list)]
    if bench.has_peers:
        name = "Pillow + transformers CLIP + generate"
        contestants.append(Contestant(name, len(some), theirs, result=list, subset=some))
        contestants.append(Contestant("ClipCap's script", len(few), script, result=list, subset=few))
    contestants.append(Contestant(DECODING, len(frames), pixels, False))
    if bench.eight_bits is not None:
        rounded = functools.partial(ours, bench.eight_bits)
        contestants.append(Contestant(EIGHT_BITS, len(frames), rounded, False, result=list))
    return _compare(bench, "captioner", contestants)


def _compare(bench: Bench, stage: str, contestants: list[Contestant]) -> list[Row]:
    first, *others = bench.watch.compare(f"{stage}, batch {bench.options.batch}", contestants)
    return [replace(first, note="" if bench.has_peers else NO_PEERS), *others]


def _prefixes(bench: Bench, values: Tensor) -> Tensor:
    pooled = peers.clip_features(bench.clip, values, bench.options.batch)
    prefix, _ = bench.bridge(ImageFeatures(pooled, pooled[:, None]))
    if prefix is None:
        raise BridgeMismatchError("the bridge gave no prefix; transformers' GPT-2 reads nothing else.")
    return prefix


def _by_transformers(bench: Bench, values: Tensor) -> list[str]:
    """Captions of normalised frames [N, 3, R, R] by transformers' CLIP and ``generate``."""
    batch, limit = bench.options.batch, bench.options.max_new_tokens
    tokens = peers.transformers_generate(bench.gpt2, _prefixes(bench, values), batch, 1, limit)
    return [bench.decoder.tokenizer.decode(ids) for ids in tokens]


def memory_stage(bench: Bench) -> list[Row]:
    """Peak memory of captioning N frames and eight times as many, in the batches that ``Captioner.caption`` makes.

    Captions are short. Random weights come with the tiny encoder: what it needs for a batch would hide the rest,
    and take long on a CPU. Each run has a captioner of its own, with nothing kept from the run before.
    """
    options, sizes = bench.options, (bench.options.memory_frames, 8 * bench.options.memory_frames)
    made = bench.captioner if bench.shape is None else bench.drawn(replace(bench.shape, encoder="tiny"))
    picture = np.random.default_rng(options.seed).integers(0, 256, (made.resolution, made.resolution, 3), np.uint8)
    short = DecodeOptions(max_new_tokens=min(4, options.max_new_tokens))

    def run(frames: int) -> int:
        captioner = Captioner(made.encoder, made.bridge, bench.decoder, made.config)
        return len(captioner.caption([picture] * frames, short))

    contestants = [
        Contestant(f"framecap, {frames} frames", frames, functools.partial(run, frames), False) for frames in sizes
    ]
    return replace(bench.watch, repeats=1).compare("memory of generation", contestants)
