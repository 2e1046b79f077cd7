"""Any number of frames or texts through a ruCLIP tower, some at a time.

On a GPU every pass has the same shape, so that it is captured once as a CUDA graph, and a frame's features are the
same to the last bit whatever its neighbours: the last batch is filled up. The copy of the next batch overlaps with
the pass of the current one. On a CPU the last batch is as small as it is.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from framecap.model.attention import planless_attention
from framecap.model.cuda_graphs import CudaGraphs, Graphs
from framecap.model.packed import identity
from framecap.model.ruclip import ImageFeatures, RuClip, text_buckets
from framecap.model.transfer import ahead, index, to_device

log = logging.getLogger(__name__)

# Frames per pass. On a CPU the activations of 8 stay in its caches (32 are a seventh slower).
FRAMES = {"cpu": 8, "cuda": 256}
# Texts of one length per pass.
TEXTS = {"cpu": 32, "cuda": 64}
LEAST_FRAMES = 8  # a GPU without memory for so many has none for anything else


class ImageEncoder:
    """The image tower of ``model``; ``with_patches``: its hidden states are wanted as well.

    ``graphs``: None where passes are not captured (default: on a CPU); then the shapes vary.
    """

    def __init__(self, model: RuClip, with_patches: bool, graphs: Graphs | None = None, frames: int | None = None):
        self._model, self._with_patches = model, with_patches
        self._graphs = graphs or (CudaGraphs if model.device.type == "cuda" else None)
        self._frames = frames or FRAMES[model.device.type]
        self._made_of: tuple[object, ...] = ()

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray | Tensor) -> ImageFeatures:
        """Cropped frames uint8 [N, R, R, 3] → pooled [N, D] and patch [N, P + 1, W] features.

        ``pixels`` may be what ``transfer.pinned`` made of an array. Without ``with_patches`` there are none
        ([0, P + 1, W]).
        """
        if self._graphs is not None:
            self._prepare(self._graphs)
        pooled, patches = [], []
        batches = (pixels[at : at + self._frames] for at in range(0, len(pixels), self._frames))
        with planless_attention():
            for batch in ahead(batches, self._model.device):
                found = self._pass(batch)
                pooled.append(found[0])
                patches.append(found[1])
        return ImageFeatures(torch.cat(pooled), torch.cat(patches))

    def _pass(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features of at most ``_frames`` frames, in memory of their own."""
        if self._graphs is None:
            pooled, patches = self._model.vision(pixels, self._with_patches)
            return pooled, self._no_patches() if patches is None else patches
        rows = len(pixels)
        self._pixels[:rows].copy_(pixels)
        self._run(self._frames, 0)
        return self._pooled[:rows].clone(), self._patches[:rows].clone()

    def _no_patches(self) -> Tensor:
        positions = self._model.vision.positional_embedding
        return positions.new_empty(0, *positions.shape)

    def _prepare(self, graphs: Graphs) -> None:
        """Allocate what a pass reads and writes, and capture it, unless that was done for these very weights.

        Where the memory is too small for so many frames, half as many are taken from now on.
        """
        made_of = identity(self._model.vision.conv1.weight)
        while made_of != self._made_of:
            try:
                self._allocate()
                self._run = graphs(self._static_pass)
                with planless_attention():
                    self._run(self._frames, 0)
                self._made_of = made_of
            except torch.OutOfMemoryError as error:
                self._run, self._pixels, self._pooled, self._patches = _nothing, *3 * (torch.empty(0),)
                if self._frames // 2 < LEAST_FRAMES:
                    raise
                self._frames //= 2
                log.warning("out of memory; encoding %d frames at a time from now on: %s", self._frames, error)

    def _allocate(self) -> None:
        config, device = self._model.config, self._model.device
        side = config.image_resolution
        self._pixels = torch.zeros(self._frames, side, side, 3, dtype=torch.uint8, device=device)
        self._pooled = torch.empty(self._frames, config.embed_dim, dtype=self._model.dtype, device=device)
        tokens, width = self._model.vision.positional_embedding.shape
        rows = self._frames if self._with_patches else 0
        self._patches = torch.empty(rows, tokens, width, dtype=self._model.dtype, device=device)

    def _static_pass(self, rows: int, _: int) -> None:
        """``_pixels`` → ``_pooled`` and ``_patches``."""
        pooled, patches = self._model.vision(self._pixels[:rows], self._with_patches)
        self._pooled[:rows].copy_(pooled)
        if patches is not None:
            self._patches[:rows].copy_(patches)


class TextEncoder:
    """The text tower of ``model``; for ``graphs`` see ``ImageEncoder``."""

    def __init__(self, model: RuClip, graphs: Graphs | None = None, texts: int | None = None) -> None:
        self._model = model
        self._graphs = graphs or (CudaGraphs if model.device.type == "cuda" else None)
        self._texts = texts or TEXTS[model.device.type]
        self._made_of: tuple[object, ...] = ()

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """What ``RuClip.encode_text`` gives: int64 [N, L] on the host → [N, D]."""
        order, embeds = [], []
        with planless_attention():
            for rows, part, ends in text_buckets(ids):
                order.append(rows)
                batches = zip(part.split(self._texts), ends.split(self._texts), strict=True)
                embeds += [self._pass(ids, ends) for ids, ends in batches]
        return torch.cat(embeds)[index(torch.cat(order).argsort().tolist(), self._model.device)]

    def _pass(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Embeddings of at most ``_texts`` texts of one length, in memory of their own."""
        device, (rows, length) = self._model.device, ids.shape
        if self._graphs is None:
            return self._model.text(ids, ends)  # type: ignore[misc]
        self._prepare(self._graphs)
        self._ids[:rows, :length].copy_(to_device(ids, device))
        self._ends[:rows].copy_(to_device(ends, device))
        self._ends[rows:].zero_()  # rows that only fill up
        self._run(self._texts, length)
        return self._embeds[:rows].clone()

    def _prepare(self, graphs: Graphs) -> None:
        """Allocate what a pass reads and writes, unless that was done for these very weights."""
        config, device = self._model.config, self._model.device
        made_of = identity(self._model.text.positional_embedding)  # type: ignore[union-attr]
        if made_of != self._made_of:
            self._ids = torch.zeros(self._texts, config.context_length, dtype=torch.long, device=device)
            self._ends = torch.zeros(self._texts, dtype=torch.long, device=device)
            self._embeds = torch.empty(self._texts, config.embed_dim, dtype=self._model.dtype, device=device)
            self._run, self._made_of = graphs(self._static_pass), made_of

    def _static_pass(self, rows: int, length: int) -> None:
        """``_ids`` and ``_ends`` → ``_embeds``."""
        self._embeds[:rows].copy_(self._model.text(self._ids[:rows, :length], self._ends[:rows]))  # type: ignore[misc]


def _nothing(rows: int, _: int) -> None:
    raise RuntimeError("the encoder is not prepared")
