"""What is measured: a captioner, how much of it, and what its contestants share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framecap.bench import peers
from framecap.bench.frames import SIZES, make_frames
from framecap.bench.measure import Ceilings, Stopwatch
from framecap.bench.random_captioner import ENCODERS, CaptionerShape, random_captioner, random_prefixes
from framecap.bench.transformers_clip import clip_vision
from framecap.model.captioner import Caption, Captioner
from framecap.model.decode_options import DecodeOptions
from framecap.model.generate import FrameBatch, Generator
from framecap.model.images import Decode, crop_and_resize
from framecap.model.packed import use_eight_bits
from framecap.model.ruclip import ImageFeatures

EIGHT_BITS = "framecap, int8 weights"
NO_PEERS = "without transformers' GPT-2, which reads no memory"


@dataclass(frozen=True)
class BenchOptions:
    """How much to run. ``batches``: of ``generate``; the last also of the other stages. ``threads``: torch's on
    the CPU, and of JPEG decoding in ``captioner``."""

    frames: int
    batches: tuple[int, ...]
    beam_frames: int
    slow_frames: int
    memory_frames: int
    threads: int
    max_new_tokens: int
    pictures: str | None
    no_static_cache: bool
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.batches[-1]

    def as_settings(self) -> dict[str, Any]:
        """By the names of the flags, as JSON has them."""
        dtype = str(self.dtype).removeprefix("torch.")
        return asdict(self) | {"batches": list(self.batches), "device": str(self.device), "dtype": dtype}


class Bench:
    """A captioner, what its contestants share, and the stopwatch."""

    def __init__(
        self, captioner: Captioner | CaptionerShape, options: BenchOptions, watch: Stopwatch, ceilings: Ceilings
    ) -> None:
        self.options, self.watch, self.ceilings = options, watch, ceilings
        self.shape = captioner if isinstance(captioner, CaptionerShape) else None  # of random weights
        self.captioner = captioner if isinstance(captioner, Captioner) else self.drawn(captioner)
        self.encoder, self.decoder = self.captioner.encoder, self.captioner.decoder

    def drawn(self, shape: CaptionerShape) -> Captioner:
        """A captioner with random weights."""
        resolution = ENCODERS[shape.encoder].image_resolution
        sample = [crop_and_resize(frame, resolution) for frame in self.jpegs("720p", 8)]
        options = self.options
        return random_captioner(shape, torch.from_numpy(np.stack(sample)), options.device, options.dtype, options.seed)

    @functools.cache  # noqa: B019 (one bench lives as long as the program)
    def jpegs(self, size: str, count: int) -> list[bytes]:
        return make_frames(count, SIZES[size], self.options.pictures, self.options.seed)

    def crop(self, frames: Sequence[bytes], decode: Decode = "exact", threads: int = 1) -> list[np.ndarray]:
        """JPEG frames → uint8 [R, R, 3] each."""

        def cropped(frame: bytes) -> np.ndarray:
            return crop_and_resize(frame, self.captioner.resolution, decode)

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(cropped, frames) if threads > 1 else map(cropped, frames))

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """All frames of 1280×720 as the encoder takes them: uint8 [N, R, R, 3]."""
        return np.stack(self.crop(self.jpegs("720p", self.options.frames), threads=self.options.threads))

    def caption_pixels(self, captioner: Captioner) -> list[Caption]:
        """Greedy captions of ``pixels``, as the job makes them but for the similarity."""
        greedy, seeds = DecodeOptions(max_new_tokens=self.options.max_new_tokens), [0] * len(self.pixels)
        return captioner.caption_pixels(self.pixels, greedy, seeds, similarity=False)

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
        return clip_vision(self.encoder)

    @property
    def has_peers(self) -> bool:
        """Whether transformers' GPT-2 reads what this bridge gives: a prefix, not a memory."""
        return self.captioner.config.bridge.kind != "cross_attention"

    @functools.cached_property
    def inputs(self) -> FrameBatch:
        """What the decoder reads for each frame: from the bridge for real weights, drawn for random ones."""
        count = self.options.frames
        if self.shape is not None:
            length = self.captioner.config.bridge.prefix_length
            return FrameBatch(random_prefixes(self.decoder, count, length, self.options.seed), None, [0] * count)
        return FrameBatch(*self.bridge(self.captioner.features(self.pixels)), [0] * count)

    @torch.inference_mode()
    def bridge(self, features: ImageFeatures) -> tuple[Tensor | None, Tensor | None]:
        return self.captioner.bridge(features)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each greedy caption of ``inputs``, ``</s>`` not counted."""
        return [len(tokens) for tokens in self.tokens(Generator(self.decoder), self.inputs, 1)]

    @functools.cached_property
    def caption_lengths(self) -> list[int]:
        """The same of ``pixels``."""
        return [caption.tokens for caption in self.caption_pixels(self.captioner)]

    def tokens(self, generator: Generator, inputs: FrameBatch, beams: int) -> list[list[int]]:
        """Token ids of each frame's caption."""
        options = DecodeOptions(num_beams=beams, max_new_tokens=self.options.max_new_tokens)
        return [candidates[0].tokens for candidates in generator.generate(inputs.prefix, inputs.memory, options)]


def typical(lengths: Sequence[int], count: int) -> list[int]:
    """Numbers of ``count`` frames (at most all) whose captions are as long and as short as those of all."""
    order = sorted(range(len(lengths)), key=lambda frame: lengths[frame])
    count = min(count, len(order))
    return sorted(order[int((place + 0.5) * len(order) / count)] for place in range(count))


def pick(inputs: FrameBatch, places: list[int]) -> FrameBatch:
    """The frames with these numbers."""
    prefix, memory = (None if given is None else given[places] for given in (inputs.prefix, inputs.memory))
    return FrameBatch(prefix, memory, [inputs.seeds[place] for place in places])
