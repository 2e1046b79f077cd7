"""ruGPT3 (and any GPT-2-shaped checkpoint in the transformers layout) → a decoder with a static KV cache.

Knows nothing of images, beams or stop rules: embeddings in, logits out. The architecture is GPT-2's
(Radford et al. 2019; transformers 5.x ``GPT2LMHeadModel``), cross-attention layers included where asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framecap.errors import BridgeMismatchError, CaptionerError, PositionLimitError, WeightsError
from framecap.model.attention import attend
from framecap.model.bpe import GptTokenizer
from framecap.model.kv_cache import KvCache
from framecap.model.packed import PackedLinear, PackedWeight
from framecap.model.rugpt_config import GELU_TANH, RuGptConfig, with_tokenizer_ids
from framecap.model.rugpt_layout import CONV1D, cross_name, is_cross, normalise_names
from framecap.model.weights import check_layout, read_state_dict, write_state_dict


class SelfAttention(nn.Module):
    """Causal attention of GPT-2: fused query, key and value."""

    def __init__(self, config: RuGptConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.c_attn = PackedLinear(config.n_embd, 3 * config.n_embd)
        self.c_proj = PackedLinear(config.n_embd, config.n_embd)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, Q, E] → query, key, value, each [n, Q, heads, head_dim]."""
        query, key, value = self.c_attn(x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        return query, key, value


class CrossAttention(nn.Module):
    """Attention of a layer to the bridge's memory."""

    def __init__(self, config: RuGptConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.c_attn = PackedLinear(config.n_embd, 2 * config.n_embd)
        self.q_attn = PackedLinear(config.n_embd, config.n_embd)
        self.c_proj = PackedLinear(config.n_embd, config.n_embd)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[n, M, E] → key, value, each [n, M, heads, head_dim]."""
        key, value = self.c_attn(memory).view(*memory.shape[:2], 2, self.heads, -1).unbind(2)
        return key, value


class Mlp(nn.Module):
    """GPT-2's feed-forward pair."""

    def __init__(self, config: RuGptConfig) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = PackedLinear(config.n_embd, inner)
        self.c_proj = PackedLinear(inner, config.n_embd)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] → [..., E]."""
        return self.c_proj(_activate(self.c_fc(x), self.activation))


class Block(nn.Module):
    """One layer; ``forward`` reads and writes the cache when there is one."""

    def __init__(self, config: RuGptConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.eps)
        if config.cross_attention:
            self.crossattention = CrossAttention(config)
            self.ln_cross_attn = nn.LayerNorm(config.n_embd, eps=config.eps)
        self.mlp = Mlp(config)
        self.reads_memory = config.cross_attention

    def forward(self, x: Tensor, cache: KvCache | None, memory: Tensor | None) -> Tensor:
        """[n, Q, E] → [n, Q, E]; causal over Q itself without a cache, else what the cache's pass is."""
        query, key, value = self.attn.project(self.ln_1(x))
        if cache is None:
            read = attend(query, key, value, self.scale, causal=True)
        else:
            read = cache.attend(self.layer, query, key, value, self.scale)
        x = x + self.attn.c_proj(read)
        if self.reads_memory:
            x = x + self._read_memory(self.ln_cross_attn(x), cache, memory)
        return x + self.mlp(self.ln_2(x))

    def _read_memory(self, x: Tensor, cache: KvCache | None, memory: Tensor | None) -> Tensor:
        cross = self.crossattention
        if memory is not None:
            key, value = cross.project_memory(memory)
            if cache is not None:
                cache.keep_memory(self.layer, key, value)
        elif cache is not None:
            key, value = cache.memory(self.layer)
        else:
            raise BridgeMismatchError("this decoder has cross-attention layers and needs a memory; got None.")
        query = cross.q_attn(x).view(*x.shape[:2], cross.heads, -1)
        return cross.c_proj(attend(query, key, value, self.scale))


class RuGpt(nn.Module):
    """A GPT-2-shaped language model whose output matrix is its input embedding.

    ``tokenizer`` may be None for a model that only trains on ids.
    """

    def __init__(self, config: RuGptConfig, tokenizer: GptTokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self._tokenizer = tokenizer
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.eps)
        self._head = PackedWeight()

    @classmethod
    def from_config(cls, config: RuGptConfig, tokenizer: GptTokenizer | None = None) -> RuGpt:
        """Random weights, as GPT-2 starts (normal, std 0.02, residual paths scaled)."""
        model = cls(config, tokenizer)
        _initialise(model, config.n_layer)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        cross_attention: bool = False,
    ) -> RuGpt:
        """Load config.json, weights and tokenizer files strictly.

        With ``cross_attention`` the extra layers start at random unless the checkpoint holds them.
        Raises MissingFileError, WeightsError, StateDictError (naming keys), CaptionerError.
        """
        directory = Path(directory)
        tokenizer = GptTokenizer.from_pretrained(directory)
        config = RuGptConfig.from_json(directory / "config.json")
        config = with_tokenizer_ids(replace(config, cross_attention=cross_attention), tokenizer, directory)
        with torch.device("meta"):
            model = cls(config, tokenizer)
        model.to_empty(device="cpu")
        if cross_attention:
            _initialise(model, config.n_layer)
        model.load_published_state(read_state_dict(directory), directory)
        model.arrange_for_small_batches()
        return model.to(device=device, dtype=dtype).eval()

    def arrange_for_small_batches(self) -> None:
        """Lay the matrices out in memory as GPT-2's files do, [in, out], values and names unchanged.

        Measured on CPU with 8 to 64 rows: 1.2 to 2.5 times as fast as [out, in], except for the widening
        ``c_fc``, which stays.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("c_fc"):
                module.weight.data = module.weight.data.t().contiguous().t()

    @property
    def tokenizer(self) -> GptTokenizer:
        if self._tokenizer is None:
            raise CaptionerError("this decoder was built without a tokenizer; give RuGpt one.")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.wte.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings without positions: int64 [...] → [..., E]."""
        return self.wte(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] → [..., V], with the input embedding as output matrix."""
        return self._head.linear(hidden, self.wte.weight, None)

    def hidden_train(self, inputs: Tensor, memory: Tensor | None = None) -> Tensor:
        """Final hidden states [B, T, E] of ``inputs`` [B, T, E] (embeddings without positions).

        ``memory`` [B, M, E]. No cache; differentiable.
        """
        length = inputs.shape[1]
        self.check_positions(length, 0)
        x = inputs + self.wpe.weight[:length]
        for block in self.h:
            x = block(x, None, memory)
        return self.ln_f(x)

    def new_cache(self, slots: int, entries: int, memory_len: int = 0) -> KvCache:
        """A cache of ``slots`` frames with ``entries`` each, in the decoder's dtype and device."""
        config = self.config
        shape = (config.n_layer, slots, entries, config.n_head, config.head_dim, memory_len)
        return KvCache(*shape, dtype=self.dtype, device=self.device)

    def prefill(self, prefix: Tensor, memory: Tensor | None, cache: KvCache, first_slot: int) -> Tensor:
        """Read prefixes [n, P, E] into slots ``first_slot`` on; logits [n, V] of what follows them."""
        count, length = prefix.shape[:2]
        cache.start_prefill(slice(first_slot, first_slot + count))
        x = prefix + self.wpe.weight[:length]
        for block in self.h:
            x = block(x, cache, memory)
        return self.logits(self.ln_f(x[:, -1]))

    def decode_one_token(self, ids: Tensor, positions: Tensor, cache: KvCache) -> Tensor:
        """Feed one token per beam of the slots that ``cache.start_step`` named; logits [n, K, V] of the next.

        ``ids`` int64 [n, K], ``positions`` int64 [n].
        """
        x = self.wte(ids) + self.wpe(positions)[:, None]
        for block in self.h:
            x = block(x, cache, None)
        return self.logits(self.ln_f(x))

    def check_positions(self, read: int, new: int) -> None:
        """PositionLimitError when ``read`` prefix tokens and ``new`` ones exceed the position embeddings."""
        if read + new > self.config.n_positions:
            raise PositionLimitError(
                f"{read} prefix and prompt positions + {new} new tokens = {read + new}, but the decoder has "
                f"n_positions = {self.config.n_positions}; lower max_new_tokens or the prefix length."
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, model.safetensors and the tokenizer files in the transformers layout.

        Cross-attention layers are left out; they belong to the bridge (``cross_attention_state``).
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.to_json(), indent=2, sort_keys=True)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
        state = self.published_state()
        write_state_dict(directory / "model.safetensors", {k: v for k, v in state.items() if not is_cross(k)})
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(directory)

    def published_state(self) -> dict[str, Tensor]:
        """Views of all weights under transformers' names and in its layout (``transformer.h.0…``)."""
        return {
            f"transformer.{name}": tensor.t() if name.endswith(CONV1D) else tensor
            for name, tensor in self.state_dict().items()
        }

    def load_published_state(self, state: Mapping[str, Tensor], source: str | Path) -> None:
        """Copy weights given under transformers' names, with or without ``transformer.``; strictly.

        The old attention buffers are ignored; ``lm_head.weight`` must equal the input embedding;
        cross-attention weights may be absent. Raises StateDictError, WeightsError.
        """
        weights = normalise_names(state)
        head = weights.pop("lm_head.weight", None)
        embedding = weights.get("transformer.wte.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise WeightsError(
                f"{source} has an lm_head.weight of its own; only decoders whose output matrix is tied to "
                "the input embedding are supported."
            )
        own = self.published_state()
        if not any(is_cross(name) for name in weights):
            own = {name: tensor for name, tensor in own.items() if not is_cross(name)}
        check_layout(own, weights, source)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    def cross_attention_state(self) -> dict[str, Tensor]:
        """Weights of the cross-attention layers as ``decoder.crossattention.<layer>.…``, GPT-2's layout."""
        own = self.published_state()
        return {cross_name(name): tensor for name, tensor in own.items() if is_cross(name)}

    def load_cross_attention_state(self, state: Mapping[str, Tensor], source: str | Path) -> None:
        """Copy what ``cross_attention_state`` gave, strictly; StateDictError names keys that do not fit."""
        own = self.cross_attention_state()
        check_layout(own, state, source)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


def _activate(x: Tensor, name: str) -> Tensor:
    if name in GELU_TANH:
        return F.gelu(x, approximate="tanh")
    if name in ("silu", "swish"):
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return torch.tanh(x) if name == "tanh" else F.gelu(x)


def _initialise(model: RuGpt, n_layer: int) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "ln_" in name:
            nn.init.ones_(parameter)
        else:
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(parameter, std=0.02 / (2 * n_layer) ** 0.5 if residual else 0.02)
