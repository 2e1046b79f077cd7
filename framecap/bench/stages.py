"""The stages: who takes part in each, and with what. Needs no Ray, pyarrow or pydantic."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framecap.bench import peers
from framecap.bench.frames import SIZES, make_frames
from framecap.bench.measure import Ceilings, Contestant, Row, Stopwatch
from framecap.bench.random_captioner import ENCODERS, CaptionerShape, random_captioner, random_prefixes
from framecap.bench.roofline import encode_work, generate_work
from framecap.model.captioner import Captioner
from framecap.model.decode_options import DecodeOptions
from framecap.model.generate import FrameBatch, Generator, generate_stream
from framecap.model.images import Decode, crop_and_resize, normalise
from framecap.model.packed import use_eight_bits
from framecap.model.ruclip import ImageFeatures

EIGHT_BITS = "framecap, int8 weights"
DECODES: tuple[Decode, Decode] = ("exact", "fast")


@dataclass(frozen=True)
class BenchOptions:
    """How much to run. ``batches``: of ``generate``; the last also of the other stages."""

    frames: int
    batches: tuple[int, ...]
    beam_frames: int
    slow_frames: int
    memory_frames: int
    max_new_tokens: int
    folder: str | None
    static_cache: bool
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.batches[-1]


class Bench:
    """A captioner, what its contestants share, and the stopwatch."""

    def __init__(
        self, captioner: Captioner | CaptionerShape, options: BenchOptions, watch: Stopwatch, ceilings: Ceilings
    ) -> None:
        self.options, self.watch, self.ceilings = options, watch, ceilings
        self.random = isinstance(captioner, CaptionerShape)
        if isinstance(captioner, CaptionerShape):
            resolution = ENCODERS[captioner.encoder].image_resolution
            sample = [crop_and_resize(frame, resolution) for frame in self.jpegs("720p", 8)]
            pixels = torch.from_numpy(np.stack(sample))
            captioner = random_captioner(captioner, pixels, options.device, options.dtype, options.seed)
        self.captioner = captioner
        self.encoder, self.decoder = captioner.encoder, captioner.decoder

    @functools.cache  # noqa: B019 (one bench lives as long as the program)
    def jpegs(self, size: str, count: int) -> list[bytes]:
        return make_frames(count, SIZES[size], self.options.folder, self.options.seed)

    @functools.cached_property
    def eight_bits(self) -> Captioner | None:
        """The same captioner with int8 weights, where that is possible."""
        if self.options.device.type != "cpu" or self.options.dtype is not torch.float32:
            return None
        captioner = copy.deepcopy(self.captioner)
        use_eight_bits(captioner.encoder)
        use_eight_bits(captioner.decoder)
        return captioner

    @functools.cached_property
    def gpt2(self) -> Any:
        return peers.gpt2(self.decoder)

    @functools.cached_property
    def clip(self) -> Any:
        return peers.clip_vision(self.encoder)

    @functools.cached_property
    def prefixes(self) -> Tensor:
        """One prefix a frame: from the bridge for real weights, drawn for random ones."""
        count = self.options.frames
        if self.random:
            length = self.captioner.config.bridge.prefix_length
            return random_prefixes(self.decoder, count, length, self.options.seed)
        pixels = np.stack(_crop(self, self.jpegs("720p", count), "exact"))
        return self.bridge(self.captioner.features(pixels))

    @torch.inference_mode()
    def bridge(self, features: ImageFeatures) -> Tensor:
        prefix, _ = self.captioner.bridge(features)
        return prefix

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each prefix's greedy caption, ``</s>`` not counted."""
        return [len(tokens) for tokens in self.ours(self.prefixes, 1)]

    def ours(self, prefixes: Tensor, beams: int, max_rows: int | None = None) -> list[list[int]]:
        """Token ids by framecap, at most ``max_rows`` sequences at a time (None: its own choice)."""
        return self.tokens(self.generator(max_rows), prefixes, beams)

    def tokens(self, generator: Generator, prefixes: Tensor, beams: int) -> list[list[int]]:
        """Token ids of each prefix's caption."""
        options = DecodeOptions(num_beams=beams, max_new_tokens=self.options.max_new_tokens)
        return [candidates[0].tokens for candidates in generator.generate(prefixes, None, options)]

    @functools.cache  # noqa: B019 (see above): it keeps its CUDA graphs from one round to the next
    def generator(self, max_rows: int | None) -> Generator:
        return Generator(self.decoder, max_rows)

    def typical(self, count: int) -> list[int]:
        """Numbers of ``count`` frames whose captions have about the mean length of all."""
        order = sorted(range(len(self.lengths)), key=lambda frame: self.lengths[frame])
        count = min(count, len(order))
        return sorted(order[int((place + 0.5) * len(order) / count)] for place in range(count))


def decode_stage(bench: Bench) -> list[Row]:
    """JPEG bytes → pixels, on one thread: exact and fast, at 1280×720 and 1920×1080."""
    rows = []
    for size in SIZES:
        frames = bench.jpegs(size, min(bench.options.frames, 16))
        rows += _decode(bench, frames, f"decode exact {size}", "exact")
        exact, fast = (np.stack(_crop(bench, frames, decode)).astype(np.int16) for decode in DECODES)
        note = f"mean difference from exact {np.abs(exact - fast).mean():.2f}/255"
        first, *others = _decode(bench, frames, f"decode fast {size}", "fast")
        rows += [replace(first, note=note), *(replace(row, agreement=None) for row in others)]
    return rows


def _crop(bench: Bench, frames: list[bytes], decode: Decode) -> list[np.ndarray]:
    return [crop_and_resize(frame, bench.captioner.resolution, decode) for frame in frames]


def _decode(bench: Bench, frames: list[bytes], stage: str, decode: Decode) -> list[Row]:
    config, count = bench.encoder.config, len(frames)

    def values(pixels: Sequence[np.ndarray]) -> Tensor:
        return normalise(torch.from_numpy(np.stack(pixels)), config.mean, config.std)

    def ours() -> list[np.ndarray]:
        return _crop(bench, frames, decode)

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
    return bench.ceilings.mark(bench.watch.compare(f"encode, batch {options.batch}", contestants), work)


def generate_stage(bench: Bench) -> list[Row]:
    """Prefixes → captions, greedy and with five beams."""
    options = bench.options
    rows: list[Row] = []
    for batch in options.batches:
        few = bench.typical(options.slow_frames) if batch == options.batch else []
        rows += _generate(bench, f"greedy, batch {batch}", bench.prefixes, batch, 1, few)
    some = bench.prefixes[bench.typical(options.beam_frames)]
    return rows + _generate(bench, f"beam 5, batch {options.batch}", some, options.batch, 5, [])


def _generate(bench: Bench, stage: str, prefixes: Tensor, batch: int, beams: int, few: list[int]) -> list[Row]:
    options, count = bench.options, len(prefixes)
    limit = options.max_new_tokens
    found: list[list[int]] = []

    def ours(max_rows: int | None = None) -> list[list[int]]:
        found[:] = bench.ours(prefixes, beams, max_rows)
        return list(found)

    def theirs(cache: str) -> list[list[int]]:
        return peers.transformers_generate(bench.gpt2, prefixes, batch, beams, limit, cache)

    contestants = [
        Contestant("framecap", count, ours, False, list),
        Contestant("framecap, as many rows", count, lambda: ours(batch * beams), False, list),
    ]
    for cache in ("dynamic", "static") if options.static_cache else ("dynamic",):
        name = f"transformers.generate, {cache} cache"
        contestants.append(Contestant(name, count, functools.partial(theirs, cache), result=list))
    if bench.eight_bits is not None and batch == options.batch:
        rounded = functools.partial(bench.tokens, Generator(bench.eight_bits.decoder), prefixes, beams)
        contestants.append(Contestant(EIGHT_BITS, count, rounded, False, list))
    if few:
        loop = functools.partial(peers.clipcap_generate, bench.gpt2, prefixes[few], limit)
        contestants.append(Contestant("ClipCap's loop", len(few), loop, result=list, subset=few))
    rows = bench.watch.compare(f"generate {stage}", contestants)
    lengths = [len(tokens) for tokens in found]
    mean = sum(lengths) / count
    rows[0] = replace(rows[0], note=f"{mean:.1f} tokens on average, {max(lengths)} at most")
    together, size = min(batch, count), options.dtype.itemsize
    work = generate_work(bench.decoder.config, prefixes.shape[1], mean, together, beams, size)
    return bench.ceilings.mark(rows, work)


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
        pixels = np.stack(_crop(bench, frames, "exact"))
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
