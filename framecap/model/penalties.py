"""What changes scores before a token is chosen, and the choice by chance.

Formulas are those of transformers' ``generation/logits_process.py`` (5.x): RepetitionPenalty,
NoRepeatNGram, Temperature, TopK, TopP. With a prefix of embeddings only generated tokens count as context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framecap.model.decode_options import DecodeOptions


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
