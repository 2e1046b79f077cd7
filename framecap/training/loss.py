"""What is minimised: cross entropy of a caption's tokens and its eos after what the bridge made of the image.

ClipCap's objective (Mokady et al. 2021, section 3.1), with eos trained too; for a cross-attention bridge the
caption follows bos and the decoder reads the memory. Knows nothing of optimisers, batches of files or Ray.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framecap.errors import TrainingError
from framecap.model.bridge import Bridge
from framecap.model.captioner import BRIDGE_PREFIX
from framecap.model.ruclip import ImageFeatures
from framecap.model.rugpt import RuGpt
from framecap.training.examples import IGNORED


class CaptionLoss(nn.Module):
    """Bridge and decoder as one module whose forward is the loss.

    ``tune_decoder`` False freezes the decoder, its cross-attention layers excepted: they are the bridge's.
    """

    def __init__(self, bridge: Bridge, decoder: RuGpt, tune_decoder: bool) -> None:
        super().__init__()
        if decoder.config.bos_token_id is None and bridge.config.kind == "cross_attention":
            raise TrainingError("the decoder's tokenizer has no bos token, with which a caption must begin")
        self.bridge, self.decoder = bridge, decoder
        decoder.requires_grad_(tune_decoder)
        for name, parameter in decoder.named_parameters():
            if "cross" in name:
                parameter.requires_grad_(True)

    def forward(self, features: ImageFeatures, targets: Tensor) -> Tensor:
        """Summed cross entropy (natural log, fp32 scalar) of ``targets`` int64 [B, T], padding ``IGNORED``."""
        prefix, memory = self.bridge(features)
        known = targets[:, :-1].clamp(min=0)
        if prefix is None:
            bos = torch.full_like(targets[:, :1], self.decoder.config.bos_token_id or 0)
            prefix = self.decoder.embed(bos)
        inputs = torch.cat((prefix, self.decoder.embed(known).to(prefix.dtype)), dim=1)
        # Causal attention and padding on the right: no caption token sees padding, so no mask is needed.
        hidden = self.decoder.hidden_train(inputs, memory)[:, prefix.shape[1] - 1 :]
        wanted = targets != IGNORED
        logits = self.decoder.logits(hidden[wanted])
        return F.cross_entropy(logits.float(), targets[wanted], reduction="sum")

    def bridge_state(self) -> dict[str, Tensor]:
        """What belongs into bridge.safetensors."""
        own = {BRIDGE_PREFIX + name: tensor for name, tensor in self.bridge.state_dict().items()}
        return own | self.decoder.cross_attention_state()

    def trained_state(self) -> dict[str, Tensor]:
        """Every parameter that training changes, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Copy what ``trained_state`` gave."""
        own = self.trained_state()
        if own.keys() != state.keys():
            raise TrainingError("the checkpoint holds other parameters than this run trains; use another --work-dir")
        for name, tensor in own.items():
            tensor.copy_(state[name])
