"""ruCLIP: a published checkpoint → an image tower and a text tower.

Source of the arithmetic: ``ruclip`` 0.0.2 (ai-forever/ru-clip, ``model.py``, ``processor.py``), which is
OpenAI's CLIP with YouTokenToMe ids; see ``clip_tower.py`` for the towers. Knows nothing about bridges or decoders.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from framecap.errors import CaptionerError
from framecap.model.clip_tower import ImageTower, TextTower, initialise
from framecap.model.images import Frame, check_list, preprocess
from framecap.model.ruclip_layout import RuClipConfig, config_from_shapes, openai_image_tower
from framecap.model.weights import (
    SAFETENSORS_NAME,
    check_layout,
    find_weights,
    read_state_dict,
    write_state_dict,
)
from framecap.model.yttm import YttmTokenizer, save_yttm

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "bpe.model"
TEXT_BUCKET = 8  # tokens; texts are read up to a multiple of it
# ruclip/processor.py fixes these, whatever the last line of bpe.model says.
PAD_ID, BOS_ID, EOS_ID = 0, 2, 3
VISUAL = "visual."  # the image tower's names begin so


@dataclass(frozen=True)
class ImageFeatures:
    """What a bridge may read: ``pooled`` [N, embed_dim], as ``encode_image``; ``patches`` [N, P+1,
    vision_width], hidden states after the final layer norm, class token first."""

    pooled: Tensor
    patches: Tensor

    def split(self) -> list[ImageFeatures]:
        """Each frame's own, N = 1, as views."""
        frames = range(len(self.pooled))
        return [ImageFeatures(self.pooled[n : n + 1], self.patches[n : n + 1]) for n in frames]

    @classmethod
    def join(cls, parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Those of several batches as one."""
        return cls(torch.cat([part.pooled for part in parts]), torch.cat([part.patches for part in parts]))


class RuClip(nn.Module):
    """Both towers, or the image tower alone (``has_text`` is False then).

    ``from_pretrained`` and ``from_prototype`` freeze the weights; ``from_config`` leaves them trainable.
    """

    def __init__(self, config: RuClipConfig, tokenizer: YttmTokenizer | None = None) -> None:
        super().__init__()
        config.check("RuClipConfig")
        if tokenizer is not None and config.transformer_layers and tokenizer.highest_id >= config.vocab_size:
            raise CaptionerError(
                f"bpe.model has ids up to {tokenizer.highest_id}, beyond the text tower's vocab_size "
                f"{config.vocab_size}; tokenizer and weights do not belong together."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.vision = ImageTower(config)
        self.text = TextTower(config) if config.transformer_layers else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_config(cls, config: RuClipConfig, tokenizer: YttmTokenizer | None = None) -> RuClip:
        """A trainable model with random weights (CLIP's initialisation, torch's global seed)."""
        model = cls(config, tokenizer)
        initialise(model.vision)
        if model.text is not None:
            initialise(model.text)
        return model

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> RuClip:
        """Load a checkpoint as published: ``config.json``, ``pytorch_model.bin`` or ``model.safetensors``,
        ``bpe.model``. Frozen, in eval mode, on ``device`` in ``dtype``.

        Raises MissingFileError, WeightsError, UnsafePickleError, or StateDictError with the published names.
        """
        directory = Path(directory)
        config = RuClipConfig.from_file(directory / CONFIG_NAME)
        find_weights(directory)
        tokenizer = None
        if config.transformer_layers:
            tokenizer = YttmTokenizer.from_file(directory / TOKENIZER_NAME)
        return cls._frozen(config, tokenizer, read_state_dict(directory), directory).to(device, dtype)

    @classmethod
    def from_prototype(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> RuClip:
        """Load the image tower of an OpenAI-layout checkpoint file, shapes read from its tensors.

        Understood: ``visual_encoder.model.*`` (ai-forever/ru-clip's ``ViT-B32-small.pt``), ``visual.*``
        (OpenAI's CLIP) and the bare ViT. Everything outside the image tower is left out on purpose.
        """
        state = openai_image_tower(read_state_dict(path), path)
        config = config_from_shapes(state, path)
        return cls._frozen(config, None, state, path).to(device, dtype)

    @classmethod
    def _frozen(
        cls,
        config: RuClipConfig,
        tokenizer: YttmTokenizer | None,
        state: Mapping[str, Tensor],
        source: str | Path,
    ) -> RuClip:
        with torch.device("meta"):
            model = cls(config, tokenizer)
        model._load_published(state, source)
        return model.eval().requires_grad_(False)

    @property
    def has_text(self) -> bool:
        """Whether texts can be embedded."""
        return self.text is not None and self.tokenizer is not None

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.logit_scale.dtype

    def preprocess(self, frames: Sequence[Frame]) -> Tensor:
        """Frames → float32 [N, 3, R, R] on the CPU, exactly ruCLIP's transform. Raises FrameError."""
        return preprocess(frames, self.config.image_resolution, self.config.mean, self.config.std)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels → [N, embed_dim], not normalised, as ``ruclip``.

        ``pixels``: float [N, 3, R, R] as ``preprocess`` gives, or uint8 [N, R, R, 3] as ``crop_and_resize`` gives.
        """
        return self.vision(self._placed(pixels), with_patches=False)[0]

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """Pooled and patch features in one pass through the image tower; for ``pixels`` see ``encode_image``."""
        return ImageFeatures(*self.vision(self._placed(pixels), with_patches=True))

    def _placed(self, pixels: Tensor) -> Tensor:
        """On the model's device; floats in its dtype. Raises CaptionerError for another shape than it takes."""
        side, is_raw = self.config.image_resolution, pixels.dtype is torch.uint8
        expected = [side, side, 3] if is_raw else [3, side, side]
        if list(pixels.shape[1:]) != expected:
            raise CaptionerError(
                f"{str(pixels.dtype).removeprefix('torch.')} pixels of shape {list(pixels.shape)}; "
                f"the shape after the first must be {expected}."
            )
        return pixels.to(self.device, torch.uint8 if is_raw else self.dtype)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts → int64 [N, context_length]: lower-cased, ``<bos>`` ids ``<eos>``, cut, padded with 0
        (``RuCLIPProcessor.encode_text``). Raises CaptionerError without a text tower, SettingsError for one
        string instead of a list."""
        check_list(texts, "texts")
        if self.tokenizer is None or self.text is None:
            raise _no_text_tower()
        room = self.config.context_length - 2
        encoded = [[BOS_ID, *self.tokenizer.encode(text.lower())[:room], EOS_ID] for text in texts]
        # All at once: a tensor for each text took longer than its tokens.
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        rows = np.full((len(texts), self.config.context_length), PAD_ID, np.int64)
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.fromiter(itertools.chain(*encoded), np.int64)
        return torch.from_numpy(rows)

    def encode_text(self, ids: Tensor) -> Tensor:
        """int64 [N, L] → [N, embed_dim], not normalised: the state at ``<eos>``, projected, as ``ruclip``.

        The tower is causal, so what follows ``<eos>`` is cut off (to a length that depends on the row alone): a
        caption costs what it is long, not 77 tokens. Raises CaptionerError without a text tower, and for a row
        without ``<eos>``.
        """
        if self.text is None:
            raise _no_text_tower()
        order, embeds = [], []
        for rows, part, ends in text_buckets(ids):
            order.append(rows)
            embeds.append(self.text(part.to(self.device), ends.to(self.device)))
        return torch.cat(embeds)[torch.cat(order).argsort().to(self.device)]

    def published_state(self) -> dict[str, Tensor]:
        """All weights under the names and in the shapes of the published checkpoints."""
        state = {f"{VISUAL}{name}": tensor for name, tensor in self.vision.state_dict().items()}
        if self.text is not None:
            state |= self.text.state_dict()
            state["logit_scale"] = self.logit_scale.detach()
        return state

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the published layout: ``config.json``, ``model.safetensors`` and, with a text tower,
        ``bpe.model``. Raises CaptionerError for a text tower without a tokenizer."""
        if self.text is not None and self.tokenizer is None:
            raise CaptionerError("a text tower cannot be saved without its tokenizer; set .tokenizer first.")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config.to_json(), indent=1) + "\n"
        (directory / CONFIG_NAME).write_text(config, encoding="utf-8")
        write_state_dict(directory / SAFETENSORS_NAME, self.published_state())
        if self.tokenizer is not None:
            tokenizer = self.tokenizer
            save_yttm(directory / TOKENIZER_NAME, tokenizer.char2id, tokenizer.rules, tokenizer.specials)

    def _load_published(self, state: Mapping[str, Tensor], source: str | Path) -> None:
        """Fill a model built on the meta device; StateDictError names published keys."""
        check_layout(self.published_state(), state, source)
        state = {name: tensor.float() for name, tensor in state.items()}
        logit_scale = state.pop("logit_scale", torch.tensor(math.log(1 / 0.07)))
        visual = {name.removeprefix(VISUAL): t for name, t in state.items() if name.startswith(VISUAL)}
        self.vision.load_state_dict(visual, assign=True)
        if self.text is not None:
            text = {name: tensor for name, tensor in state.items() if not name.startswith(VISUAL)}
            self.text.load_state_dict(text, assign=True)
        self.logit_scale = nn.Parameter(logit_scale)


def text_buckets(ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Texts int64 [N, L] by length, which depends on the text alone: numbers of rows [n], their ids [n, length]
    without what follows ``<eos>`` but for padding, and the place of ``<eos>`` in each [n].

    Raises CaptionerError for a row without ``<eos>``.
    """
    is_eos = ids == EOS_ID
    if not is_eos.any(dim=1).all():
        raise CaptionerError(f"every row of ids needs an <eos> ({EOS_ID}); use tokenize().")
    at_eos = is_eos.int().argmax(dim=1)
    needed = ((at_eos // TEXT_BUCKET + 1) * TEXT_BUCKET).clamp_max_(ids.shape[1])
    for length in needed.unique().tolist():
        rows = (needed == length).nonzero()[:, 0]
        yield rows, ids[rows, :length], at_eos[rows]


def _no_text_tower() -> CaptionerError:
    return CaptionerError(
        "this encoder has no text tower, so texts cannot be embedded; use a ruCLIP checkpoint with one, "
        "or turn similarity and re-ranking off."
    )
