"""A GPT-2 config.json and the tokenizer beside it → the shape and special ids of a decoder."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from framecap.errors import CaptionerError
from framecap.model.bpe import GptTokenizer
from framecap.model.json_files import read_json

logger = logging.getLogger(__name__)

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ACTIVATIONS = (*GELU_TANH, "gelu", "relu", "silu", "swish", "tanh")


@dataclass(frozen=True)
class RuGptConfig:
    """Shape of a decoder; ``n_inner`` None means 4 × n_embd, as in GPT-2's config.json."""

    vocab_size: int
    n_positions: int = 2048
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation: str = "gelu_new"
    eps: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0
    cross_attention: bool = False

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise CaptionerError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; check config.json.")
        if self.activation not in ACTIVATIONS:
            raise CaptionerError(
                f"activation_function {self.activation!r} is not supported; known: {', '.join(ACTIVATIONS)}."
            )

    @classmethod
    def from_json(cls, path: str | Path) -> RuGptConfig:
        """Read a GPT-2 ``config.json``; CaptionerError names a value that cannot be used."""
        raw = read_json(path)
        kind = raw.get("model_type", "gpt2")
        if kind != "gpt2":
            raise CaptionerError(f"{path} has model_type {kind!r}; the decoder must be 'gpt2'.")
        names = {"activation": "activation_function", "eps": "layer_norm_epsilon"}
        values = {}
        for name in cls.__dataclass_fields__:
            key = names.get(name, name)
            if name != "cross_attention" and key in raw:
                values[name] = raw[key]
        if "vocab_size" not in values:
            raise CaptionerError(f"{path} does not say vocab_size; fetch the decoder's config.json again.")
        return cls(**values)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, object]:
        """The ``config.json`` that transformers' GPT2LMHeadModel reads."""
        values = asdict(self)
        values["activation_function"] = values.pop("activation")
        values["layer_norm_epsilon"] = values.pop("eps")
        # Cross-attention weights live with the bridge, so the published decoder has none.
        del values["cross_attention"]
        fixed = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "tie_word_embeddings": True}
        return fixed | values

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def with_tokenizer_ids(config: RuGptConfig, tokenizer: GptTokenizer, source: Path) -> RuGptConfig:
    """Special ids as the tokenizer has them; a warning says where config.json differs.

    Raises CaptionerError when a token lies beyond the embedding, or the bos with which cross-attention begins.
    """
    token, highest = tokenizer.highest()
    if highest >= config.vocab_size:
        spelling = tokenizer.decode([highest]) or token
        raise CaptionerError(
            f"{source}: token {spelling!r} has id {highest}, beyond the decoder's vocab_size {config.vocab_size}; "
            "tokenizer and weights do not belong together."
        )
    changes: dict[str, Any] = {}
    for role in ("bos", "eos", "pad"):
        field, index = f"{role}_token_id", tokenizer.special_id(f"{role}_token")
        stated = getattr(config, field)
        if index is not None and stated != index:
            logger.warning(
                "%s: config.json says %s = %s, the tokenizer says %s; the tokenizer wins.",
                source, field, stated, index,
            )  # fmt: skip
            changes[field] = index
    settled = replace(config, **changes)
    if settled.cross_attention and (settled.bos_token_id or 0) >= settled.vocab_size:
        raise CaptionerError(
            f"{source}: config.json says bos_token_id = {settled.bos_token_id}, beyond the decoder's vocab_size "
            f"{settled.vocab_size}, and the tokenizer names no bos token; mend one of the two."
        )
    return settled
