"""Choosing tokens one at a time, greedily or by chance; penalties before the choice; where a caption ends.

Formulas are those of transformers' ``generation/logits_process.py`` (5.x): RepetitionPenalty, NoRepeatNGram,
Temperature, TopK, TopP. With a prefix of embeddings only generated tokens count as context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framecap.model.bpe import GptTokenizer
from framecap.model.decode_options import DecodeOptions
from framecap.model.transfer import to_device

# Flags of a slot: its caption is finished (or it has none), or may have completed a stop text: the host looks.
FINISHED, WATCHED = 1, 2


@dataclass(frozen=True)
class Candidate:
    """One decoded caption of a frame.

    ``tokens`` are the generated ids without the stop token that ended them. ``logprob`` and ``min_logprob`` are the
    mean and the least natural log-probability the decoder (before temperature and penalties) gave to each generated
    token, the ending one included. ``score`` is what candidates are ordered by: the sum over
    ``length ** length_penalty``, as transformers' sequence score. ``truncated``: cut at max_new_tokens. A frame whose
    logits are not finite gets one candidate without tokens, and NaN for the figures.
    """

    tokens: list[int]
    text: str
    logprob: float
    min_logprob: float
    score: float
    truncated: bool

    @property
    def is_spoilt(self) -> bool:
        """Whether there is no caption, since the decoder's logits were not finite."""
        return math.isnan(self.score)


# A caption that has ended, before it is text: its tokens, their log-probabilities, its score (NaN: spoilt).
Draft = tuple[list[int], list[float], float]


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
        self.ids, self.texts, self.tokenizer = ids, tuple(texts), tokenizer
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
        return self.tokenizer is not None and self._cut(self.tokenizer.decode(tokens)) is not None

    def _cut(self, text: str) -> str | None:
        ends = [text.index(stop) + len(stop) for stop in self.texts if stop in text]
        return text[: min(ends)] if ends else None

    def candidates(self, drafts: Sequence[Draft]) -> list[Candidate]:
        """What each draft says, all of them detokenised together."""
        at_token = [bool(tokens) and tokens[-1] in self.ids for tokens, _, _ in drafts]
        kept = [tokens[:-1] if ended else tokens for (tokens, _, _), ended in zip(drafts, at_token, strict=True)]
        texts = [""] * len(kept) if self.tokenizer is None else self.tokenizer.decode_batch(kept)
        return [self._candidate(*each) for each in zip(drafts, kept, texts, at_token, strict=True)]

    def _candidate(self, draft: Draft, kept: list[int], text: str, at_token: bool) -> Candidate:
        _, logprobs, score = draft
        if math.isnan(score):
            return Candidate([], "", math.nan, math.nan, math.nan, False)
        cut = self._cut(text)
        mean, least = sum(logprobs) / len(logprobs), min(logprobs)
        return Candidate(kept, text if cut is None else cut, mean, least, score, not at_token and cut is None)


class Stepwise:
    """State of ``slots`` captions, of which each is given one token a step: the likeliest, or one drawn with a seed of
    the frame's own. ``BeamSearch`` has the same names.

    ``steps`` int64 [slots]: tokens chosen so far. ``flags`` uint8 [slots]: FINISHED, WATCHED or 0; a finished caption
    does not change any more. ``asks_host``: ``advance`` waits for the device, so it cannot be captured.
    """

    beams, asks_host, ancestors = 1, False, None

    def __init__(self, slots: int, options: DecodeOptions, stop: StopRule, device: torch.device) -> None:
        self.options, self.stop = options, stop
        length = options.max_new_tokens + 1  # the last column takes what finished captions would still choose
        self.tokens = torch.zeros(slots, length, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, length, device=device)
        self.uniform = torch.zeros(slots, length if options.do_sample else 0, device=device)
        self.steps = torch.zeros(slots, dtype=torch.long, device=device)
        self.flags = torch.full((slots,), FINISHED, dtype=torch.uint8, device=device)

    def admit(self, rows: slice, seeds: list[tuple[int, int]]) -> None:
        """Start captions afresh in ``rows``; each has a (seed, number of the sample)."""
        self.steps[rows] = 0
        self.flags[rows] = 0
        if self.options.do_sample:
            draws = [_uniform(seed, number, self.options.max_new_tokens) for seed, number in seeds]
            self.uniform[rows, :-1] = to_device(torch.stack(draws), self.uniform.device)

    def advance(self, logits: Tensor, rows: slice) -> None:
        """Choose the next token from logits [n, 1, V], unless the caption is finished."""
        tokens, steps, finished = self.tokens[rows], self.steps[rows], self.flags[rows] == FINISHED
        limit = self.options.max_new_tokens
        place = torch.where(finished, limit, steps)[:, None]
        logprob, chosen = self._choose(logits[:, 0], rows, place)
        tokens.scatter_(1, place, chosen)
        self.logprobs[rows].scatter_(1, place, logprob)
        steps += ~finished
        ended = finished | (self.stop.at_stop_token(chosen) | logprob.isnan())[:, 0] | (steps == limit)
        watched = self.stop.might_complete(chosen)[:, 0]
        self.flags[rows] = torch.where(ended, FINISHED, WATCHED * watched)

    def _choose(self, logits: Tensor, rows: slice, place: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens int64 [n, 1] of logits [n, V], and their log-probabilities."""
        options = self.options
        if not (options.do_sample or penalises(options)):
            return best_tokens(logits, 1)
        logits = logits.float()
        scores = penalise(logits, self.tokens[rows], self.steps[rows], options)
        if options.do_sample:
            chosen = sample(scores, self.uniform[rows].gather(1, place)[:, 0], options)
        else:
            chosen = scores.argmax(dim=1)
        return logits.log_softmax(dim=1).gather(1, chosen[:, None]), chosen[:, None]

    def last_ids(self, rows: slice) -> Tensor:
        """The tokens chosen last, int64 [n, 1]."""
        return self.tokens[rows].gather(1, (self.steps[rows, None] - 1).clamp_min_(0))

    def collect(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What ``drafts`` needs of the slots int64 [n]."""
        return self.tokens[rows], self.logprobs[rows], self.steps[rows]

    def drafts(self, collected: tuple[Tensor, ...], lengths: Sequence[int]) -> list[list[Draft]]:
        """One draft for each caption that was collected; ``lengths``: where the host saw a stop text, else 0."""
        rows = zip(*(values.tolist() for values in collected), lengths, strict=True)
        found = []
        for tokens, logprobs, steps, seen in rows:
            own = logprobs[: seen or steps]
            found.append([(tokens[: len(own)], own, sum(own) / len(own) ** self.options.length_penalty)])
        return found

    def state(self) -> list[Tensor]:
        """All tensors whose first dimension is the slot."""
        return [self.tokens, self.logprobs, self.uniform, self.steps, self.flags]


def _uniform(seed: int, number: int, length: int) -> Tensor:
    """``length`` numbers in [0, 1) for sample ``number`` of a frame; drawn on CPU, so the same everywhere."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(number + 1, length, generator=generator)[number]


def best_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest tokens of each row of logits [R, V]: log-probabilities float32, ids int64, [R, count]."""
    logprobs = logits.float().log_softmax(dim=1)
    if count > 1:
        return logprobs.topk(count, dim=1)
    ids = logits.argmax(dim=1, keepdim=True)
    return logprobs.gather(1, ids), ids


def penalises(options: DecodeOptions) -> bool:
    """Whether ``penalise`` changes anything."""
    return options.repetition_penalty != 1.0 or options.no_repeat_ngram_size > 0


def penalise(scores: Tensor, tokens: Tensor, steps: Tensor, options: DecodeOptions) -> Tensor:
    """Apply repetition penalty and no-repeat-ngram to ``scores`` float32 [R, V] (a new tensor if changed).

    ``tokens`` int64 [R, G] are the tokens generated so far, of which the first ``steps`` int64 [R] count.
    """
    if options.repetition_penalty != 1.0:
        scores = _penalise_repetition(scores, tokens, steps, float(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        scores = _ban_ngrams(scores, tokens, steps, options.no_repeat_ngram_size)
    return scores


def _penalise_repetition(scores: Tensor, tokens: Tensor, steps: Tensor, penalty: float) -> Tensor:
    counted = torch.arange(tokens.shape[1], device=tokens.device) < steps[:, None]
    # Places not filled yet repeat the first token; rows without one keep their scores.
    seen = torch.where(counted, tokens, tokens[:, :1])
    old = scores.gather(1, seen)
    new = torch.where(old < 0, old * penalty, old / penalty)
    return scores.scatter(1, seen, torch.where(steps[:, None] > 0, new, old))


def _ban_ngrams(scores: Tensor, tokens: Tensor, steps: Tensor, size: int) -> Tensor:
    if tokens.shape[1] < size:
        return scores
    windows = tokens.unfold(1, size, 1)  # [R, G - size + 1, size]
    place = (steps[:, None] - size + 1 + torch.arange(size - 1, device=tokens.device)).clamp_min(0)
    ending = tokens.gather(1, place)  # [R, size - 1], the last tokens
    starts = torch.arange(windows.shape[1], device=tokens.device)
    same = (windows[..., :-1] == ending[:, None]).all(-1) & (starts + size <= steps[:, None])
    ceiling = torch.where(same, float("-inf"), float("inf")).to(scores.dtype)
    return scores.scatter_reduce(1, windows[..., -1], ceiling, "amin")


def sample(logits: Tensor, uniform: Tensor, options: DecodeOptions) -> Tensor:
    """Draw one token per row: logits float32 [R, V], ``uniform`` float32 [R] in [0, 1) → int64 [R].

    Inverse of the cumulative distribution after temperature, top-k and top-p, so that a row's draw depends on
    its own number only and not on its neighbours.
    """
    logits = logits / options.temperature
    vocabulary = logits.shape[1]
    if 0 < options.top_k < vocabulary:
        logits, order = logits.topk(options.top_k)
    elif options.top_p < 1.0:
        logits, order = logits.sort(dim=1, descending=True, stable=True)
    else:
        order = None
    probabilities = logits.softmax(dim=1)
    cumulative = probabilities.cumsum(dim=1)
    if options.top_p < 1.0:
        # A token stays while those before it hold less than top_p; the first always does.
        stays = cumulative - probabilities < options.top_p
        stays[:, 0] = True
        last = stays.sum(dim=1, keepdim=True) - 1
    else:
        last = torch.full_like(uniform[:, None], logits.shape[1] - 1, dtype=torch.long)
    target = uniform[:, None] * cumulative.gather(1, last)
    place = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    return (place if order is None else order.gather(1, place))[:, 0]
