"""Beam search with transformers' semantics (5.x ``GenerationMixin._beam_search``, early_stopping=False).

Every frame is searched for itself and leaves when no open beam can beat its worst finished one. Beams share their
frame's cache: ``ancestors`` says which entries each beam descends from, so nothing is copied when beams are reordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from framecap.model.decode_options import DecodeOptions
from framecap.model.search import FINISHED, Draft, StopRule, best_tokens, penalise, penalises

# Added to the sum of a beam that ended, so that it does not run on.
_NEVER = -1.0e9
# Places of finished captions that are still empty. Every finished caption counts at least ``_WORST``, above these: a
# strongly negative length_penalty makes scores of -1e19, a ban of all tokens makes -inf.
_EMPTY, _WORST = float("-inf"), torch.finfo(torch.float32).min


class BeamSearch:
    """State of ``slots`` searches; see ``search.Stepwise`` for the names. K beams, G new tokens.

    Stop texts decide which beams go on, so with them the host is asked at every step. A search that is finished keeps
    its finished captions (``done_…``); what its open beams do then does not matter.
    """

    def __init__(self, slots: int, options: DecodeOptions, stop: StopRule, device: torch.device) -> None:
        beams, length = options.num_beams, options.max_new_tokens
        self.beams, self.options, self.stop = beams, options, stop
        self.keep = max(2, 1 + len(stop.ids)) * beams
        self.asks_host = bool(stop.texts)

        def block(kind: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=kind, device=device)

        self.steps = block(torch.long)
        self.flags = torch.full((slots,), FINISHED, dtype=torch.uint8, device=device)
        self.tokens = block(torch.long, beams, length)
        self.logprobs = block(torch.float32, beams, length)
        self.scores = block(torch.float32, beams)
        self.ancestors = block(torch.bool, beams, length * beams)  # see KvCache.start_step
        self.done_tokens = block(torch.long, beams, length)
        self.done_logprobs = block(torch.float32, beams, length)
        self.done_scores = block(torch.float32, beams)
        self.done_lengths = block(torch.long, beams)
        penalties = [float(step) ** options.length_penalty if step else 1.0 for step in range(length + 1)]
        self._normaliser = torch.tensor(penalties, device=device)
        self._own = torch.eye(beams, dtype=torch.bool, device=device)

    def admit(self, rows: slice, seeds: list[tuple[int, int]]) -> None:
        """Start searches afresh in ``rows``."""
        self.steps[rows] = 0
        self.flags[rows] = 0
        self.scores[rows] = 0.0
        self.ancestors[rows] = False
        self.done_lengths[rows] = 0
        self.done_scores[rows] = _EMPTY

    def advance(self, logits: Tensor, rows: slice) -> None:
        """Extend all beams by logits [n, K, V] ([n, 1, V] after the prefix), unless they are finished."""
        totals, beam, token, logprob = self._continuations(logits, rows)
        tokens = _pick(self.tokens[rows], beam)
        logprobs = _pick(self.logprobs[rows], beam)
        going_on = self.flags[rows] != FINISHED
        place = self.steps[rows, None, None].clamp_max(self.options.max_new_tokens - 1).expand(-1, self.keep, 1)
        tokens.scatter_(2, place, token[..., None])
        logprobs.scatter_(2, place, logprob[..., None])
        self.steps[rows] += going_on
        ended = self._ended(token, tokens, rows)
        self._keep_running(totals + ended * _NEVER, beam, tokens, logprobs, rows)
        spoilt = totals[:, :1].isnan()
        self._keep_finished(totals, ended, spoilt, tokens, logprobs, rows)
        improves = self._can_improve(rows) & ~ended.all(dim=1) & going_on & ~spoilt[:, 0]
        self.flags[rows] = torch.where(improves, 0, FINISHED)

    def _continuations(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ``keep`` best continuations of each frame: total score, parent beam, token, its logprob."""
        open_beams, vocabulary = logits.shape[1:]
        width = min(self.keep, vocabulary)
        flat = logits.flatten(0, 1)
        if penalises(self.options):
            raw = flat.float().log_softmax(dim=1)
            tokens = self.tokens[rows, :open_beams].flatten(0, 1)
            steps = self.steps[rows].repeat_interleave(open_beams, output_size=len(raw))
            best, token = penalise(raw, tokens, steps, self.options).topk(width, dim=1)
            logprob = raw.gather(1, token)
        else:
            logprob, token = best_tokens(flat, width)
            best = logprob
        totals = (best.view(-1, open_beams, width) + self.scores[rows, :open_beams, None]).flatten(1)
        totals, place = totals.topk(self.keep, dim=1)
        token, logprob = (values.view(totals.shape[0], -1).gather(1, place) for values in (token, logprob))
        return totals, place // width, token, logprob

    def _ended(self, token: Tensor, tokens: Tensor, rows: slice) -> Tensor:
        """Which continuations [n, keep] end here."""
        steps = self.steps[rows]
        ended = self.stop.at_stop_token(token) | (steps == self.options.max_new_tokens)[:, None]
        watched = self.stop.might_complete(token).nonzero().tolist() if self.asks_host else []
        for row, number in watched:
            if self.stop.ends_text(tokens[row, number, : int(steps[row])].tolist()):
                ended[row, number] = True
        return ended

    def _keep_running(self, totals: Tensor, beam: Tensor, tokens: Tensor, logprobs: Tensor, rows: slice) -> None:
        """Go on with the ``beams`` best continuations."""
        self.scores[rows], place = totals.topk(self.beams, dim=1)
        self.tokens[rows], self.logprobs[rows] = _pick(tokens, place), _pick(logprobs, place)
        seen = _pick(self.ancestors[rows], beam.gather(1, place))
        # The token just chosen will stand at [step, beam] of the cache; each beam sees its own.
        last = (self.steps[rows, None] - 1).clamp_min_(0) * self.beams
        columns = last + torch.arange(self.beams, device=last.device)
        columns = columns[:, None].expand(-1, self.beams, -1)
        self.ancestors[rows] = seen.scatter(2, columns, self._own.expand(seen.shape[0], -1, -1))

    def _keep_finished(
        self, totals: Tensor, ended: Tensor, spoilt: Tensor, tokens: Tensor, logprobs: Tensor, rows: slice
    ) -> None:
        """Merge continuations that end here into the ``beams`` best finished captions; a ``spoilt`` [n, 1] search gets
        NaN for its scores."""
        # Only the best num_beams continuations may become results; the others are there to go on with.
        ended = ended[:, : self.beams]
        steps = self.steps[rows]
        scores = (totals[:, : self.beams] / self._normaliser[steps][:, None]).clamp_min(_WORST)
        scores = scores.masked_fill(~ended, _EMPTY)
        best, place = torch.cat((self.done_scores[rows], scores), dim=1).topk(self.beams, dim=1)
        best = best.masked_fill(spoilt, math.nan)
        # A search that is finished keeps what it has.
        place = torch.where(self._finished(rows), torch.arange(self.beams, device=place.device), place)
        self.done_scores[rows] = torch.where(self._finished(rows), self.done_scores[rows], best)
        for done, new in (
            (self.done_tokens, tokens[:, : self.beams]),
            (self.done_logprobs, logprobs[:, : self.beams]),
            (self.done_lengths, ended * steps[:, None]),
        ):
            done[rows] = _pick(torch.cat((done[rows], new), dim=1), place)

    def _finished(self, rows: slice) -> Tensor:
        return self.flags[rows, None] == FINISHED

    def _can_improve(self, rows: slice) -> Tensor:
        best = (self.scores[rows, :1] / self._normaliser[self.steps[rows]][:, None]).clamp_min(_WORST)
        return best[:, 0] > self.done_scores[rows].min(dim=1).values  # an empty place is below every beam

    def last_ids(self, rows: slice) -> Tensor:
        """The tokens chosen last, int64 [n, K]."""
        place = (self.steps[rows, None, None] - 1).clamp_min_(0)
        return self.tokens[rows].gather(2, place.expand(-1, self.beams, 1))[..., 0]

    def collect(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What ``drafts`` needs of the slots int64 [n]."""
        return self.done_tokens[rows], self.done_logprobs[rows], self.done_scores[rows], self.done_lengths[rows]

    def drafts(self, collected: tuple[Tensor, ...], _: Sequence[int]) -> list[list[Draft]]:
        """The ``num_return_sequences`` best finished captions of each search, best first."""
        wanted = self.options.num_return_sequences
        found: list[list[Draft]] = []
        for tokens, logprobs, scores, lengths in zip(*(values.tolist() for values in collected), strict=True):
            if math.isnan(scores[0]):
                found.append([([], [], math.nan)])
                continue
            ended = [number for number in range(wanted) if lengths[number]]
            found.append([(tokens[n][: lengths[n]], logprobs[n][: lengths[n]], scores[n]) for n in ended])
        return found

    def state(self) -> list[Tensor]:
        """All tensors whose first dimension is the slot."""
        return [
            self.steps, self.flags, self.tokens, self.logprobs, self.scores, self.ancestors,
            self.done_tokens, self.done_logprobs, self.done_scores, self.done_lengths,
        ]  # fmt: skip


def _pick(values: Tensor, place: Tensor) -> Tensor:
    """Rows of [n, K, ...] chosen by int64 [n, J] → [n, J, ...]."""
    if values.dim() == 2:
        return values.gather(1, place)
    return values.gather(1, place[..., None].expand(-1, -1, values.shape[2]))
