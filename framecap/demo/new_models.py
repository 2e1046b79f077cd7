"""The mini captioner's parts before they have learnt anything: ruCLIP encoder, ruGPT3 decoder, first reader."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from framecap.demo.tokens import train_gpt_tokenizer, train_yttm
from framecap.model.bridge import build_bridge
from framecap.model.bridge_config import BridgeConfig
from framecap.model.ruclip import RuClip, RuClipConfig
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.training.loss import CaptionLoss

RESOLUTION, PATCH = 96, 12
GRID = RESOLUTION // PATCH
VOCABULARY_CAPTIONS = 20_000  # captions that both vocabularies are learnt from


def new_encoder(captions: Sequence[str], seed: int) -> RuClip:
    """An untrained ruCLIP of the mini captioner's shape, with a YouTokenToMe vocabulary learnt from ``captions``."""
    yttm = train_yttm(captions[:VOCABULARY_CAPTIONS], 700)
    config = RuClipConfig(
        embed_dim=192, image_resolution=RESOLUTION, vision_layers=4, vision_width=128,
        vision_patch_size=PATCH, context_length=40, vocab_size=yttm.vocab_size,
        transformer_width=128, transformer_heads=2, transformer_layers=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return RuClip.from_config(config, yttm)


def new_reader(captions: Sequence[str], encoder: RuClipConfig, seed: int) -> CaptionLoss:
    """An untrained cross-attention bridge and decoder, with a byte-level BPE vocabulary learnt from ``captions``.

    They learn along with the encoder: its patches become readable, and the decoder learns the language.
    """
    tokenizer = train_gpt_tokenizer(captions[:VOCABULARY_CAPTIONS], 800)
    bos, eos, pad = (tokenizer.special_id(f"{role}_token") for role in ("bos", "eos", "pad"))
    config = RuGptConfig(
        vocab_size=len(tokenizer), n_positions=128, n_embd=128, n_layer=2, n_head=2,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, cross_attention=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    bridge = BridgeConfig("cross_attention", encoder.vision_width, config.n_embd, prefix_length=1, feature="patches")
    return CaptionLoss(build_bridge(bridge), RuGpt.from_config(config, tokenizer), tune_decoder=True).train()
