"""transformers' CLIP classes with a copy of an encoder's weights: the reference of tests and benchmark."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from framecap.model.ruclip import BOS_ID, EOS_ID, PAD_ID, RuClip
from framecap.model.ruclip_layout import HEAD_WIDTH

# Published name → transformers' name, as a pattern and what replaces it.
_RENAMED = [
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def clip_vision(encoder: RuClip) -> CLIPVisionModelWithProjection:
    """transformers' image tower, with SDPA attention, on the encoder's device and in its dtype."""
    config = encoder.config
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
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
    )
    return _filled(model, encoder)


def clip_text(encoder: RuClip) -> CLIPTextModelWithProjection:
    """transformers' text tower, with SDPA attention, on the encoder's device and in its dtype."""
    config = encoder.config
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
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
    )
    return _filled(model, encoder)


def _filled(model: torch.nn.Module, encoder: RuClip) -> torch.nn.Module:
    state = transformers_state(encoder.published_state())
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.to(encoder.device, encoder.dtype).eval().requires_grad_(False)


def transformers_state(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under transformers' names and in its shapes: attention in three, projections transposed."""
    state: dict[str, Tensor] = {}
    for name, tensor in published.items():
        renamed = name
        for pattern, replacement in _RENAMED:
            renamed = re.sub(pattern, replacement, renamed)
        if "in_proj_" in renamed:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                state[renamed.replace("in_proj_", f"{part}_proj.")] = third
        else:
            state[renamed] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    return state
