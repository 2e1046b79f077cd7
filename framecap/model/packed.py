"""Linear layers over weights packed for the CPU's matrix kernels, in float32 or, on request, in 8 bits.

oneDNN, which torch brings along, multiplies by weights laid out in its own blocks; ``torch.compile`` packs them
so when it freezes a model (torch 2.13, ``torch/_inductor/mkldnn_lowerings.py``). Measured on an EPYC (AVX-512), one
thread, fp32, GPT-2-small's shapes with 8 to 128 rows: 1.2 to 2.4 times as fast as MKL on plain weights. The packed
copy doubles the memory of a layer; it exists only where gradients are off.

In 8 bits (``use_eight_bits``) a weight is int8 with a scale per output, and each row of the input is rounded to int8
with a scale of its own, so that no row depends on another; products are summed exactly, in int32. On a CPU with VNNI
that is two to four times as fast again, and the copy is a quarter as large.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TYPICAL_ROWS = 32  # the layout is chosen for about so many
# Fewer go through kernels of their own, and what a row gets would differ in its last bits.
_LEAST_ROWS = 4
_LEAST_WEIGHTS = 2**18  # a call costs 0.04 ms more than one of MKL: smaller layers stay as they are


class PackedWeight:
    """``weight`` [out, in] of a float32 layer on the CPU, packed when it is first used and again when its ``identity``
    changes.

    ``scale``: products are multiplied by it before the bias is added.
    """

    def __init__(self, eight_bits: bool = False, scale: float = 1.0) -> None:
        self.eight_bits, self.scale = eight_bits, scale
        self._packed: tuple[Tensor, ...] | None = None
        self._made_of: tuple[object, ...] = ()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool = False) -> Tensor:
        """``x`` [..., in] times ``weight``, plus ``bias`` [out], through SiLU if wanted → [..., out]; differentiable
        where gradients are on."""
        if torch.is_grad_enabled():
            self._packed = None
            out = self._plain(x, weight, bias)
            return F.silu(out) if silu else out
        if x.device.type == "cpu" and 0 < (rows := x.numel() // x.shape[-1]) < _LEAST_ROWS:
            filled = F.pad(x.reshape(rows, -1), (0, 0, 0, _LEAST_ROWS - rows))
            return self.linear(filled, weight, bias, silu)[:rows].view(*x.shape[:-1], -1)
        if not _suits(x, weight):
            self._packed = None
            out = self._plain(x, weight, bias)
            return F.silu(out, inplace=True) if silu else out
        source, packed = (*identity(weight), self.eight_bits), self._packed
        if packed is None or source != self._made_of:
            scaled = weight.detach() if self.scale == 1 else weight.detach() * self.scale
            if self.eight_bits:
                packed = _round(scaled)
            else:
                plain = scaled.contiguous()
                packed = (torch.ops.mkldnn._reorder_linear_weight(plain, _TYPICAL_ROWS),)
            self._packed, self._made_of = packed, source
        if self.eight_bits:
            rounded, scale = packed
            out = _linear_in_eight_bits(x, rounded, scale, bias)
            return F.silu(out, inplace=True) if silu else out
        # oneDNN's name for SiLU is swish; it is applied while the product is in the caches.
        return torch.ops.mkldnn._linear_pointwise(x, packed[0], bias, "swish" if silu else "none", [], "")

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same by torch's own product, which scales in its accumulators: float16 is rounded once."""
        if self.scale == 1:
            return F.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        if bias is None:
            return (rows @ weight.t() * self.scale).view(*x.shape[:-1], -1)
        return torch.addmm(bias, rows, weight.t(), alpha=self.scale).view(*x.shape[:-1], -1)

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[bool, float]]:
        # What is packed can be neither copied nor pickled, only packed again.
        return PackedWeight, (self.eight_bits, self.scale)


class PackedLinear(nn.Linear):
    """``nn.Linear`` with the same parameters and names, over a ``PackedWeight``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self._weight = PackedWeight()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return self._weight.linear(x, self.weight, self.bias)


def identity(weight: Tensor) -> tuple[object, ...]:
    """What tells a weight from another tensor, and from itself before it was changed in place (but not through
    ``.data`` or in inference mode, where torch keeps no count)."""
    return (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype, weight.device)


def pack_linears(model: nn.Module) -> None:
    """Put a ``PackedLinear`` with the same parameters in the place of every plain ``nn.Linear`` of ``model``."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                with torch.device("meta"):
                    packed = PackedLinear(child.in_features, child.out_features, child.bias is not None)
                packed.weight, packed.bias = child.weight, child.bias
                setattr(parent, name, packed.train(child.training))


def use_eight_bits(model: nn.Module) -> None:
    """Let every ``PackedWeight`` of ``model`` multiply in 8 bits from now on. Its parameters stay as they are."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PackedWeight):
                value.eight_bits = True


def _round(values: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, in] → int8 [n, in] and the step of each row, float32 [n, 1]."""
    step = values.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
    return (values / step).round_().to(torch.int8), step


def _linear_in_eight_bits(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` float32 [..., in], ``weight`` int8 [out, in], ``scale`` [out, 1], ``bias`` [out] → float32 [..., out]."""
    rounded, step = _round(x.reshape(-1, x.shape[-1]))
    product = torch._int_mm(rounded, weight.t()).to(torch.float32).mul_(step)
    out = product.mul_(scale[:, 0]) if bias is None else torch.addcmul(bias, product, scale[:, 0])
    return out.view(*x.shape[:-1], len(weight))


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == x.dtype == torch.float32
        and weight.numel() >= _LEAST_WEIGHTS
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
