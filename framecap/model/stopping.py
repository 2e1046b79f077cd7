"""When a caption ends: at a stop token, at a stop text, or cut at its greatest length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framecap.model.bpe import GptTokenizer


@dataclass(frozen=True)
class Candidate:
    """One decoded caption of a frame.

    ``tokens`` are the generated ids without the stop token that ended them. ``logprob`` and ``min_logprob``
    are the mean and the least natural log-probability the decoder (before temperature and penalties) gave to
    each generated token, the ending one included. ``score`` is what candidates are ordered by: the sum over
    ``length ** length_penalty``, as transformers' sequence score. ``truncated``: cut at max_new_tokens. A frame
    whose logits are not finite gets one candidate, ``Candidate.spoilt()``: no tokens, and NaN for the figures.
    """

    tokens: list[int]
    text: str
    logprob: float
    min_logprob: float
    score: float
    truncated: bool

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def is_spoilt(self) -> bool:
        """Whether there is no caption, since the decoder's logits were not finite."""
        return math.isnan(self.logprob)

    @classmethod
    def spoilt(cls) -> Candidate:
        """What stands for the caption of a frame whose logits were not finite."""
        return cls([], "", math.nan, math.nan, math.nan, False)


class StopRule:
    """Stop ids and stop texts of one run.

    Only tokens whose bytes hold the last byte of a stop text can complete it; the rest need no decoding.
    """

    def __init__(self, tokenizer: GptTokenizer | None, eos_token_id: int | None, stop: Sequence[str],
                 vocab_size: int, device: torch.device) -> None:  # fmt: skip
        ids = [] if eos_token_id is None else [eos_token_id]
        texts = []
        for text in stop:
            index = tokenizer.token_id(text) if tokenizer is not None and tokenizer.is_special(text) else None
            if index is None:
                texts.append(text)
            elif index not in ids:
                ids.append(index)
        self.ids = ids
        self.texts = tuple(texts)
        self.tokenizer = tokenizer
        self._watched = self._watch(vocab_size).to(device) if texts else None

    def _watch(self, vocab_size: int) -> Tensor:
        if self.tokenizer is None:
            raise ValueError("stop texts need a decoder with a tokenizer")
        lasts = {text.encode()[-1] for text in self.texts}
        watched = torch.zeros(vocab_size, dtype=torch.bool)
        for index, piece in enumerate(self.tokenizer.token_bytes()[:vocab_size]):
            watched[index] = any(last in piece for last in lasts)
        return watched

    def at_stop_token(self, ids: Tensor) -> Tensor:
        """Whether each of ``ids`` (any shape) is a stop token; bool of the same shape."""
        hit = torch.zeros_like(ids, dtype=torch.bool)
        for index in self.ids:
            hit |= ids == index
        return hit

    def might_complete(self, ids: Tensor) -> Tensor:
        """Whether each of ``ids`` (any shape) might complete a stop text; bool of the same shape."""
        return torch.zeros_like(ids, dtype=torch.bool) if self._watched is None else self._watched[ids]

    def ends_text(self, tokens: Sequence[int]) -> bool:
        """Whether the text of ``tokens`` holds a stop text."""
        return self._cut(self.text(tokens)) is not None

    def text(self, tokens: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens)

    def _cut(self, text: str) -> str | None:
        ends = [text.index(stop) + len(stop) for stop in self.texts if stop in text]
        return text[: min(ends)] if ends else None

    def candidate(self, tokens: list[int], logprobs: list[float], score: float) -> Candidate:
        """The finished caption of ``tokens``, its stop token last where it ended at one."""
        at_token = bool(tokens) and tokens[-1] in self.ids
        kept = tokens[:-1] if at_token else tokens
        text = self.text(kept)
        cut = self._cut(text)
        return Candidate(
            tokens=kept,
            text=text if cut is None else cut,
            logprob=sum(logprobs) / len(logprobs),
            min_logprob=min(logprobs),
            score=score,
            truncated=not at_token and cut is None,
        )
