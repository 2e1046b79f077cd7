"""ruCLIP: a published checkpoint → an image tower and a text tower in transformers' CLIP classes.

Source of the layout and the arithmetic: ``ruclip`` 0.0.2 (ai-forever/ru-clip, ``model.py``, ``processor.py``),
which is OpenAI's CLIP with YouTokenToMe ids. Knows nothing of bridges or decoders.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from framecap.errors import CaptionerError, WeightsError
from framecap.model.images import Frame, preprocess
from framecap.model.weights import (
    SAFETENSORS_NAME,
    check_layout,
    find_weights,
    read_json,
    read_state_dict,
    write_state_dict,
)
from framecap.model.yttm import YttmTokenizer, save_yttm

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "bpe.model"
# ruclip/processor.py fixes these whatever the last line of bpe.model says.
PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
HEAD_WIDTH = 64
PROTOTYPE_PREFIXES = ("visual_encoder.model.", "visual.", "")

# Published name ↔ name in transformers, tower by tower; ``attn.in_proj_*`` is the one that is also split.
_VISION_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
_TEXT_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
_BLOCK_NAMES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_2": "layer_norm2",
}
_TRANSPOSED = ("visual.proj", "text_projection")  # published [width, embed_dim], used as x @ proj
_TEXT_FIELDS = ("vocab_size", "transformer_width", "transformer_heads", "transformer_layers")


@dataclass(frozen=True)
class RuClipConfig:
    """Shapes of a ruCLIP checkpoint, under the names of its published ``config.json``.

    Image heads are ``vision_width // 64``. The text tower is absent when ``transformer_layers`` is 0.
    ``mean`` and ``std`` default to CLIP's, as in ``ruclip/processor.py``.
    """

    embed_dim: int
    image_resolution: int
    vision_layers: int
    vision_width: int
    vision_patch_size: int
    context_length: int = 77
    vocab_size: int = 0
    transformer_width: int = 0
    transformer_heads: int = 0
    transformer_layers: int = 0
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_file(cls, path: str | Path) -> RuClipConfig:
        """Read ``config.json``; CaptionerError names what it lacks, keys without a meaning here are logged."""
        content: dict[str, Any] = read_json(path)
        known = {field.name for field in fields(cls)}
        strangers = sorted(set(content) - known)
        if strangers:
            logger.warning("%s: keys without a meaning for ruCLIP: %s", path, ", ".join(strangers))
        values = {name: value for name, value in content.items() if name in known and value is not None}
        for name in ("mean", "std"):
            if name in values:
                values[name] = tuple(float(number) for number in values[name])
        try:
            config = cls(**values)
        except TypeError as error:
            raise CaptionerError(
                f"{path} is no ruCLIP config ({error}); it needs {', '.join(sorted(known))}."
            ) from None
        config.check(path)
        return config

    def check(self, source: str | Path) -> None:
        """Raise CaptionerError for shapes that no tower can have; ``source`` goes into the message."""
        shapes = {name: value for name, value in asdict(self).items() if name not in ("mean", "std")}
        needed = [name for name in shapes if name not in _TEXT_FIELDS or self.transformer_layers]
        wrong = [f"{n}={shapes[n]!r}" for n in needed if not isinstance(shapes[n], int) or shapes[n] <= 0]
        if not wrong and self.vision_width % HEAD_WIDTH:
            wrong = [f"vision_width={self.vision_width} (must be a multiple of {HEAD_WIDTH})"]
        if not wrong and self.transformer_layers and self.transformer_width % self.transformer_heads:
            wrong = [f"transformer_width={self.transformer_width} for {self.transformer_heads} heads"]
        if len(self.mean) != 3 or len(self.std) != 3:
            wrong.append("mean and std must have three numbers")
        if wrong:
            raise CaptionerError(f"{source}: impossible ruCLIP shapes: {', '.join(wrong)}.")

    def to_json(self) -> dict[str, object]:
        """The published ``config.json``: without the text tower's fields where there is no text tower."""
        content = asdict(self)
        return {
            name: value
            for name, value in content.items()
            if self.transformer_layers or name not in _TEXT_FIELDS
        }


@dataclass(frozen=True)
class ImageFeatures:
    """What a bridge may read: ``pooled`` [N, embed_dim], as ``encode_image``; ``patches`` [N, P+1,
    vision_width], hidden states after the final layer norm, class token first."""

    pooled: Tensor
    patches: Tensor


class RuClip(nn.Module):
    """Both towers, or the image tower alone (``has_text`` is False then).

    ``from_pretrained`` and ``from_prototype`` freeze the weights; ``from_config`` leaves them trainable.
    """

    def __init__(self, config: RuClipConfig, tokenizer: YttmTokenizer | None = None) -> None:
        super().__init__()
        config.check("RuClipConfig")
        self.config = config
        self.tokenizer = tokenizer
        self.vision = CLIPVisionModelWithProjection(_vision_config(config))
        self.text = CLIPTextModelWithProjection(_text_config(config)) if config.transformer_layers else None
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
        state = _openai_image_tower(read_state_dict(path), path)
        config = _config_from_shapes(state, path)
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
        (``RuCLIPProcessor.encode_text``). Raises CaptionerError without a text tower."""
        if self.tokenizer is None or self.text is None:
            raise _no_text_tower()
        room = self.config.context_length - 2
        rows = torch.full((len(texts), self.config.context_length), PAD_ID, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [BOS_ID, *self.tokenizer.encode(text.lower())[:room], EOS_ID]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode_text(self, ids: Tensor) -> Tensor:
        """int64 [N, L] → [N, embed_dim], not normalised: the state at ``<eos>``, projected, as ``ruclip``."""
        if self.text is None:
            raise _no_text_tower()
        ids = ids.to(self.device)
        states = self.text.text_model(input_ids=ids).last_hidden_state
        at_eos = (ids == EOS_ID).int().argmax(dim=1)
        return self.text.text_projection(states[torch.arange(len(ids), device=self.device), at_eos])

    def published_state(self) -> dict[str, Tensor]:
        """All weights under the names and in the shapes of the published checkpoints."""
        state = _to_published(self.vision.state_dict(), _VISION_NAMES)
        if self.text is not None:
            state |= _to_published(self.text.state_dict(), _TEXT_NAMES)
            state["logit_scale"] = self.logit_scale.detach()
        return state

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the published layout: ``config.json``, ``model.safetensors``, ``bpe.model`` (if any)."""
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
        self.vision.load_state_dict(_from_published(state, self.vision, _VISION_NAMES), assign=True)
        _restore_position_ids(self.vision)
        if self.text is not None:
            self.text.load_state_dict(_from_published(state, self.text, _TEXT_NAMES), assign=True)
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


def _published_name(name: str, names: Mapping[str, str]) -> tuple[str, int | None]:
    """transformers' name → the published one, and which third of it (q, k, v) where attention is fused."""
    head, rest = next(
        (published, name.removeprefix(ours))
        for published, ours in names.items()
        if name == ours or name.startswith(f"{ours}.")
    )
    fused = re.fullmatch(r"(\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", rest)
    if fused:
        return f"{head}{fused[1]}.attn.in_proj_{fused[3]}", "qkv".index(fused[2])
    for published, ours in _BLOCK_NAMES.items():
        rest = rest.replace(f".{ours}.", f".{published}.")
    return head + rest, None


def _to_published(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    published: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for ours, tensor in state.items():
        name, third = _published_name(ours, names)
        if third is not None:
            thirds.setdefault(name, {})[third] = tensor
            if len(thirds[name]) == 3:
                published[name] = torch.cat([thirds[name][i] for i in range(3)])
        else:
            published[name] = tensor.T if name in _TRANSPOSED else tensor
    return published


def _from_published(
    state: Mapping[str, Tensor], module: nn.Module, names: Mapping[str, str]
) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name in module.state_dict():
        published, third = _published_name(name, names)
        tensor = state[published]
        if third is not None:
            tensor = tensor.chunk(3)[third]
        ours[name] = (tensor.T if published in _TRANSPOSED else tensor).contiguous()
    return ours


def _restore_position_ids(tower: nn.Module) -> None:
    # Not part of any checkpoint, so still on the meta device after loading.
    for module in tower.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            module.register_buffer(
                "position_ids", torch.arange(ids.shape[-1]).expand((1, -1)), persistent=False
            )


def _openai_image_tower(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    for prefix in PROTOTYPE_PREFIXES:
        if f"{prefix}conv1.weight" in state:
            tower = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            return {f"visual.{name}": tensor for name, tensor in tower.items()}
    prefixes = ", ".join(f"{prefix}conv1.weight" for prefix in PROTOTYPE_PREFIXES)
    raise WeightsError(f"{source} holds no image tower in OpenAI's layout: none of {prefixes} is there.")


def _config_from_shapes(state: Mapping[str, Tensor], source: str | Path) -> RuClipConfig:
    needed = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj")
    lacking = [name for name in needed if name not in state]
    if lacking or any(state[name].dim() != dims for name, dims in zip(needed, (4, 2, 2), strict=True)):
        raise WeightsError(
            f"{source}: the shapes cannot be read from {', '.join(needed)}; lacking: {lacking}."
        )
    width, _, _, patch = state["visual.conv1.weight"].shape
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    blocks = {name.split(".")[3] for name in state if name.startswith("visual.transformer.resblocks.")}
    config = RuClipConfig(
        embed_dim=state["visual.proj"].shape[1],
        image_resolution=grid * patch,
        vision_layers=len(blocks),
        vision_width=width,
        vision_patch_size=patch,
    )
    config.check(source)
    return config


def _no_text_tower() -> CaptionerError:
    return CaptionerError(
        "this encoder has no text tower, so texts cannot be embedded; use a ruCLIP checkpoint with one, "
        "or turn similarity and re-ranking off."
    )
