"""Where a captioner runs, and in which numbers: what ``device`` and ``dtype`` mean on this machine."""

from __future__ import annotations

import torch

from framecap.errors import SettingsError

DEVICES = ("cpu", "cuda")
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,  # weights; everything else is float32
}


def choose_device(device: str | torch.device) -> torch.device:
    """``auto`` → the GPU if there is one, else the CPU. Raises SettingsError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"device {device!r} is unknown; use auto, cpu or cuda") from error
    if chosen.type not in DEVICES:
        raise SettingsError(f"device {str(device)!r} is not supported; use auto, cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {str(device)!r} was asked for, but no GPU is visible; use auto or cpu")
    if chosen.index not in (None, 0):  # streams, events and graphs are those of the current device
        raise SettingsError(
            f"device {str(device)!r}: set CUDA_VISIBLE_DEVICES={chosen.index} and use cuda, one GPU per process"
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """``auto`` → float16 on a GPU, float32 on the CPU. Raises SettingsError for an unknown name, and int8 on a GPU."""
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise SettingsError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if dtype is torch.int8 and device.type != "cpu":
        raise SettingsError(f"dtype int8 is for the CPU, and the device is {device.type}; use float16, or device cpu")
    return dtype
