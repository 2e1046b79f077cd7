"""A bridge and a decoder that together read features and write captions: built, scored, decoded greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from framecap.model.bpe import GptTokenizer
from framecap.model.bridge import Bridge, BridgeConfig, build_bridge
from framecap.model.ruclip import ImageFeatures, RuClipConfig
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig

POSITIONS = 128
IGNORED = -100


@dataclass(frozen=True)
class TokenRows:
    """Captions as ids int64 [N, L], padded; ``targets`` has ``</s>`` and IGNORED after it."""

    ids: Tensor
    targets: Tensor


def token_rows(tokenizer: GptTokenizer, captions: Sequence[str], eos: int) -> TokenRows:
    """Captions → ids with ``</s>`` at the end, padded to the longest."""
    rows = [[*tokenizer.encode(caption), eos] for caption in captions]
    length = max(len(row) for row in rows)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for target, row in zip(targets, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return TokenRows(targets.clamp(min=0), targets)


def new_decoder(tokenizer: GptTokenizer, cross_attention: bool, layers: int = 2, width: int = 128) -> RuGpt:
    """A ruGPT3-shaped decoder with random weights, in training mode."""
    special = {role: tokenizer.special_id(f"{role}_token") for role in ("bos", "eos", "pad")}
    config = RuGptConfig(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=width, n_layer=layers, n_head=width // 64,
        bos_token_id=special["bos"], eos_token_id=special["eos"], pad_token_id=special["pad"],
        cross_attention=cross_attention,
    )  # fmt: skip
    return RuGpt.from_config(config, tokenizer).train()


def new_bridge(kind: str, config: RuClipConfig, decoder: RuGpt, prefix_length: int = 6) -> Bridge:
    """An untrained bridge between these two."""
    if kind == "cross_attention":
        return build_bridge(
            BridgeConfig(kind, config.vision_width, decoder.config.n_embd, prefix_length=1, feature="patches")
        )
    return build_bridge(BridgeConfig(kind, config.embed_dim, decoder.config.n_embd, prefix_length))


def _first_inputs(bridge: Bridge, decoder: RuGpt, features: ImageFeatures) -> tuple[Tensor, Tensor | None]:
    """What the decoder reads before the caption [N, P, E], and its memory."""
    prefix, memory = bridge(features)
    if prefix is None:
        bos = torch.full((len(features.pooled), 1), decoder.config.bos_token_id or 0, device=decoder.device)
        prefix = decoder.embed(bos)
    return prefix, memory


def caption_loss(bridge: Bridge, decoder: RuGpt, features: ImageFeatures, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy per token of ``targets`` [N, L]."""
    prefix, memory = _first_inputs(bridge, decoder, features)
    inputs = torch.cat([prefix, decoder.embed(ids[:, :-1]).to(prefix.dtype)], dim=1)
    logits = decoder.forward_train(inputs, None, memory)[:, prefix.shape[1] - 1 :]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def greedy(bridge: Bridge, decoder: RuGpt, features: ImageFeatures, length: int = 40) -> list[str]:
    """Captions by plain greedy decoding without a cache: a check during training, not the captioning path."""
    inputs, memory = _first_inputs(bridge, decoder, features)
    ids = torch.empty((len(inputs), 0), dtype=torch.int64)
    for _ in range(length):
        following = decoder.forward_train(inputs, None, memory)[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], dim=1)
        inputs = torch.cat([inputs, decoder.embed(following)[:, None]], dim=1)
    eos = decoder.config.eos_token_id
    rows = [row[: row.index(eos)] if eos in row else row for row in ids.tolist()]
    return [decoder.tokenizer.decode(row) for row in rows]


class CaptionReader:
    """A bridge with its decoder."""

    def __init__(self, bridge: Bridge, decoder: RuGpt) -> None:
        self.bridge, self.decoder = bridge, decoder

    @classmethod
    def new(cls, kind: str, config: RuClipConfig, tokenizer: GptTokenizer) -> CaptionReader:
        """Both with random weights, for an encoder of this shape."""
        decoder = new_decoder(tokenizer, kind == "cross_attention")
        return cls(new_bridge(kind, config, decoder), decoder)

    def token_rows(self, captions: Sequence[str]) -> TokenRows:
        """Captions as ids and targets."""
        return token_rows(self.decoder.tokenizer, captions, self.decoder.config.eos_token_id or 0)

    def loss(self, features: ImageFeatures, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy per token."""
        return caption_loss(self.bridge, self.decoder, features, ids, targets)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights of both."""
        return {"bridge": self.bridge.state_dict(), "decoder": self.decoder.state_dict()}

    def start_from(self, path: Path) -> None:
        """Take over what fits of a state saved during the encoder's training: always the language, and the
        whole of it where the bridge is of the same kind. Without the file, nothing changes."""
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        own = self.decoder.state_dict()
        language = {name: tensor for name, tensor in state["decoder"].items() if name in own}
        self.decoder.load_state_dict(language)
        if self.bridge.state_dict().keys() == state["bridge"].keys():
            self.bridge.load_state_dict(state["bridge"])
