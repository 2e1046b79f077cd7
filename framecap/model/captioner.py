"""Captioner: frames → pixels → features → prefix → tokens → text, with published checkpoints.

Knows nothing of Ray, Parquet or shards; runs on a bare PyTorch machine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from framecap.errors import CaptionerChangedError, FrameError, SettingsError
from framecap.manifest import MANIFEST
from framecap.model.bridge import Bridge, build_bridge
from framecap.model.captioner_config import CONFIG_NAME, CaptionerConfig, check_fit
from framecap.model.devices import choose_device, choose_dtype
from framecap.model.encode import ImageEncoder, TextEncoder
from framecap.model.generate import Candidate, DecodeOptions, FrameBatch, Generator
from framecap.model.images import Frame, check_list, crop_and_resize
from framecap.model.packed import pack_linears, use_eight_bits
from framecap.model.ruclip import ImageFeatures, RuClip
from framecap.model.rugpt import RuGpt
from framecap.model.weights import load_strictly, read_state_dict
from framecap.storage import verified_copy

BRIDGE_WEIGHTS = "bridge.safetensors"
BRIDGE_PREFIX = "bridge."
CROSS_ATTENTION_PREFIX = "decoder."
# Frames that are encoded at a time and then wait for slots: as many as the decoder has (``generate.MAX_ROWS``), so
# that memory is the same from the second batch on.
CAPTION_BATCH = {"cpu": 128, "cuda": 1024}
# Scores are rounded: their last bits depend on how many rows shared a matrix product.
DECIMALS = 5
_SPOILT = "the decoder's logits are not finite; if float16 is too narrow for it, take dtype bfloat16 or float32"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Caption:
    """What the captioner says of one frame.

    ``logprob`` and ``min_logprob``: mean and lowest natural-log probability of the tokens, the closing one
    included; ``tokens``: how many were generated, without it; ``similarity``: ruCLIP cosine in [-1, 1], None
    without a text tower; ``error``: None or "kind: message"; ``candidates``: all texts, best first, when more
    than one was asked for.
    """

    text: str
    logprob: float | None = None
    min_logprob: float | None = None
    tokens: int = 0
    similarity: float | None = None
    status: str = "ok"
    error: str | None = None
    candidates: tuple[str, ...] = ()

    @classmethod
    def failed(cls, error: FrameError) -> Caption:
        """The row of a frame that could not be captioned."""
        return cls(text="", status="error", error=str(error))


class Captioner:
    """A ruCLIP encoder, a bridge and a ruGPT3 decoder on one device, for one thread at a time.

    ``framecap.model.shared`` serves several.
    """

    def __init__(
        self,
        encoder: RuClip,
        bridge: Bridge,
        decoder: RuGpt,
        config: CaptionerConfig,
        source: Path | None = None,
        manifest: bytes = b"",
    ) -> None:
        """``source``: the directory that it was loaded from, with the content of its manifest."""
        check_fit(config.bridge, encoder.config, decoder.config)
        self.encoder, self.bridge, self.decoder, self.config = encoder, bridge, decoder, config
        self._source, self.manifest = source, manifest
        self.generator = Generator(decoder)
        self._encode_images = ImageEncoder(encoder, config.bridge.feature == "patches")
        self._encode_texts = TextEncoder(encoder)

    @classmethod
    def from_pretrained(
        cls,
        uri: str | os.PathLike[str],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        expected: str | None = None,
    ) -> Captioner:
        """Load a captioner directory, local or at any fsspec URI (copied once per node). Its files are compared with
        the checksums of its manifest each time; ``expected``: the ``fingerprint`` that it must have.

        ``auto``: CUDA and float16 where there is a GPU, else CPU and float32. ``int8``: the matrices of a CPU's
        float32 captioner in 8 bits, faster and slightly less exact (``framecap.model.packed``).

        Raises:
            MissingFileError, ChecksumError, WeightsError, StateDictError, BridgeMismatchError: see each.
            CaptionerChangedError: another captioner is there than ``expected``, or it was replaced meanwhile.
            SettingsError: no such device or dtype here.
        """
        directory, manifest = verified_copy(uri)
        if expected not in (None, hashlib.sha256(manifest).hexdigest()):
            raise CaptionerChangedError(os.fspath(uri))
        place = choose_device(device)
        weights = choose_dtype(dtype, place)
        kind = torch.float32 if weights is torch.int8 else weights
        config = CaptionerConfig.from_file(directory / CONFIG_NAME)
        encoder = RuClip.from_pretrained(directory / "encoder", place, kind)
        crosses = config.bridge.kind == "cross_attention"
        decoder = RuGpt.from_pretrained(directory / "decoder", place, kind, cross_attention=crosses)
        check_fit(config.bridge, encoder.config, decoder.config)
        bridge = build_bridge(config.bridge)
        load_bridge(directory / BRIDGE_WEIGHTS, bridge, decoder)
        if (directory / MANIFEST).read_bytes() != manifest:  # the folder was replaced while it was read
            raise CaptionerChangedError(os.fspath(uri))
        pack_linears(bridge)
        if weights is torch.int8:
            use_eight_bits(encoder)
            use_eight_bits(decoder)
        return cls(encoder, bridge.to(place, kind).eval(), decoder, config, directory, manifest)

    @property
    def resolution(self) -> int:
        """Side of the encoder's square input, in pixels."""
        return self.encoder.config.image_resolution

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.device

    @property
    def fingerprint(self) -> str:
        """sha256 of manifest.json, so of every file of the captioner directory, as it was loaded.

        Raises:
            SettingsError: the captioner was not loaded from a directory.
        """
        self._directory()
        return hashlib.sha256(self.manifest).hexdigest()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Copy the captioner's files, as published, to a local folder that is absent or empty."""
        target = Path(directory)
        if target.exists() and any(target.iterdir()):
            raise SettingsError(f"{target} is not empty; give a folder that does not exist yet")
        shutil.copytree(self._directory(), target, dirs_exist_ok=True)

    def caption(self, frames: Sequence[Frame], options: DecodeOptions | None = None) -> list[Caption]:
        """One caption per frame, in order. A frame that cannot be used gets ``status == "error"``.

        ``frames``: encoded bytes, paths, PIL images or uint8 arrays [H, W, 3], in any mixture.

        Raises:
            SettingsError: ``frames`` is one picture instead of a list.
        """
        check_list(frames, "frames")
        options = self.checked(options or DecodeOptions())
        captions: dict[int, Caption] = {}
        in_flight: dict[FrameBatch, tuple[list[int], Tensor]] = {}

        def encoded(start: int, chosen: Sequence[Frame]) -> FrameBatch | None:
            """One batch; of its pixels nothing is kept while it is decoded."""
            results = dict(enumerate(self._pixels(chosen), start))
            good = {place: pixels for place, pixels in results.items() if not isinstance(pixels, FrameError)}
            captions.update({p: Caption.failed(e) for p, e in results.items() if isinstance(e, FrameError)})
            if not good:
                return None
            pixels = np.stack(list(good.values()))
            features = self.features(pixels)
            batch = self.frame_batch(features, _seeds(pixels, options))
            in_flight[batch] = list(good), features.pooled
            return batch

        size = CAPTION_BATCH[self.device.type]
        batches = (encoded(start, frames[start : start + size]) for start in range(0, len(frames), size))
        # The next batch enters as the captions of this one end, so that none drains alone.
        for batch in self.generator.stream(filter(None, batches), options, len(frames)):
            places, pooled = in_flight.pop(batch)
            captions.update(zip(places, self.to_captions(batch.candidates, pooled, options, True), strict=True))
        return [captions[place] for place in range(len(frames))]

    @torch.inference_mode()
    def caption_pixels(
        self,
        pixels: np.ndarray,
        options: DecodeOptions | None = None,
        seeds: Sequence[int] | None = None,
        similarity: bool = True,
    ) -> list[Caption]:
        """Captions of cropped frames: uint8 [N, R, R, 3] as ``crop_and_resize`` gives.

        Without ``seeds`` a frame's sampling seed follows from ``options.seed`` and its pixels alone, so that
        neither its neighbours nor its place matter. ``similarity=False`` leaves that figure out. All features are
        held at once: the caller bounds the batch.
        """
        if not len(pixels):
            return []
        options = options or DecodeOptions()
        seeds = _seeds(pixels, options) if seeds is None else seeds
        return self.caption_features(self.features(pixels), options, seeds, similarity)

    @torch.inference_mode()
    def caption_features(
        self, features: ImageFeatures, options: DecodeOptions, seeds: Sequence[int], similarity: bool = True
    ) -> list[Caption]:
        """Captions of frames that ``features`` has encoded, a seed for each; see ``caption_pixels``."""
        options = self.checked(options)
        batch = self.frame_batch(features, seeds)
        candidates = self.generator.generate(batch.prefix, batch.memory, options, batch.seeds)
        return self.to_captions(candidates, features.pooled, options, similarity)

    def checked(self, options: DecodeOptions) -> DecodeOptions:
        """``options`` with the captioner's own stop texts unless they have some. Raises SettingsError."""
        if options.rerank and not self.encoder.has_text:
            raise SettingsError("rerank needs a ruCLIP with a text tower; this captioner's encoder has none")
        return options if options.stop else replace(options, stop=self.config.stop)

    @torch.inference_mode()
    def frame_batch(self, features: ImageFeatures, seeds: Sequence[int]) -> FrameBatch:
        """Frames that ``features`` has encoded, as the decoder takes them; a seed for each."""
        prefix, memory = self.bridge(features)
        return FrameBatch(prefix, memory, list(seeds))

    def to_captions(
        self, candidates: list[list[Candidate]], pooled: Tensor, options: DecodeOptions, similarity: bool
    ) -> list[Caption]:
        """What the decoder wrote for each frame, best first, and the frames' pooled features [N, D] → captions."""
        wanted = (similarity or options.rerank) and self.encoder.has_text
        scores = self._similarities(candidates, pooled) if wanted else None
        captions = []
        for row, ranked in enumerate(candidates):
            order = list(range(len(ranked)))
            if options.rerank and scores is not None:
                order.sort(key=lambda i: -scores[row][i])
            best = ranked[order[0]]
            if best.is_spoilt:
                captions.append(Caption.failed(FrameError("model", _SPOILT)))
                continue
            captions.append(
                Caption(
                    text=best.text,
                    logprob=round(best.logprob, DECIMALS),
                    min_logprob=round(best.min_logprob, DECIMALS),
                    tokens=len(best.tokens),
                    similarity=round(scores[row][order[0]], DECIMALS) if scores is not None and similarity else None,
                    status="truncated" if best.truncated else "ok",
                    candidates=tuple(ranked[i].text for i in order) if len(ranked) > 1 else (),
                )
            )
        return captions

    def features(self, pixels: np.ndarray | Tensor) -> ImageFeatures:
        """Cropped frames uint8 [N, R, R, 3] → the encoder's pooled [N, D] and patch [N, P + 1, W] features.

        ``pixels`` may be what ``transfer.pinned`` has made of an array. Patch features are many: without a bridge that
        reads them none are kept ([0, P + 1, W]).
        """
        features = self._encode_images(pixels)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once a call, so that whoever takes the time knows the encoder's
        return features

    def embed_images(self, frames: Sequence[Frame]) -> np.ndarray:
        """ruCLIP embeddings of frames, float32 [N, D], L2-normalised.

        Raises:
            FrameError: a frame is bad.
            SettingsError: ``frames`` is one picture instead of a list.
        """
        check_list(frames, "frames")
        parts = []
        for chunk in _chunks(frames, CAPTION_BATCH[self.device.type]):
            pixels = []
            for result in self._pixels(chunk):
                if isinstance(result, FrameError):
                    raise result
                pixels.append(result)
            parts.append(unit(self.features(np.stack(pixels)).pooled))
        return _rows(parts, self.encoder.config.embed_dim)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """ruCLIP embeddings of texts, float32 [N, D], L2-normalised.

        Raises:
            CaptionerError: the encoder has no text tower.
            SettingsError: ``texts`` is one string instead of a list.
        """
        check_list(texts, "texts")
        ids = self.encoder.tokenize(texts)
        return unit(self._encode_texts(ids)) if texts else _rows([], self.encoder.config.embed_dim)

    def _directory(self) -> Path:
        if self._source is None:
            raise SettingsError(
                "this captioner was not loaded from a directory; assemble it with framecap.model.convert"
            )
        return self._source

    def _pixels(self, frames: Sequence[Frame]) -> list[np.ndarray | FrameError]:
        """Frames → their pixels uint8 [R, R, 3], or what is wrong with them."""

        def cropped(frame: Frame) -> np.ndarray | FrameError:
            try:
                return crop_and_resize(frame, self.resolution)
            except FrameError as error:
                return error

        if len(frames) == 1:
            return [cropped(frames[0])]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(cropped, frames))

    def _similarities(self, candidates: list[list[Candidate]], pooled: Tensor) -> list[list[float]]:
        texts = [candidate.text for ranked in candidates for candidate in ranked]
        counts = [len(ranked) for ranked in candidates]
        images = np.repeat(unit(pooled), counts, axis=0)
        scores = iter((images * self.embed_texts(texts)).sum(axis=1).tolist())
        return [[next(scores) for _ in range(count)] for count in counts]


def load_bridge(path: Path, bridge: Bridge, decoder: RuGpt) -> None:
    """Load bridge.safetensors strictly: ``bridge.*`` into the bridge, ``decoder.*`` into cross-attention layers."""
    load_bridge_state(read_state_dict(path), bridge, decoder, path)


def load_bridge_state(state: Mapping[str, Tensor], bridge: Bridge, decoder: RuGpt, source: str | Path) -> None:
    """``load_bridge`` of tensors that were read already; ``source`` is what errors call them."""
    crossing = {name: tensor for name, tensor in state.items() if name.startswith(CROSS_ATTENTION_PREFIX)}
    own = {name.removeprefix(BRIDGE_PREFIX): tensor for name, tensor in state.items() if name not in crossing}
    load_strictly(bridge, own, source)
    decoder.load_cross_attention_state(crossing, source)


def frame_seed(pixels: np.ndarray, seed: int) -> int:
    """A 63-bit sampling seed from a frame's own pixels and the run's seed."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big") >> 1


def _seeds(pixels: np.ndarray, options: DecodeOptions) -> list[int]:
    return [frame_seed(frame, options.seed) if options.do_sample else 0 for frame in pixels]


def describe_image(frame: Frame) -> str:
    """A Russian description of one frame by the bundled captioner, or the one at ``$FRAMECAP_CAPTIONER``.

    Raises FrameError when the frame cannot be used.
    """
    caption = _described_by(os.environ.get("FRAMECAP_CAPTIONER") or bundled_captioner()).caption([frame])[0]
    if caption.error is not None:
        kind, _, message = caption.error.partition(": ")
        raise FrameError(kind, message)
    return caption.text


def bundled_captioner() -> str:
    """Path of the mini captioner that ships inside the package."""
    return str(Path(__file__).parent.parent / "demo" / "mini")


@functools.lru_cache(maxsize=1)
def _described_by(uri: str) -> Captioner:
    return Captioner.from_pretrained(uri)


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def unit(embeddings: Tensor) -> np.ndarray:
    """float32 [N, D] on the host, L2-normalised."""
    return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()


def _rows(parts: list[np.ndarray], width: int) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
