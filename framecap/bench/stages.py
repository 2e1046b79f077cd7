"""The stages: who takes part in each, and with what. Needs no Ray, pyarrow or pydantic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from framecap.bench import peers
from framecap.bench.frames import SIZES
from framecap.bench.measure import Contestant, Row, Work
from framecap.bench.random_captioner import random_prefixes
from framecap.bench.roofline import encode_work, generate_work
from framecap.bench.subject import Bench
from framecap.bench.table import OWN_ROWS
from framecap.model.captioner import Captioner
from framecap.model.decode_options import DecodeOptions
from framecap.model.generate import MAX_ROWS, FrameBatch, Generator, generate_stream
from framecap.model.images import Decode, normalise
from framecap.model.ruclip import ImageFeatures
from framecap.model.rugpt import RuGpt

EIGHT_BITS = "framecap, int8 weights"
CLIPCAP = "ClipCap's loop"
DECODES: tuple[Decode, Decode] = ("exact", "fast")


def decode_stage(bench: Bench) -> list[Row]:
    """JPEG bytes → pixels, on one thread: exact and fast, at 1280×720 and 1920×1080."""
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
    some = bench.prefixes[bench.typical(options.beam_frames)]
    return rows + _generate(bench, f"beam 5, batch {options.batch}", some, options.batch, 5)


def _generate(bench: Bench, stage: str, prefixes: Tensor, batch: int, beams: int) -> list[Row]:
    """All with ``batch`` frames at a time; at the last batch also what has a number of its own."""
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
    for cache in ("dynamic", "static") if options.static_cache else ("dynamic",):
        name = f"transformers.generate, {cache} cache"
        contestants.append(Contestant(name, count, functools.partial(theirs, cache), result=list))
    if batch == options.batch:
        together[OWN_ROWS] = max(1, MAX_ROWS[options.device.type] // beams)
        contestants.append(Contestant(OWN_ROWS, count, ours(bench.decoder, None), False, list))
        if bench.eight_bits is not None:
            eight_bits = ours(bench.eight_bits.decoder, batch * beams)
            contestants.append(Contestant(EIGHT_BITS, count, eight_bits, False, list))
        if beams == 1:
            few = bench.typical(options.slow_frames)
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


def captioner_stage(bench: Bench) -> list[Row]:
    """JPEG bytes in, captions out: framecap, Pillow + transformers in batches, and ClipCap's script."""
    options, size = bench.options, "720p"
    count, limit = options.frames, options.max_new_tokens
    frames = bench.jpegs(size, count)
    few = list(range(min(options.slow_frames, count)))
    greedy = DecodeOptions(max_new_tokens=limit)
    config = bench.encoder.config

    def prefixes(part: Sequence[bytes], batch: int) -> Tensor:
        values = peers.ruclip_transform(part, config.image_resolution, config.mean, config.std)
        pooled = peers.clip_features(bench.clip, values.to(options.device), batch)
        return bench.bridge(ImageFeatures(pooled, pooled[:, None]))

    def ours(captioner: Captioner) -> list[str]:
        pixels = np.stack(bench.crop(frames))
        return [caption.text for caption in captioner.caption_pixels(pixels, greedy, similarity=False)]

    def theirs() -> list[str]:
        tokens: list[list[int]] = []
        for start in range(0, count, options.batch):
            part = prefixes(frames[start : start + options.batch], options.batch)
            tokens += peers.transformers_generate(bench.gpt2, part, options.batch, 1, limit)
        return [bench.decoder.tokenizer.decode(ids) for ids in tokens]

    def script() -> list[str]:
        found = []
        for place in few:
            [ids] = peers.clipcap_generate(bench.gpt2, prefixes(frames[place : place + 1], 1), limit)
            found.append(bench.decoder.tokenizer.decode(ids))
        return found

    contestants = [
        Contestant("framecap", count, functools.partial(ours, bench.captioner), False, result=list),
        Contestant("Pillow + transformers CLIP + generate", count, theirs, result=list),
        Contestant("ClipCap's script", len(few), script, result=list, subset=few),
    ]
    if bench.eight_bits is not None:
        rounded = functools.partial(ours, bench.eight_bits)
        contestants.append(Contestant(EIGHT_BITS, count, rounded, False, result=list))
    return bench.watch.compare(f"captioner, batch {options.batch}", contestants)


def memory_stage(bench: Bench) -> list[Row]:
    """Peak memory of generating for 512 frames and for eight times as many; frames come as they are needed."""
    options, length = bench.options, bench.captioner.config.bridge.prefix_length

    def batches(frames: int) -> Iterator[FrameBatch]:
        for start in range(0, frames, 64):
            prefix = random_prefixes(bench.decoder, min(64, frames - start), length, start)
            yield FrameBatch(prefix, None, [0] * len(prefix))

    def run(frames: int) -> int:
        short = DecodeOptions(max_new_tokens=min(4, options.max_new_tokens))
        return sum(1 for _ in generate_stream(bench.decoder, batches(frames), short, options.batch))

    sizes = (options.memory_frames, 8 * options.memory_frames)
    contestants = [
        Contestant(f"framecap, {frames} frames", frames, functools.partial(run, frames), False) for frames in sizes
    ]
    return replace(bench.watch, repeats=1).compare("memory of generation", contestants)


STAGES: dict[str, Callable[[Bench], list[Row]]] = {
    "decode": decode_stage,
    "encode": encode_stage,
    "generate": generate_stage,
    "captioner": captioner_stage,
    "memory": memory_stage,
}
