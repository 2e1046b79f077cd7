"""The names and shapes of published GPT-2 weights, and of the cross-attention weights kept with a bridge."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Buffers of old checkpoints: the causal mask and its filler, which attention no longer needs.
_OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".crossattention.bias", ".crossattention.masked_bias")
_CROSS_MARKS = (".crossattention.", ".ln_cross_attn.")
# GPT-2 keeps these matrices as [in, out] (its "Conv1D"); nn.Linear keeps [out, in].
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")


def is_cross(name: str) -> bool:
    return any(mark in name for mark in _CROSS_MARKS)


def cross_name(name: str) -> str:
    layer, rest = name.removeprefix("transformer.h.").split(".", 1)
    part = rest.replace("ln_cross_attn.", "ln.").removeprefix("crossattention.")
    return f"decoder.crossattention.{layer}.{part}"


def normalise_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_OLD_BUFFERS)}
    return {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in kept.items()
    }
