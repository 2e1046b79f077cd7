"""CLIP's two towers, image and text, under the published parameter names.

Architecture: OpenAI's CLIP (``model.py``), which ``ruclip`` 0.0.2 follows: pre-LN transformers with quick-GELU.
Knows nothing about checkpoints, tokenizers or devices; see ``ruclip.py`` for these.

Two things differ from the published code, and neither changes the result. Cropped pixels (uint8) enter the patch
embedding as they are: /255, mean and std are folded into its weights. And the last block computes keys and values
for all tokens, but the rest for the class token alone, since nothing else reaches the embedding.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framecap.model.images import normalise
from framecap.model.packed import PackedLinear, PackedWeight, identity
from framecap.model.ruclip_layout import HEAD_WIDTH, RuClipConfig

EPS = 1e-5
# quick-GELU is x · sigmoid(1.702 x) = silu(1.702 x) / 1.702: one kernel, with 1.702 in the products on both sides.
QUICK = 1.702
# Subtracted from pixels before the product. It keeps the sums small, and integers up to 128 are exact in any dtype.
MID_GREY = 128


class Attention(nn.Module):
    """Multi-head self-attention with a fused query, key and value matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = PackedLinear(width, width)
        self._qkv, self._q, self._kv = PackedWeight(), PackedWeight(), PackedWeight()

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        """[N, T, W] → [N, T, W]."""
        query, key, value = self._heads(self._qkv.linear(x, self.in_proj_weight, self.in_proj_bias), 3)
        return self._attend(query, key, value, is_causal)

    def first_token(self, x: Tensor) -> Tensor:
        """The first token's row of ``forward`` without a mask: [N, T, W] → [N, 1, W]."""
        width, weight, bias = x.shape[-1], self.in_proj_weight, self.in_proj_bias
        [query] = self._heads(self._q.linear(x[:, :1], weight[:width], bias[:width]), 1)
        key, value = self._heads(self._kv.linear(x, weight[width:], bias[width:]), 2)
        return self._attend(query, key, value, is_causal=False)

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[N, T, parts · W] → ``parts`` tensors [N, heads, T, head_dim]."""
        rows, tokens, _ = projected.shape
        return projected.view(rows, tokens, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        found = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        return self.out_proj(found.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward pair with quick-GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self._up, self._down = PackedWeight(scale=QUICK), PackedWeight(scale=1 / QUICK)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] → [..., W]."""
        hidden = self._up.linear(x, self.c_fc.weight, QUICK * self.c_fc.bias, silu=True)
        return self._down.linear(hidden, self.c_proj.weight, self.c_proj.bias)


class Block(nn.Module):
    """One residual layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        """[N, T, W] → [N, T, W]."""
        x = x + self.attn(self.ln_1(x), is_causal)
        return x + self.mlp(self.ln_2(x))

    def first_token(self, x: Tensor) -> Tensor:
        """The first token's row of ``forward`` without a mask: [N, T, W] → [N, 1, W]."""
        first = x[:, :1] + self.attn.first_token(self.ln_1(x))
        return first + self.mlp(self.ln_2(first))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return cast(list[Block], list(self.resblocks))


class ImageTower(nn.Module):
    """OpenAI's vision transformer; its state dict is the published one below ``visual.``."""

    def __init__(self, config: RuClipConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.vision_patch_size
        self.config, self.grid = config, config.image_resolution // patch
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)  # holds the weights; see _patch_embeddings
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(self.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width, eps=EPS)
        self.transformer = Transformer(width, config.vision_layers, width // HEAD_WIDTH)
        self.ln_post = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))
        self._raw_pixels = _FoldedPatches()

    def forward(self, pixels: Tensor, with_patches: bool) -> tuple[Tensor, Tensor | None]:
        """Embeddings [N, D] and, if wanted, normed hidden states [N, P + 1, W], class token first.

        ``pixels``: uint8 [N, R, R, 3] as cropped, or floats [N, 3, R, R], normalised, in the tower's dtype.
        """
        x = self.ln_pre(self._embed(pixels))
        *blocks, last = self.transformer.blocks
        for block in blocks:
            x = block(x)
        pooled = self.ln_post(last.first_token(x)[:, 0]) @ self.proj
        return pooled, self.ln_post(last(x)) if with_patches else None

    def _embed(self, pixels: Tensor) -> Tensor:
        """[N, P + 1, W]: the class token and all patches, with their positions."""
        if pixels.dtype is torch.uint8 and torch.is_grad_enabled():  # training: no derived weights
            pixels = normalise(pixels, self.config.mean, self.config.std, self.proj.dtype)
        patches = self._patch_embeddings(pixels) + self.positional_embedding[1:]
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(pixels), 1, -1)
        return torch.cat((first, patches), dim=1)

    def _patch_embeddings(self, pixels: Tensor) -> Tensor:
        """The patch convolution, whose stride is its size, as one matrix product: → [N, P, W]."""
        rows, grid, size = len(pixels), self.grid, self.config.vision_patch_size
        side = grid * size
        if pixels.dtype is torch.uint8:
            tiles = pixels[:, :side, :side].reshape(rows, grid, size, grid, size, 3).permute(0, 1, 3, 2, 4, 5)
            values = tiles.to(self.proj.dtype, memory_format=torch.contiguous_format).sub_(MID_GREY)
            return self._raw_pixels.linear(values.view(rows, grid * grid, -1), self.conv1.weight, self.config)
        tiles = pixels[:, :, :side, :side].reshape(rows, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)
        return F.linear(tiles.reshape(rows, grid * grid, -1), self.conv1.weight.flatten(1))


class _FoldedPatches:
    """The patch embedding for pixels less ``MID_GREY``: made of ``conv1.weight``, and again when that changes.

    (p / 255 - mean) / std, times w, is (p - 128) · (w / std) / 255, plus a constant for each output: the bias. 1/255
    stays out of the weights, since float16 would round them to its subnormal numbers.
    """

    def __init__(self) -> None:
        self._made_of: tuple[object, ...] = ()
        self._weight = self._bias = torch.empty(0)
        # A tuple, so that ``use_eight_bits`` leaves it alone, as it does every layer that is no ``nn.Linear``.
        self._packed = (PackedWeight(scale=1 / 255),)

    def linear(self, values: Tensor, weight: Tensor, config: RuClipConfig) -> Tensor:
        """[N, P, size · size · 3] → [N, P, W]."""
        made_of = identity(weight)
        if made_of != self._made_of:
            self._weight, self._bias = fold_pixels(weight, config)
            self._made_of = made_of
        return self._packed[0].linear(values, self._weight, self._bias)

    def __reduce__(self) -> tuple[type[_FoldedPatches], tuple[()]]:
        return _FoldedPatches, ()  # a copy makes its own


def fold_pixels(weight: Tensor, config: RuClipConfig) -> tuple[Tensor, Tensor]:
    """``conv1.weight`` [W, 3, size, size] → weight [W, size · size · 3] over (row, column, channel), and bias [W].

    A patch's embedding is its bytes less ``MID_GREY`` times weight, / 255, + bias. Computed in float64.
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=weight.device).view(3, 1, 1)
        for values in (config.mean, config.std)
    )
    scaled = weight.detach().double() / std
    bias = (scaled * (MID_GREY / 255 - mean)).sum((1, 2, 3))
    return scaled.permute(0, 2, 3, 1).flatten(1).to(weight.dtype).contiguous(), bias.to(weight.dtype)


class TextTower(nn.Module):
    """CLIP's causal text transformer; its state dict is the published one."""

    def __init__(self, config: RuClipConfig) -> None:
        super().__init__()
        width = config.transformer_width
        # Not ``nn.Embedding(…)``: its random weights, drawn on the meta device, import torch's compiler for a second.
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(width, config.transformer_layers, config.transformer_heads)
        self.ln_final = nn.LayerNorm(width, eps=EPS)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Ids int64 [N, L] → embeddings [N, D] of the tokens at ``ends`` int64 [N]."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.blocks:
            x = block(x, is_causal=True)
        at_ends = x.take_along_dim(ends[:, None, None], dim=1)[:, 0]
        return self.ln_final(at_ends) @ self.text_projection


@torch.no_grad()
def initialise(tower: ImageTower | TextTower) -> None:
    """Random weights as OpenAI's CLIP starts (its ``initialize_parameters``; embeddings as transformers' CLIP)."""
    width, layers = tower.positional_embedding.shape[1], len(tower.transformer.blocks)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block):
            residual = width**-0.5 * (2 * layers) ** -0.5
            nn.init.normal_(module.attn.in_proj_weight, std=residual)
            nn.init.normal_(module.attn.out_proj.weight, std=width**-0.5)
            nn.init.normal_(module.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.mlp.c_proj.weight, std=residual)
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
    nn.init.normal_(tower.positional_embedding, std=0.02)
    if isinstance(tower, ImageTower):
        nn.init.normal_(tower.class_embedding, std=width**-0.5)
        nn.init.normal_(tower.conv1.weight, std=0.02)
        nn.init.normal_(tower.proj, std=width**-0.5)
    else:
        nn.init.normal_(tower.token_embedding.weight, std=0.02)
        nn.init.normal_(tower.text_projection, std=width**-0.5)
