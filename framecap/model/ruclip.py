"""ruCLIP: a published checkpoint → an image tower and a text tower in transformers' CLIP classes.

Source of the arithmetic: ``ruclip`` 0.0.2 (ai-forever/ru-clip, ``model.py``, ``processor.py``), which is
OpenAI's CLIP with YouTokenToMe ids. Knows nothing of bridges or decoders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from framecap.errors import CaptionerError
from framecap.model.images import Frame, check_list, preprocess
from framecap.model.packed import pack_linears
from framecap.model.ruclip_layout import (
    HEAD_WIDTH,
    TEXT_NAMES,
    VISION_NAMES,
    RuClipConfig,
    config_from_shapes,
    from_published,
    openai_image_tower,
    to_published,
)
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
# ruclip/processor.py fixes these whatever the last line of bpe.model says.
TEXT_BUCKET = 8  # tokens; texts are read up to a multiple of it
PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3


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
        self.vision = CLIPVisionModelWithProjection(_vision_config(config))
        self.text = CLIPTextModelWithProjection(_text_config(config)) if config.transformer_layers else None
        pack_linears(self)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_config(cls, config: RuClipConfig, tokenizer: YttmTokenizer | None = None) -> RuClip:
        """A trainable model with random weights (transformers' CLIP initialisation, torch's global seed)."""
        return cls(config, tokenizer)

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
        """[N, 3, R, R] as ``preprocess`` gives → [N, embed_dim], not normalised, as ``ruclip``."""
        return self.vision(pixel_values=pixels.to(self.device, self.dtype)).image_embeds

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """[N, 3, R, R] → pooled and patch features in one pass through the image tower."""
        out = self.vision(pixel_values=pixels.to(self.device, self.dtype))
        patches = self.vision.vision_model.post_layernorm(out.last_hidden_state)
        return ImageFeatures(pooled=out.image_embeds, patches=patches)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts → int64 [N, context_length]: lower-cased, ``<bos>`` ids ``<eos>``, cut, padded with 0
        (``RuCLIPProcessor.encode_text``). Raises CaptionerError without a text tower, SettingsError for one
        string instead of a list."""
        check_list(texts, "texts")
        if self.tokenizer is None or self.text is None:
            raise _no_text_tower()
        room = self.config.context_length - 2
        rows = torch.full((len(texts), self.config.context_length), PAD_ID, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [BOS_ID, *self.tokenizer.encode(text.lower())[:room], EOS_ID]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode_text(self, ids: Tensor) -> Tensor:
        """int64 [N, L] → [N, embed_dim], not normalised: the state at ``<eos>``, projected, as ``ruclip``.

        The tower is causal, so what follows ``<eos>`` is cut off (to a length that depends on the row alone): a
        caption costs what it is long, not 77 tokens. Raises CaptionerError without a text tower, and for a row
        without ``<eos>``.
        """
        if self.text is None:
            raise _no_text_tower()
        is_eos = ids == EOS_ID
        if not is_eos.any(dim=1).all():
            raise CaptionerError(f"every row of ids needs an <eos> ({EOS_ID}); use tokenize().")
        at_eos = is_eos.int().argmax(dim=1)
        needed = (at_eos // TEXT_BUCKET + 1) * TEXT_BUCKET
        order, embeds = [], []
        for length in needed.unique().tolist():
            rows = (needed == length).nonzero()[:, 0]
            states = self.text.text_model(input_ids=ids[rows, :length].to(self.device)).last_hidden_state
            ends = states[torch.arange(len(rows), device=self.device), at_eos[rows].to(self.device)]
            order.append(rows)
            embeds.append(self.text.text_projection(ends))
        return torch.cat(embeds)[torch.cat(order).argsort().to(self.device)]

    def published_state(self) -> dict[str, Tensor]:
        """All weights under the names and in the shapes of the published checkpoints."""
        state = to_published(self.vision.state_dict(), VISION_NAMES)
        if self.text is not None:
            state |= to_published(self.text.state_dict(), TEXT_NAMES)
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
        self.vision.load_state_dict(from_published(state, self.vision, VISION_NAMES), assign=True)
        _restore_position_ids(self.vision)
        if self.text is not None:
            self.text.load_state_dict(from_published(state, self.text, TEXT_NAMES), assign=True)
            _restore_position_ids(self.text)
        self.logit_scale = nn.Parameter(state.get("logit_scale", torch.tensor(math.log(1 / 0.07))))


def _vision_config(config: RuClipConfig) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_width // HEAD_WIDTH,
        image_size=config.image_resolution,
        patch_size=config.vision_patch_size,
        projection_dim=config.embed_dim,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        attn_implementation="sdpa",
    )


def _text_config(config: RuClipConfig) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.transformer_width,
        intermediate_size=4 * config.transformer_width,
        num_hidden_layers=config.transformer_layers,
        num_attention_heads=config.transformer_heads,
        max_position_embeddings=config.context_length,
        projection_dim=config.embed_dim,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        attn_implementation="sdpa",
    )


def _restore_position_ids(tower: nn.Module) -> None:
    # Not part of any checkpoint, so still on the meta device after loading.
    for module in tower.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.register_buffer("position_ids", torch.arange(ids.shape[-1]).expand((1, -1)), persistent=False)


def _no_text_tower() -> CaptionerError:
    return CaptionerError(
        "this encoder has no text tower, so texts cannot be embedded; use a ruCLIP checkpoint with one, "
        "or turn similarity and re-ranking off."
    )
