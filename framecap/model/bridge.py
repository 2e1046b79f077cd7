"""Bridges: image features → what the decoder reads, a prefix of embeddings or a memory to attend to.

Knows nothing of ruCLIP or ruGPT3 beyond two sizes. ``mlp`` and ``transformer`` are ClipCap's mappers
(rmokady/CLIP_prefix_caption, train.py; Mokady et al. 2021) with its state keys, so its checkpoints load as
they are; ``cross_attention`` feeds every layer of the decoder with all patch features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framecap.errors import CaptionerError
from framecap.model.bridge_config import BridgeConfig


class Features(Protocol):
    """What the encoder gives: ``pooled`` [N, D] and ``patches`` [N, M, W] (class token first)."""

    @property
    def pooled(self) -> Tensor: ...

    @property
    def patches(self) -> Tensor: ...


class PrefixBridge(nn.Module, ABC):
    """Base of the bridges that turn pooled features into a prefix; a subclass gives ``prefix``."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def first_layer(self) -> nn.Linear:
        """The matrix that reads the features."""

    @abstractmethod
    def prefix(self, pooled: Tensor) -> Tensor:
        """[N, D] → [N, P·E] or [N, P, E]."""

    def forward(self, features: Features) -> tuple[Tensor | None, Tensor | None]:
        """Features → (prefix [N, P, E], None)."""
        pooled = features.pooled
        if self.config.normalize_features:
            pooled = F.normalize(pooled, dim=-1)
        shape = (pooled.shape[0], self.config.prefix_length, self.config.decoder_size)
        return self.prefix(pooled).view(shape), None


class MlpBridge(PrefixBridge):
    """ClipCap's MLP: D → P·E/2 → tanh → P·E."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        size = config.prefix_length * config.decoder_size
        hidden = size // 2
        self.model = nn.Sequential(nn.Linear(config.feature_size, hidden), nn.Tanh(), nn.Linear(hidden, size))

    @property
    def first_layer(self) -> nn.Linear:
        layer = self.model[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def prefix(self, pooled: Tensor) -> Tensor:
        return self.model(pooled)


class LinearBridge(PrefixBridge):
    """One matrix: D → P·E. What ClipCap uses for long prefixes, where its MLP would not fit."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.feature_size, config.prefix_length * config.decoder_size)

    @property
    def first_layer(self) -> nn.Linear:
        return self.linear

    def prefix(self, pooled: Tensor) -> Tensor:
        return self.linear(pooled)


class TransformerBridge(PrefixBridge):
    """ClipCap's TransformerMapper: features as ``clip_length`` tokens, learned queries read them out."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__(config)
        size = config.decoder_size
        self.linear = nn.Linear(config.feature_size, config.clip_length * size)
        self.prefix_const = nn.Parameter(torch.randn(config.prefix_length, size))
        self.transformer = MapperTransformer(size, config.num_layers, config.num_heads)

    @property
    def first_layer(self) -> nn.Linear:
        return self.linear

    def prefix(self, pooled: Tensor) -> Tensor:
        count = pooled.shape[0]
        tokens = self.linear(pooled).view(count, self.config.clip_length, -1)
        queries = self.prefix_const.expand(count, *self.prefix_const.shape)
        read = self.transformer(torch.cat((tokens, queries), dim=1))
        return read[:, self.config.clip_length :].contiguous()


class MapperTransformer(nn.Module):
    """The mapper's stack of pre-norm layers, without a causal mask."""

    def __init__(self, size: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MapperLayer(size, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] → [N, T, E]."""
        for layer in self.layers:
            x = layer(x)
        return x


class MapperLayer(nn.Module):
    """Pre-norm attention and an MLP of ratio 2 with ReLU."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.attn = MapperAttention(size, num_heads)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = MapperMlp(size, 2 * size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MapperAttention(nn.Module):
    """ClipCap's MultiHeadAttention: queries, keys and values without bias."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_queries = nn.Linear(size, size, bias=False)
        self.to_keys_values = nn.Linear(size, 2 * size, bias=False)
        self.project = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, E] → [N, T, E]."""
        count, length, size = x.shape
        queries = self.to_queries(x).view(count, length, self.num_heads, -1).transpose(1, 2)
        pairs = self.to_keys_values(x).view(count, length, 2, self.num_heads, -1)
        keys, values = pairs.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(queries, keys, values)
        return self.project(read.transpose(1, 2).reshape(count, length, size))


class MapperMlp(nn.Module):
    """Two matrices with ReLU between them."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class CrossAttentionBridge(nn.Module):
    """All patch features → a memory for the decoder's cross-attention layers; the decoder starts at bos."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.feature_size, config.decoder_size)
        self.norm = nn.LayerNorm(config.decoder_size)

    def forward(self, features: Features) -> tuple[Tensor | None, Tensor | None]:
        """Features → (None, memory [N, M, E])."""
        patches = features.patches
        if self.config.normalize_features:
            patches = F.normalize(patches, dim=-1)
        return None, self.norm(self.linear(patches))


Bridge = PrefixBridge | CrossAttentionBridge

BRIDGES: dict[str, type[PrefixBridge] | type[CrossAttentionBridge]] = {
    "mlp": MlpBridge,
    "linear": LinearBridge,
    "transformer": TransformerBridge,
    "cross_attention": CrossAttentionBridge,
}


def build_bridge(config: BridgeConfig) -> PrefixBridge | CrossAttentionBridge:
    """A bridge of ``config.kind`` with PyTorch's initial weights; ``bridge.config`` gives its sizes back."""
    try:
        return BRIDGES[config.kind](config)
    except RuntimeError as error:
        raise CaptionerError(f"a {config.kind} bridge of these sizes cannot be built: {error}") from error
