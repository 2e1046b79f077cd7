"""Checkpoints of a run: written whole, the newest two kept, resumed only by the same run."""

from __future__ import annotations

import logging
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framecap.errors import TrainingError
from framecap.training.disk import replace_file

log = logging.getLogger(__name__)

KEPT = 2
BEST = "best.pt"


@dataclass
class Progress:
    """Where a run stands: steps done, best validation loss and its step, validations since, running sums."""

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    validations_without_gain: int = 0
    validation_loss: float = float("nan")
    train_loss: float = float("nan")
    window_loss: float = 0.0
    window_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def validated(self) -> bool:
        """Whether a validation loss was ever seen."""
        return self.best_loss < float("inf")


def save_checkpoint(
    folder: Path, identity: dict[str, Any], progress: Progress, weights: dict[str, Tensor], optimiser: dict[str, Any]
) -> None:
    """Write ``step-N.pt`` and drop all but the newest two.

    Raises TrainingError on a full disk, and for what is NaN or infinite: a run that resumes from that never
    recovers, and the checkpoints before it would be gone.
    """
    if broken := _not_finite({"weights": weights, "optimiser": optimiser}):
        raise TrainingError(
            f"{broken} is NaN or infinite after step {progress.step} and is not saved; {fresh_start(folder)}"
        )
    content = {
        "identity": identity,
        "progress": asdict(progress),
        "weights": weights,
        "optimiser": optimiser,
    }
    with replace_file(folder / f"step-{progress.step:09d}.pt") as stream:
        torch.save(content, stream)
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest readable checkpoint of this very run, or None; tensors on the CPU.

    Raises TrainingError when the folder holds a run with other settings.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            log.warning("%s cannot be read (%s); trying the one before", path, error)
            continue
        _check_identity(path, content["identity"], identity)
        if broken := _not_finite({"weights": content["weights"], "optimiser": content["optimiser"]}):
            log.warning("%s is of no use (%s is NaN or infinite); trying the one before", path, broken)
            continue
        return content
    return None


def save_best(folder: Path, weights: dict[str, Tensor]) -> None:
    """Keep the weights with the lowest validation loss."""
    with replace_file(folder / BEST) as stream:
        torch.save(weights, stream)


def load_best(folder: Path) -> dict[str, Tensor]:
    """What ``save_best`` kept."""
    weights: dict[str, Tensor] = torch.load(folder / BEST, map_location="cpu", weights_only=True)
    return weights


def fresh_start(folder: Path) -> str:
    """What to do about a run that has left the numbers; a changed rate is another run, see `load_checkpoint`."""
    return f"use a lower --learning-rate or --precision fp32, and remove {folder} first"


def _not_finite(state: Any, name: str = "") -> str:
    """The name of a tensor in ``state`` (dicts and lists of them) that holds NaN or an infinity; "" if none does."""
    if isinstance(state, Tensor):
        return name if state.is_floating_point() and not bool(state.isfinite().all()) else ""
    inner = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return next(filter(None, (_not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in inner)), "")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _check_identity(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        key = changed[0]
        raise TrainingError(
            f"{path.parent.parent} holds a run with {key} = {found.get(key)!r}, this one has {wanted[key]!r}; "
            "give another --work-dir, or remove that folder"
        )
