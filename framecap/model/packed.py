"""Linear layers over weights packed for the CPU's matrix kernels.

oneDNN, which torch brings along, multiplies by weights laid out in its own blocks; ``torch.compile`` packs them
so when it freezes a model (torch 2.13, ``torch/_inductor/mkldnn_lowerings.py``). Measured on an EPYC (AVX-512), one
thread, fp32, GPT-2-small's shapes with 8 to 128 rows: 1.2 to 2.4 times as fast as MKL on plain weights. The packed
copy doubles the memory of a layer; it exists only where gradients are off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TYPICAL_ROWS = 32  # the layout is chosen for about so many
_LEAST_WEIGHTS = 2**18  # a call costs 0.04 ms more than one of MKL: smaller layers stay as they are


class PackedWeight:
    """``weight`` [out, in] of a float32 layer on the CPU, packed when it is first used and again when it changes."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._made_of: tuple[int, int] = (0, 0)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x`` [..., in] times ``weight``, plus ``bias`` [out] → [..., out]; differentiable where gradients are on."""
        if torch.is_grad_enabled() or not _suits(x, weight):
            self._packed = None
            return F.linear(x, weight, bias)
        source, packed = (weight.data_ptr(), 0 if weight.is_inference() else weight._version), self._packed
        if packed is None or source != self._made_of:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _TYPICAL_ROWS)
            self._packed, self._made_of = packed, source
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()  # what is packed can be neither copied nor pickled, only packed again


class PackedLinear(nn.Linear):
    """``nn.Linear`` with the same parameters and names, over a ``PackedWeight``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._weight = PackedWeight()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return self._weight.linear(x, self.weight, self.bias)


def pack_linears(model: nn.Module) -> None:
    """Put a ``PackedLinear`` with the same parameters in the place of every plain ``nn.Linear`` of ``model``."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                with torch.device("meta"):
                    packed = PackedLinear(child.in_features, child.out_features, child.bias is not None)
                packed.weight, packed.bias = child.weight, child.bias
                setattr(parent, name, packed.train(child.training))


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == x.dtype == torch.float32
        and weight.numel() >= _LEAST_WEIGHTS
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
