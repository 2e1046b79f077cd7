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
from framecap.bench.subject import EIGHT_BITS, NO_PEERS, Bench, pick, typical
from framecap.bench.table import OWN_ROWS
from framecap.model.generate import MAX_ROWS, FrameBatch, Generator
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
    """What the bridge gives → captions, greedy and with five beams."""
    options = bench.options
    rows: list[Row] = []
    for batch in options.batches:
        rows += _generate(bench, f"greedy, batch {batch}", bench.inputs, batch, 1)
    some = pick(bench.inputs, typical(bench.lengths, options.beam_frames))
    return rows + _generate(bench, f"beam 5, batch {options.batch}", some, options.batch, 5)


def _generate(bench: Bench, stage: str, inputs: FrameBatch, batch: int, beams: int) -> list[Row]:
    """All with ``batch`` frames at a time; at the last batch also framecap with its own choice and with int8."""
    options, count, last = bench.options, len(inputs.seeds), batch == bench.options.batch
    found: list[list[int]] = []

    def keep(tokens: list[list[int]]) -> list[list[int]]:
        found[:] = tokens
        return tokens

    def ours(decoder: RuGpt, max_rows: int | None) -> Callable[[], list[list[int]]]:
        generator = Generator(decoder, max_rows)  # it keeps its CUDA graphs from one round to the next
        return functools.partial(bench.tokens, generator, inputs, beams)

    contestants = [Contestant("framecap", count, ours(bench.decoder, batch * beams), False, keep)]
    if inputs.prefix is not None:
        contestants += _generating_peers(bench, inputs.prefix, batch, beams)
    if last:
        contestants.append(Contestant(OWN_ROWS, count, ours(bench.decoder, None), False, list))
    if last and bench.eight_bits is not None:
        eight_bits = ours(bench.eight_bits.decoder, batch * beams)
        contestants.append(Contestant(EIGHT_BITS, count, eight_bits, False, list))
    rows = bench.watch.compare(f"generate {stage}", contestants)
    lengths = [len(tokens) for tokens in found]
    mean = sum(lengths) / count
    note = f"{mean:.1f} tokens on average, {max(lengths)} at most"
    if inputs.prefix is None:  # nor are attention's operations over a memory counted
        return [replace(rows[0], note=f"{note}; {NO_PEERS}"), *rows[1:]]
    rows[0] = replace(rows[0], note=note)
    prefix = inputs.prefix.shape[1]
    # Frames for which the weights are read at once, where it is not the batch.
    together = {OWN_ROWS: max(1, MAX_ROWS[options.device.type] // beams), CLIPCAP: 1}

    def work(contestant: str) -> Work:
        frames, size = min(together.get(contestant, batch), count), options.dtype.itemsize
        return generate_work(bench.decoder.config, prefix, mean, frames, beams, size)

    return [bench.ceilings.mark(row, work(row.contestant)) for row in rows]


def _generating_peers(bench: Bench, prefixes: Tensor, batch: int, beams: int) -> list[Contestant]:
    """transformers with ``batch`` frames at a time; at the last batch also a static cache, whose compiling takes
    a minute on a GPU (and which beams outgrow), and ClipCap's loop."""
    options, count = bench.options, len(prefixes)
    last = batch == options.batch and beams == 1

    def generate(cache: str) -> list[list[int]]:
        return peers.transformers_generate(bench.gpt2, prefixes, batch, beams, options.max_new_tokens, cache)

    contestants = [
        Contestant(f"transformers.generate, {cache} cache", count, functools.partial(generate, cache), result=list)
        for cache in (("dynamic", "static") if last and not options.no_static_cache else ("dynamic",))
    ]
    if last:
        few = typical(bench.lengths, options.slow_frames)
        loop = functools.partial(peers.clipcap_generate, bench.gpt2, prefixes[few], options.max_new_tokens)
        contestants.append(Contestant(CLIPCAP, len(few), loop, result=list, subset=few))
    return contestants


STAGES: dict[str, Callable[[Bench], list[Row]]] = {
    "decode": decode_stage,
    "encode": encode_stage,
    "generate": generate_stage,
    "caption": caption_stage,
    "captioner": captioner_stage,
    "memory": memory_stage,
}
