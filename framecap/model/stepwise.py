"""One token at a time: greedy choice, or a draw with a seed of the frame's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from framecap.model.decode_options import DecodeOptions
from framecap.model.penalties import penalise, sample
from framecap.model.step import FINISHED, WATCHED
from framecap.model.stopping import Candidate, StopRule
from framecap.model.transfer import to_device


class Stepwise:
    """State of ``slots`` captions in the making; see ``step.Search`` for the contract."""

    beams = 1
    asks_host = False

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
        """Choose the next token from float32 logits [n, 1, V], unless the caption is finished."""
        logits = logits[:, 0]
        tokens, steps, finished = self.tokens[rows], self.steps[rows], self.flags[rows] == FINISHED
        limit = self.options.max_new_tokens
        place = torch.where(finished, limit, steps)[:, None]
        scores = penalise(logits, tokens, steps, self.options)
        if self.options.do_sample:
            chosen = sample(scores, self.uniform[rows].gather(1, place)[:, 0], self.options)
        else:
            chosen = scores.argmax(dim=1)
        logprob = logits.log_softmax(dim=1).gather(1, chosen[:, None])
        tokens.scatter_(1, place, chosen[:, None])
        self.logprobs[rows].scatter_(1, place, logprob)
        steps += ~finished
        finished |= self.stop.at_stop_token(chosen) | (steps == limit) | logprob[:, 0].isnan()
        watched = self.stop.might_complete(chosen)
        self.flags[rows] = torch.where(finished, FINISHED, WATCHED * watched)

    def last_ids(self, rows: slice) -> Tensor:
        """The tokens chosen last, int64 [n, 1]."""
        return self.tokens[rows].gather(1, (self.steps[rows, None] - 1).clamp_min_(0))

    def seen(self, rows: slice, entries: int) -> Tensor:
        """Which of the first ``entries`` generated cache entries each row sees: bool [n, 1, entries]."""
        return (torch.arange(entries, device=self.steps.device) < self.steps[rows, None])[:, None]

    def collect(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What ``candidates`` needs of the slots int64 [n]."""
        return self.tokens[rows], self.logprobs[rows], self.steps[rows]

    def candidates(self, collected: tuple[Tensor, ...], place: int, length: int | None) -> list[Candidate]:
        """The caption at ``place`` of what was collected; ``length``: it ended at a stop text after so many tokens."""
        tokens, logprobs, steps = collected
        length = length or int(steps[place])
        own = logprobs[place, :length].tolist()
        if math.isnan(own[-1]):
            return [Candidate.spoilt()]
        score = sum(own) / length**self.options.length_penalty
        return [self.stop.candidate(tokens[place, :length].tolist(), own, score)]

    def state(self) -> list[Tensor]:
        """All tensors whose first dimension is the slot."""
        return [self.tokens, self.logprobs, self.uniform, self.steps, self.flags]


def _uniform(seed: int, number: int, length: int) -> Tensor:
    """``length`` numbers in [0, 1) for sample ``number`` of a frame; drawn on CPU, so the same everywhere."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(number + 1, length, generator=generator)[number]
