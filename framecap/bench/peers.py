"""What people would use instead of framecap, each in its usual form and on the same weights.

- ClipCap's loop (rmokady/CLIP_prefix_caption, notebooks/clip_prefix_captioning_inference.ipynb, ``generate2``;
  Mokady et al. 2021, arXiv:2111.09734), our own reimplementation of its algorithm: one frame at a time, the
  whole sequence through the decoder for every token, nucleus filtering over the sorted vocabulary, argmax.
- ``transformers.generate`` on ``GPT2LMHeadModel`` with a dynamic or a static cache.
- ruCLIP's image transform (``ruclip`` 0.0.2, ``processor.py``) in Pillow and torch.
- transformers' ``CLIPVisionModelWithProjection`` with SDPA attention (``transformers_clip.py``).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, GPT2Config, GPT2LMHeadModel

from framecap.model.rugpt import RuGpt


def gpt2(decoder: RuGpt) -> GPT2LMHeadModel:
    """transformers' GPT-2 with a copy of the decoder's weights, in its own memory layout."""
    ours = decoder.config
    config = GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=ours.n_positions,
        n_embd=ours.n_embd,
        n_layer=ours.n_layer,
        n_head=ours.n_head,
        n_inner=ours.n_inner,
        activation_function=ours.activation,
        layer_norm_epsilon=ours.eps,
        bos_token_id=ours.bos_token_id,
        eos_token_id=ours.eos_token_id,
        pad_token_id=ours.pad_token_id,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in _gpt2_state(decoder)}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _gpt2_state(decoder: RuGpt) -> list[tuple[str, Tensor]]:
    state = decoder.published_state()
    return [*state.items(), ("lm_head.weight", state["transformer.wte.weight"])]


def ruclip_transform(
    frames: Sequence[bytes], resolution: int, mean: Sequence[float], std: Sequence[float], threads: int = 1
) -> Tensor:
    """Encoded frames → float32 [N, 3, R, R]: convert, centred square, resize, to tensor, normalise."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def resized(frame: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(frame)).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return image.resize((resolution, resolution), Image.Resampling.BILINEAR)

    tensors = []
    with ThreadPoolExecutor(threads) as pool:
        for image in pool.map(resized, frames) if threads > 1 else map(resized, frames):
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            tensors.append(pixels.to(torch.float32).div(255).sub_(shift).div_(scale))
    return torch.stack(tensors)


@torch.inference_mode()
def transformers_generate(
    model: GPT2LMHeadModel,
    prefixes: Tensor,
    batch: int,
    num_beams: int = 1,
    max_new_tokens: int = 40,
    cache: str = "dynamic",
) -> list[list[int]]:
    """Token ids of each of ``prefixes`` [N, P, E] without ``</s>``, ``batch`` frames at a time."""
    eos = model.config.eos_token_id
    found: list[list[int]] = []
    for part in prefixes.split(batch):
        ids = model.generate(
            inputs_embeds=part,
            attention_mask=torch.ones(part.shape[:2], dtype=torch.long, device=part.device),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=eos,
            cache_implementation="static" if cache == "static" else None,
        )
        found += [row[: row.index(eos)] if eos in row else row for row in ids.tolist()]
    return found


@torch.inference_mode()
def clipcap_generate(
    model: GPT2LMHeadModel, prefixes: Tensor, max_new_tokens: int = 40, top_p: float = 0.8
) -> list[list[int]]:
    """Token ids of each of ``prefixes`` [N, P, E] without ``</s>``, as ClipCap's ``generate2`` finds them."""
    return [_clipcap_caption(model, prefix[None], max_new_tokens, top_p) for prefix in prefixes]


def _clipcap_caption(model: GPT2LMHeadModel, sequence: Tensor, max_new_tokens: int, top_p: float) -> list[int]:
    tokens: list[int] = []
    for _ in range(max_new_tokens):
        logits = model(inputs_embeds=sequence, use_cache=False).logits[:, -1]
        ordered, order = logits.sort(dim=1, descending=True)
        beyond = ordered.softmax(dim=1).cumsum(dim=1) > top_p
        beyond[:, 1:] = beyond[:, :-1].clone()
        beyond[:, 0] = False
        logits[:, order[beyond]] = float("-inf")
        token = int(logits.argmax(dim=1))
        if token == model.config.eos_token_id:
            break
        tokens.append(token)
        following = model.transformer.wte(torch.tensor([[token]], device=sequence.device))
        sequence = torch.cat((sequence, following), dim=1)
    return tokens


@torch.inference_mode()
def clip_features(model: CLIPVisionModelWithProjection, pixel_values: Tensor, batch: int) -> Tensor:
    """float32 [N, 3, R, R] → pooled features [N, D]."""
    weight = model.visual_projection.weight
    moved = (part.to(weight.device, weight.dtype) for part in pixel_values.split(batch))
    return torch.cat([model(pixel_values=part).image_embeds for part in moved])
