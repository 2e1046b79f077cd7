"""The ``host`` stage: frames per second that the actor's own Python allows, with a device that answers at once.

The caption actor runs as in the job, from a block of pixels to a fragment on local storage and a record, on three
chunks at a time. Only encoder, bridge and decoder are stand-ins: features are zeros, and a step looks the next token up
in a table, so that captions have lengths drawn from a seed, of mean 14. Imports Ray (for the actor's metrics, without
starting it) and pyarrow.
"""

from __future__ import annotations

import cProfile
import itertools
import pickle
import pstats
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from framecap.bench.measure import CLOCKS, Clock
from framecap.bench.random_captioner import draw_lengths
from framecap.model.bpe import GptTokenizer
from framecap.model.bridge_config import BridgeConfig
from framecap.model.captioner import Captioner, bundled_captioner
from framecap.model.captioner_config import CaptionerConfig
from framecap.model.decode_options import DecodeOptions
from framecap.model.encode import ImageEncoder
from framecap.model.generate import Generator
from framecap.model.ruclip import ImageFeatures, RuClip
from framecap.model.ruclip_layout import RuClipConfig
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.yttm import YttmTokenizer
from framecap.pipeline.plan import Piece
from framecap.pipeline.read import CHUNK_SCHEMA, ChunkFrames
from framecap.pipeline.records import ActorOptions
from framecap.pipeline.stages import CaptionActor

ROWS, CHUNKS, CALLS = 1024, 24, 3  # of a chunk, of a run, at a time: as on a GPU
PACKAGE = Path(__file__).parents[1]
_WIDTH = 64  # of features and embeddings
_PREFIX, _WORDS = 10, 63
_DEPTH = 12  # of calls among libraries
_LIKELY = 20.0  # the logit of the token to come


class InstantDecoder:
    """What the engine needs of ``RuGpt``; the next token follows from the last one and its place.

    Each word belongs to captions of one length, and is followed by another of that length until ``</s>``.
    """

    dtype, device, has_tokenizer = torch.float32, torch.device("cpu"), True

    def __init__(self, seed: int) -> None:
        self.tokenizer = _few_words()
        size, eos = len(self.tokenizer), self.tokenizer.special_id("eos_token")
        self.config = RuGptConfig(size, 128, _WIDTH, 1, 1, eos_token_id=eos)
        self.wte = SimpleNamespace(weight=torch.zeros(size, _WIDTH))
        self._logits = torch.eye(size) * _LIKELY
        self._lengths, self._following = draw_lengths(size, seed), torch.arange(size)
        for length in self._lengths.unique():
            same = (self._lengths == length).nonzero()[:, 0]
            self._following[same] = same.roll(1)
        picks = torch.randint(1, size, (4096,), generator=torch.Generator().manual_seed(seed))
        self._first = itertools.cycle(picks.tolist())

    def check_positions(self, read: int, new: int) -> None:
        """Every length is taken."""

    def new_cache(self, slots: int, max_len: int, memory_len: int = 0) -> InstantCache:
        return InstantCache()

    def prefill(self, prefix: Tensor, *_: object) -> Tensor:
        """Logits [n, V] of first tokens as they were drawn."""
        return self._logits[list(itertools.islice(self._first, len(prefix)))]

    def decode_one_token(self, ids: Tensor, positions: Tensor, *_: object) -> Tensor:
        """ids int64 [n, 1] at positions int64 [n] → logits [n, 1, V]."""
        ended = positions[:, None] - _PREFIX + 1 >= self._lengths[ids]
        return self._logits[self._following[ids].masked_fill_(ended, self.config.eos_token_id or 0)]


def _few_words() -> GptTokenizer:
    """``</s>`` and the last words of the bundled captioner's vocabulary: a step over more would take time here."""
    whole = GptTokenizer.from_pretrained(Path(bundled_captioner()) / "decoder").tokenizer.get_vocab()
    words = [word for word in sorted(whole, key=whole.__getitem__) if word.startswith("Ġ")][-_WORDS:]
    tokens = {token: index for index, token in enumerate(("</s>", *words))}
    return GptTokenizer.from_vocabulary(tokens, [], {"eos_token": "</s>"})


class InstantCache:
    """A KV cache that holds nothing."""

    def move(self, *_: object) -> None: ...

    def start_step(self, *_: object) -> None: ...


class InstantEncoder:
    """What a captioner needs of ``RuClip``: zeros for features, the real tokenizer for texts."""

    dtype, device, has_text = torch.float32, torch.device("cpu"), True

    def __init__(self, resolution: int) -> None:
        self.config = RuClipConfig(_WIDTH, resolution, 1, _WIDTH, 32)
        self.tokenizer = YttmTokenizer.from_file(Path(bundled_captioner()) / "encoder" / "bpe.model")
        self.vision, self.text = InstantVision(), InstantText()

    tokenize = RuClip.tokenize


class InstantVision:
    """Pixels → zeros."""

    positional_embedding = torch.zeros(2, _WIDTH)

    def __call__(self, pixels: Tensor, with_patches: bool) -> tuple[Tensor, None]:
        return torch.zeros(len(pixels), _WIDTH), None


class InstantText:
    """Ids → zeros."""

    positional_embedding = torch.zeros(77, _WIDTH)

    def __call__(self, ids: Tensor, ends: Tensor) -> Tensor:
        return torch.zeros(len(ids), _WIDTH)


class InstantBridge:
    """Features → a prefix of zeros."""

    def __call__(self, features: ImageFeatures) -> tuple[Tensor, None]:
        return torch.zeros(1, _PREFIX, _WIDTH).expand(len(features.pooled), -1, -1), None


def instant_captioner(resolution: int, rows: int, seed: int = 0) -> Captioner:
    """A captioner of stand-ins, which encodes and decodes in batches as on a GPU."""
    encoder, bridge, decoder = _stand_ins(resolution, seed)
    captioner = Captioner(encoder, bridge, decoder, CaptionerConfig(BridgeConfig("mlp", _WIDTH, _WIDTH, _PREFIX)))
    captioner.generator = Generator(decoder, rows, static=True)
    captioner._encode_images = ImageEncoder(encoder, False, frames=256)
    return captioner


def _stand_ins(resolution: int, seed: int) -> tuple[Any, Any, Any]:
    return InstantEncoder(resolution), InstantBridge(), InstantDecoder(seed)


def chunk_blocks(rows: int, chunks: int, resolution: int, seed: int = 0) -> Iterator[pa.Table]:
    """``CHUNK_SCHEMA``: blocks of ``rows`` frames that all differ by their digests; their pixels are the same zeros."""
    pixels = pa.py_buffer(np.zeros((rows, resolution, resolution, 3), np.uint8))
    ends = pa.py_buffer(np.array([0, pixels.size], np.int64))
    random = np.random.default_rng(seed)
    for chunk in range(chunks):
        piece = Piece(f"shard-{chunk:05d}.parquet", "size-mtime", 0, rows)
        digests = [random.bytes(32) for _ in range(rows)]
        frames = ChunkFrames((piece,), list(range(rows)), [0] * rows, digests, groups=[None] * rows)
        images = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pixels])
        yield pa.Table.from_arrays([pa.array([pickle.dumps(frames)], pa.binary()), images], schema=CHUNK_SCHEMA)


def run_actor(rows: int, chunks: int, resolution: int, similarity: bool, clock: Clock, seed: int = 0) -> float:
    """Caption ``chunks`` of ``rows`` frames; frames per second, after a chunk to warm up."""
    now = CLOCKS[clock]
    blocks = list(chunk_blocks(rows, chunks + 1, resolution, seed))
    with tempfile.TemporaryDirectory(prefix="framecap-host-") as folder:
        options = ActorOptions("", folder, "f" * 64, DecodeOptions(), batch_size=rows, similarity=similarity)
        actor = CaptionActor(options, instant_captioner(resolution, rows, seed))
        actor(blocks.pop())
        with ThreadPoolExecutor(CALLS) as calls:
            begun = now()
            for _ in calls.map(actor, blocks):
                pass
            return rows * chunks / (now() - begun)


def host_table(resolution: int, repeats: int, clock: Clock, rows: int = ROWS, chunks: int = CHUNKS) -> str:
    """Frames/s of the host alone, with and without similarity, and the modules in which its CPU time goes."""
    what = f"host, chunks of {rows}, {CALLS} at a time, {resolution} pixels wide, {clock} clock"
    lines = [f"| {what} | frames/s | all rounds |", "|---|---|---|"]
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for similarity, found in rates.items():
            found.append(run_actor(rows, chunks, resolution, similarity, clock))
    for similarity, found in rates.items():
        name = "captions with similarity" if similarity else "captions"
        rounds = ", ".join(f"{rate:,.0f}" for rate in found)
        lines.append(f"| {name} | {float(np.median(found)):,.0f} | {rounds} |")
    with profiled() as profiles:
        run_actor(rows, chunks, resolution, True, clock)
    shares = by_module(profiles)
    total = sum(shares.values())
    heading = "| CPU time, with similarity, by module of framecap; libraries count for their caller | share |"
    lines += ["", heading, "|---|---|"]
    lines += [f"| {module} | {seconds / total:.1%} |" for module, seconds in shares.most_common(14)]
    return "\n".join(lines)


@contextmanager
def profiled() -> Iterator[list[cProfile.Profile]]:
    """Profiles the CPU time of this thread and of all that are started within, one profile each."""
    profiles: list[cProfile.Profile] = []

    def begin(*_: object) -> None:
        sys.setprofile(None)
        profile = cProfile.Profile(time.thread_time)
        profiles.append(profile)
        profile.enable()

    threading.setprofile(begin)
    begin()
    try:
        yield profiles
    finally:
        threading.setprofile(None)
        profiles[0].disable()


def by_module(profiles: list[cProfile.Profile]) -> Counter[str]:
    """Seconds by module of framecap; what a library or the interpreter used counts for whoever called it."""
    stats: Any = pstats.Stats(profiles[0])
    for profile in profiles[1:]:
        stats.add(profile)
    calls: dict[Any, Any] = {function: callers for function, (*_, callers) in stats.stats.items()}
    owners = {function: _module(function) for function in calls}
    shares = {function: Counter({owner: 1.0} if owner else {}) for function, owner in owners.items()}
    for _ in range(_DEPTH):
        shares = {
            function: shares[function] if owners[function] else _of_callers(callers, shares)
            for function, callers in calls.items()
        }
    found: Counter[str] = Counter()
    for function, (_, _, seconds, _, _) in stats.stats.items():
        for module, share in (shares[function] or {"threads and start": 1.0}).items():
            found[module] += share * seconds
    return found


def _module(function: Any) -> str:
    """The module of framecap in which a profiled function stands, or nothing."""
    path = Path(function[0])
    if path == Path(__file__):
        return "the stand-ins and this benchmark"
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""


def _of_callers(callers: dict[Any, Any], shares: dict[Any, Counter[str]]) -> Counter[str]:
    """The shares of a function's callers, each weighted by the time that the function took for it."""
    weight = sum(times[3] for times in callers.values())
    found: Counter[str] = Counter()
    for caller, times in callers.items() if weight else ():
        for module, share in shares[caller].items():
            found[module] += share * times[3] / weight
    return found
