"""One token at a time: greedy choice, or a draw with a seed of the frame's own."""

from __future__ import annotations

import torch
from torch import Tensor

from framecap.model.decode_options import DecodeOptions
from framecap.model.penalties import penalise, sample
from framecap.model.stopping import Candidate, StopRule


class Stepwise:
    """State of ``slots`` captions in the making; see ``generate.Search`` for the contract."""

    beams = 1

    def __init__(self, slots: int, options: DecodeOptions, stop: StopRule, device: torch.device) -> None:
        length = options.max_new_tokens
        self.options, self.stop = options, stop
        self.tokens = torch.zeros(slots, length, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, length, device=device)
        self.uniform = torch.zeros(slots, length if options.do_sample else 0, device=device)
        self.steps = torch.zeros(slots, dtype=torch.long, device=device)

    def admit(self, rows: slice, seeds: list[tuple[int, int]]) -> None:
        """Start captions afresh in ``rows``; each has a (seed, number of the sample)."""
        self.steps[rows] = 0
        if self.options.do_sample:
            draws = [_uniform(seed, number, self.options.max_new_tokens) for seed, number in seeds]
            self.uniform[rows] = torch.stack(draws).to(self.uniform.device)

    def advance(self, logits: Tensor, rows: slice) -> Tensor:
        """Choose the next token from float32 logits [n, 1, V]; bool [n] tells which captions are finished."""
        logits = logits[:, 0]
        tokens, steps = self.tokens[rows], self.steps[rows]
        place = steps[:, None]
        scores = penalise(logits, tokens, steps, self.options)
        if self.options.do_sample:
            chosen = sample(scores, self.uniform[rows].gather(1, place)[:, 0], self.options)
        else:
            chosen = scores.argmax(dim=1)
        logprob = logits.gather(1, chosen[:, None]) - logits.logsumexp(dim=1, keepdim=True)
        tokens.scatter_(1, place, chosen[:, None])
        self.logprobs[rows].scatter_(1, place, logprob)
        steps += 1
        finished = self.stop.at_stop_token(chosen) | (steps == self.options.max_new_tokens)
        for row in self.stop.completing(chosen):
            if self.stop.ends_text(tokens[row, : int(steps[row])].tolist()):
                finished[row] = True
        return finished

    def last_ids(self, rows: slice) -> Tensor:
        """The tokens chosen last, int64 [n, 1]."""
        return self.tokens[rows].gather(1, self.steps[rows, None] - 1)

    def seen(self, rows: slice, entries: int) -> Tensor:
        """Which of the first ``entries`` generated cache entries each row sees: bool [n, 1, entries]."""
        return (torch.arange(entries, device=self.steps.device) < self.steps[rows, None])[:, None]

    def candidates(self, row: int) -> list[Candidate]:
        """The finished caption of ``row``."""
        length = int(self.steps[row])
        logprobs = self.logprobs[row, :length].tolist()
        score = sum(logprobs) / length**self.options.length_penalty
        return [self.stop.candidate(self.tokens[row, :length].tolist(), logprobs, score)]

    def state(self) -> list[Tensor]:
        """All tensors whose first dimension is the slot."""
        return [self.tokens, self.logprobs, self.uniform, self.steps]


def _uniform(seed: int, number: int, length: int) -> Tensor:
    """``length`` numbers in [0, 1) for sample ``number`` of a frame; drawn on CPU, so the same everywhere."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(number + 1, length, generator=generator)[number]
