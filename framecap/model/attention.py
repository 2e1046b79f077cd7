"""Scaled dot-product attention, and which of torch's kernels for it are used."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN's, which torch prefers on an H100: it makes a plan, of some tens of milliseconds, for each new number of
# rows or tokens (pytorch/pytorch#155958), and both change from step to step here.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def planless_attention() -> AbstractContextManager[None]:
    """A context that avoids cuDNN attention, which replans for every shape."""
    return sdpa_kernel(_BACKENDS)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """[n, Q, heads, head_dim] × [n, T, heads, head_dim] → [n, Q, E]; ``mask`` is additive [n, 1, Q, T]."""
    causal = causal and q.shape[1] > 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and q.device.type == "cpu":
        # Training in bf16: the CPU's kernel (PyTorch 2.13) goes back four to five times as fast in fp32.
        q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)
