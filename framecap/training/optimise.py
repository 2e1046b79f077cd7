"""AdamW with warm-up and cosine, gradient clipping and loss scaling, as one optimiser object."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from framecap.training.loss import CaptionLoss
from framecap.training.settings import TrainSettings

BETAS = (0.9, 0.95)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """dtype of autocast: on a GPU ``auto`` is bf16 where it has it, else fp16; on the CPU fp32."""
    if wanted != "auto":
        return PRECISIONS[wanted]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def schedule(step: int, steps: int, warmup: float, floor: float) -> float:
    """Factor on the learning rate of ``step`` (from 0): linear warm-up, then half a cosine down to ``floor``."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


class Optimiser:
    """One step: unscale, clip, AdamW at the scheduled rate."""

    def __init__(self, model: CaptionLoss, settings: TrainSettings, steps: int, dtype: torch.dtype) -> None:
        self.settings, self.steps = settings, steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(_groups(model, settings), betas=BETAS)
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16 and device == "cuda")

    def rate(self, step: int) -> float:
        """Learning rate of the bridge at ``step``."""
        settings = self.settings
        factor = schedule(step, self.steps, settings.warmup, settings.min_learning_rate)
        return settings.learning_rate * factor

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the (scaled) loss."""
        self.scaler.scale(loss).backward()

    def step(self, step: int) -> None:
        """Update the weights with what ``backward`` gathered, and clear it."""
        factor = self.rate(step) / self.settings.learning_rate
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self.scaler.unscale_(self.adamw)
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"adamw": self.adamw.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.adamw.load_state_dict(state["adamw"])
        self.scaler.load_state_dict(state["scaler"])


def _groups(model: CaptionLoss, settings: TrainSettings) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; the decoder's own weights may have a rate of their own."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_decoder = name.startswith("decoder.") and "cross" not in name
            groups.setdefault((of_decoder, parameter.ndim > 1), []).append(parameter)
    decoder_rate = settings.decoder_learning_rate or settings.learning_rate
    found: list[dict[str, Any]] = []
    for (of_decoder, decays), parameters in groups.items():
        peak = decoder_rate if of_decoder else settings.learning_rate
        decay = settings.weight_decay if decays else 0.0
        found.append({"params": parameters, "peak": peak, "lr": peak, "weight_decay": decay})
    return found
