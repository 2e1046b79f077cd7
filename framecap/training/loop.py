"""The training loop of one worker: batches, steps, validation, checkpoints, early stop.

Runs alone in any process, or as one of several under torch.distributed; knows nothing of Ray.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from framecap.errors import TrainingError
from framecap.model.ruclip import ImageFeatures
from framecap.training.checkpoint import (
    Progress,
    fresh_start,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from framecap.training.curve import Curve, CurveRow, progress_line
from framecap.training.examples import Examples, batch_at, collate, shares
from framecap.training.features import EncodedPairs
from framecap.training.loss import CaptionLoss
from framecap.training.optimise import Optimiser, choose_precision
from framecap.training.settings import TrainSettings
from framecap.training.text_space import TextSpace

log = logging.getLogger(__name__)

LEAST_INTERVAL = 50  # steps between validations or checkpoints where an epoch is shorter


@dataclass(frozen=True)
class Team:
    """This worker's device, and its place among all."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this worker writes files and progress lines."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums over all workers, the same on each; all must call it."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.device.type == "cuda":
            sums = sums.float()
        distributed.all_reduce(sums)
        return [float(value) for value in sums]


@dataclass(frozen=True)
class TrainingData:
    """Features of all images, and the examples of both splits; ``space`` when they are texts instead of images."""

    pairs: EncodedPairs
    training: Examples
    validation: Examples
    space: TextSpace | None = None


def total_steps(settings: TrainSettings, examples: int) -> int:
    """Optimiser steps of the whole run."""
    return settings.steps or max(1, math.ceil(settings.epochs * examples / settings.batch_size))


class Trainer:
    """State of one worker's run; ``train`` drives it to the end."""

    def __init__(
        self,
        model: CaptionLoss,
        data: TrainingData,
        settings: TrainSettings,
        run_dir: Path,
        team: Team,
        identity: dict[str, Any],
    ) -> None:
        self.model, self.data, self.settings, self.team, self.identity = model, data, settings, team, identity
        self.run_dir, self.checkpoints = run_dir, run_dir / "checkpoints"
        self.steps = total_steps(settings, len(data.training))
        self.epoch_steps = len(data.training) / settings.batch_size
        interval = max(LEAST_INTERVAL, math.ceil(self.epoch_steps))
        self.validate_every = settings.validate_every or interval
        self.checkpoint_every = settings.checkpoint_every or interval
        self.dtype = choose_precision(settings.precision, team.device)
        self.optimiser = Optimiser(model, settings, self.steps, self.dtype)
        self.progress = self._resume()
        self.curve = Curve(run_dir, self.progress.step)
        self.parallel = DistributedDataParallel(model) if team.world > 1 else None
        self._since = (time.monotonic(), self.progress.step, self.progress.tokens)

    def train(self) -> Progress:
        """Run to the last step or the early stop; afterwards the model holds the weights to keep."""
        self.model.train()
        while self.progress.step < self.steps and not self._out_of_patience():
            self._step(self.progress.step)
            self.progress.step += 1
            self._after_step(self.progress.step)
        if self.progress.validated:
            self.model.load_trained_state(load_best(self.checkpoints))
        self.model.eval()
        return self.progress

    def _after_step(self, step: int) -> None:
        last = step == self.steps
        validates = bool(len(self.data.validation)) and (last or step % self.validate_every == 0)
        if validates:
            self._validate()
        if last or validates or step % self.settings.log_every == 0:
            self._log(step, validates)
        if last or step % self.checkpoint_every == 0 or self._out_of_patience():
            self._checkpoint()

    def _step(self, step: int) -> None:
        settings, team, training = self.settings, self.team, self.data.training
        batch = batch_at(step, len(training), settings.batch_size, settings.seed)
        tokens = training.token_count(batch)
        space = self.data.space
        noise = None if space is None else space.noise(settings.seed, step, len(batch))
        pieces = list(shares(np.arange(len(batch)), team.rank, team.world, settings.accumulate))
        for number, places in enumerate(pieces, 1):
            piece = batch[places]
            with self._gradients_shared(number == len(pieces)):
                added = None if noise is None else noise[places]
                loss = self._loss(self.parallel or self.model, training, piece, added)
                # DDP averages over workers; the batch's loss is a mean over all its tokens.
                self.optimiser.backward(loss * (team.world / tokens))
            self.progress.window_loss += float(loss.detach())
            self.progress.window_tokens += training.token_count(piece)
        self.optimiser.step(step)
        self.progress.tokens += tokens

    @contextmanager
    def _gradients_shared(self, now: bool) -> Iterator[None]:
        with nullcontext() if self.parallel is None or now else self.parallel.no_sync():
            yield

    def _loss(
        self, module: torch.nn.Module, examples: Examples, chosen: np.ndarray, noise: np.ndarray | None = None
    ) -> torch.Tensor:
        """Summed loss of the examples ``chosen``; ``noise`` [B, D] is added to their features at length 1."""
        device = self.team.device
        features = self.data.pairs.features(examples.images[chosen], device)
        if noise is not None:
            pooled = F.normalize(features.pooled, dim=-1) + torch.from_numpy(noise).to(device)
            features = ImageFeatures(pooled, features.patches)
        targets = collate(examples, chosen, device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss: torch.Tensor = module(features, targets)
        return loss

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean loss over the validation examples; keeps the weights when it is the lowest so far."""
        examples, team, progress = self.data.validation, self.team, self.progress
        self.model.eval()
        mine = np.arange(len(examples))[team.rank :: team.world]
        size = max(1, self.settings.batch_size // (team.world * self.settings.accumulate))
        losses = [float(self._loss(self.model, examples, mine[i : i + size])) for i in range(0, len(mine), size)]
        loss, tokens = team.total(sum(losses), examples.token_count(mine))
        self.model.train()
        progress.validation_loss = loss / tokens
        if progress.validation_loss < progress.best_loss:
            progress.best_loss, progress.best_step = progress.validation_loss, progress.step
            progress.validations_without_gain = 0
            if team.leads:
                save_best(self.checkpoints, self.model.trained_state())
        else:
            progress.validations_without_gain += 1

    def _out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.progress.validations_without_gain

    def _gather_window(self) -> None:
        """Bring all workers' running sums to the leader."""
        progress, team = self.progress, self.team
        loss, tokens = team.total(progress.window_loss, progress.window_tokens)
        progress.window_loss, progress.window_tokens = (loss, int(tokens)) if team.leads else (0.0, 0)
        if tokens:
            progress.train_loss = loss / tokens

    def _log(self, step: int, validated: bool) -> None:
        self._gather_window()
        progress = self.progress
        if not math.isfinite(progress.train_loss):
            raise TrainingError(f"the loss is {progress.train_loss} at step {step}; {fresh_start(self.checkpoints)}")
        progress.window_loss, progress.window_tokens = 0.0, 0
        now = time.monotonic()
        since, first, tokens = self._since
        self._since = (now, step, progress.tokens)
        progress.seconds += now - since
        if not self.team.leads:
            return
        row = CurveRow(
            step=step,
            epoch=step / self.epoch_steps,
            train_loss=progress.train_loss,
            validation_loss=progress.validation_loss if validated else None,
            learning_rate=self.optimiser.rate(step - 1),
            tokens_per_second=(progress.tokens - tokens) / max(now - since, 1e-9),
            seconds=progress.seconds,
        )
        self.curve.add(row)
        left = (self.steps - step) * (now - since) / max(1, step - first)
        log.info("%s", progress_line(row, self.steps, left))

    def _checkpoint(self) -> None:
        self._gather_window()
        if self.team.leads:
            state = self.optimiser.state_dict()
            save_checkpoint(self.checkpoints, self.identity, self.progress, self.model.trained_state(), state)

    def _resume(self) -> Progress:
        found = load_checkpoint(self.checkpoints, self.identity)
        step = found["progress"]["step"] if found else 0
        (leaders,) = self.team.total(step if self.team.leads else 0)
        if step != leaders:
            raise TrainingError(
                f"worker {self.team.rank} finds the checkpoint of step {step} in {self.checkpoints}, the leader that "
                f"of step {leaders:.0f}; --work-dir must be one folder that all nodes see alike"
            )
        if found is None:
            return Progress()
        self.model.load_trained_state(found["weights"])
        self.optimiser.load_state_dict(found["optimiser"])
        progress = Progress(**found["progress"])
        if not self.team.leads:
            progress.window_loss, progress.window_tokens = 0.0, 0
        if self.team.leads:
            log.info("resuming at step %d of %d", progress.step, self.steps)
        return progress
