"""Which of torch's attention kernels are used: those that need no plan for each new shape."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN's, which torch prefers on an H100: it makes a plan, of some tens of milliseconds, for each new number of
# rows or tokens (pytorch/pytorch#155958), and both change from step to step here.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def planless_attention() -> AbstractContextManager[None]:
    """A context in which ``scaled_dot_product_attention`` makes no plans."""
    return sdpa_kernel(_BACKENDS)
