"""The stages: who takes part in each, and with what. Needs no Ray, pyarrow or pydantic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from framecap.bench import peers
from framecap.bench.captions import caption_stage, captioner_stage, memory_stage
from framecap.bench.frames import SIZES
from framecap.bench.measure import Contestant, Row, Work
from framecap.bench.roofline import encode_work, generate_work
from framecap.bench.subject import EIGHT_BITS, Bench, typical
from framecap.bench.table import OWN_ROWS
from framecap.model.generate import MAX_ROWS, Generator
from framecap.model.images import Decode, normalise
from framecap.model.rugpt import RuGpt

CLIPCAP = "ClipCap's loop"
DECODES: tuple[Decode, Decode] = ("exact", "fast")


def decode_stage(bench: Bench) -> list[Row]:
    """JPEG bytes → pixels, on one thread: exact and fast, at 1280×720 and 1920×1080."""
    torch.set_num_threads(1)
    try:
        return _decode_sizes(bench)
    finally:
        torch.set_num_threads(bench.options.threads)


def _decode_sizes(bench: Bench) -> list[Row]:
    rows = []
    for size in SIZES:
        frames = bench.jpegs(size, min(bench.options.frames, 16))
        rows += _decode(bench, frames, f"decode exact {size}", "exact")
        exact, fast = (np.stack(bench.crop(frames, decode)).astype(np.int16) for decode in DECODES)
        note = f"mean difference from exact {np.abs(exact - fast).mean():.2f}/255"
        first, *others = _decode(bench, frames, f"decode fast {size}", "fast")
        rows += [replace(first, note=note), *(replace(row, agreement=None) for row in others)]
    return rows


def _decode(bench: Bench, frames: list[bytes], stage: str, decode: Decode) -> list[Row]:
    config, count = bench.encoder.config, len(frames)

    def values(pixels: Sequence[np.ndarray]) -> Tensor:
        return normalise(torch.from_numpy(np.stack(pixels)), config.mean, config.std)

    def ours() -> list[np.ndarray]:
        return bench.crop(frames, decode)

    def ours_as_floats() -> Tensor:
        return values(ours())

    def theirs() -> Tensor:
        return peers.ruclip_transform(frames, config.image_resolution, config.mean, config.std)

    def whole(found: Tensor) -> list[bytes]:
        return [frame.tobytes() for frame in found.numpy()]

    contestants = [
        Contestant("framecap, to uint8", count, ours, False, result=lambda pixels: whole(values(pixels))),
        Contestant("framecap, to float32", count, ours_as_floats, False, result=whole),
        Contestant("Pillow + torch (ruCLIP's), to float32", count, theirs, result=whole),
    ]
    return bench.watch.compare(stage, contestants)


def encode_stage(bench: Bench) -> list[Row]:
    """Pixels → pooled features. framecap starts from uint8, its peer from values already normalised."""
    config, options = bench.encoder.config, bench.options
    count = min(options.frames, options.batch)
    shape = (count, config.image_resolution, config.image_resolution, 3)
    pixels = np.random.default_rng(options.seed).integers(0, 256, shape, dtype=np.uint8)
    values = normalise(torch.from_numpy(pixels), config.mean, config.std).to(options.device)
    work = encode_work(config, options.batch, options.dtype.itemsize)

    def theirs() -> Tensor:
        return peers.clip_features(bench.clip, values, options.batch)

    contestants = [
        Contestant("framecap", count, lambda: bench.captioner.features(pixels), False),
        Contestant("transformers CLIP (SDPA)", count, theirs),
    ]
    if (eight_bits := bench.eight_bits) is not None:
        contestants.append(Contestant(EIGHT_BITS, count, lambda: eight_bits.features(pixels), False))
    rows = bench.watch.compare(f"encode, batch {options.batch}", contestants)
    return [bench.ceilings.mark(row, work) for row in rows]


def generate_stage(bench: Bench) -> list[Row]:
    """Prefixes → captions, greedy and with five beams."""
    options = bench.options
    rows: list[Row] = []
    for batch in options.batches:
        rows += _generate(bench, f"greedy, batch {batch}", bench.prefixes, batch, 1)
    some = bench.prefixes[typical(bench.lengths, options.beam_frames)]
    return rows + _generate(bench, f"beam 5, batch {options.batch}", some, options.batch, 5)


def _generate(bench: Bench, stage: str, prefixes: Tensor, batch: int, beams: int) -> list[Row]:
    """All with ``batch`` frames at a time. At the last batch also what has a number of its own, or would take
    long at each: a static cache, whose compiling takes a minute on a GPU (and there is no room for beams in it)."""
    options, count = bench.options, len(prefixes)
    found: list[list[int]] = []
    together: dict[str, int] = {}  # frames for which the weights are read at once, where it is not the batch

    def keep(tokens: list[list[int]]) -> list[list[int]]:
        found[:] = tokens
        return tokens

    def ours(decoder: RuGpt, max_rows: int | None) -> Callable[[], list[list[int]]]:
        generator = Generator(decoder, max_rows)  # it keeps its CUDA graphs from one round to the next
        return functools.partial(bench.tokens, generator, prefixes, beams)

    def theirs(cache: str) -> list[list[int]]:
        return peers.transformers_generate(bench.gpt2, prefixes, batch, beams, options.max_new_tokens, cache)

    contestants = [Contestant("framecap", count, ours(bench.decoder, batch * beams), False, keep)]
    last = batch == options.batch
    for cache in ("dynamic", "static") if options.static_cache and last and beams == 1 else ("dynamic",):
        name = f"transformers.generate, {cache} cache"
        contestants.append(Contestant(name, count, functools.partial(theirs, cache), result=list))
    if last:
        together[OWN_ROWS] = max(1, MAX_ROWS[options.device.type] // beams)
        contestants.append(Contestant(OWN_ROWS, count, ours(bench.decoder, None), False, list))
        if bench.eight_bits is not None:
            eight_bits = ours(bench.eight_bits.decoder, batch * beams)
            contestants.append(Contestant(EIGHT_BITS, count, eight_bits, False, list))
        if beams == 1:
            few = typical(bench.lengths, options.slow_frames)
            loop = functools.partial(peers.clipcap_generate, bench.gpt2, prefixes[few], options.max_new_tokens)
            together[CLIPCAP] = 1
            contestants.append(Contestant(CLIPCAP, len(few), loop, result=list, subset=few))
    rows = bench.watch.compare(f"generate {stage}", contestants)
    lengths = [len(tokens) for tokens in found]
    mean = sum(lengths) / count
    rows[0] = replace(rows[0], note=f"{mean:.1f} tokens on average, {max(lengths)} at most")

    def work(contestant: str) -> Work:
        frames, size = min(together.get(contestant, batch), count), options.dtype.itemsize
        return generate_work(bench.decoder.config, prefixes.shape[1], mean, frames, beams, size)

    return [bench.ceilings.mark(row, work(row.contestant)) for row in rows]


STAGES: dict[str, Callable[[Bench], list[Row]]] = {
    "decode": decode_stage,
    "encode": encode_stage,
    "generate": generate_stage,
    "caption": caption_stage,
    "captioner": captioner_stage,
    "memory": memory_stage,
}
