"""Training examples: which captions of which images, in an order that seed and step alone determine.

Step s takes positions [s·B, (s+1)·B) of the epochs' permutations laid end to end, so a run that resumes at
step s goes on with the same captions, and W workers share the same batch that one worker would take.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from framecap.errors import TrainingError
from framecap.model.rugpt import RuGpt
from framecap.training.features import EncodedPairs
from framecap.training.pairs import check_split
from framecap.training.settings import TrainSettings

log = logging.getLogger(__name__)

IGNORED = -100  # target of padding, torch's default ignore_index
VALIDATION_NAMES = ("val", "dev", "valid")


@dataclass(frozen=True)
class Examples:
    """One caption of one image each: ``images`` int64 [N], ``tokens`` N lists of ids that end in eos."""

    images: np.ndarray
    tokens: list[np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def token_count(self, chosen: np.ndarray) -> int:
        """Tokens to predict in the examples ``chosen``."""
        return sum(len(self.tokens[i]) for i in chosen)


def tokenise(captions: list[list[str]], decoder: RuGpt, room: int) -> tuple[list[list[np.ndarray]], int]:
    """Caption → ids and eos, at most ``room`` of them; also how many had to be cut.

    Raises TrainingError when the decoder has no eos token.
    """
    eos = decoder.config.eos_token_id
    if eos is None:
        raise TrainingError("the decoder's tokenizer has no eos token, so captions could never end")
    cut = 0
    found = []
    for texts in captions:
        group = []
        for text in texts:
            ids = decoder.tokenizer.encode(text)
            cut += len(ids) > room - 1
            group.append(np.array([*ids[: room - 1], eos], dtype=np.int64))
        found.append(group)
    return found, cut


def split_examples(
    pairs: EncodedPairs, tokens: list[list[np.ndarray]], settings: TrainSettings
) -> tuple[Examples, Examples]:
    """Training and validation examples, by the split column or by ``validation_fraction`` of the images.

    Raises TrainingError when a split is empty that should not be.
    """
    if any(split is not None for split in pairs.splits):
        validation_names = {settings.validation_split, *VALIDATION_NAMES}
        training = [i for i, split in enumerate(pairs.splits) if split == settings.train_split]
        validation = [i for i, split in enumerate(pairs.splits) if split in validation_names]
        check_split(Counter(pairs.splits), settings)
        if shared := {pairs.images[i] for i in training} & {pairs.images[i] for i in validation}:
            log.warning("%d images are in training and in validation; the validation loss is too good", len(shared))
    else:
        training, validation = _hold_out(pairs.images, settings)
    return _examples(training, tokens), _examples(validation, tokens)


def _hold_out(images: list[str], settings: TrainSettings) -> tuple[list[int], list[int]]:
    """Rows for training and for validation. All rows of one image are on the same side: else the loss of captions
    whose image was trained on would pass for that of unseen ones."""
    numbers: dict[str, int] = {}
    of_rows = [numbers.setdefault(image, len(numbers)) for image in images]
    order = np.random.default_rng([settings.seed, 1]).permutation(len(numbers))
    held_out = round(settings.validation_fraction * len(numbers))
    if settings.validation_fraction and not 0 < held_out < len(numbers):
        raise TrainingError(
            f"--validation-fraction {settings.validation_fraction} of {len(numbers)} images leaves "
            f"{len(numbers) - held_out} for training and {held_out} for validation; both need one"
        )
    unseen = set(order[:held_out].tolist())
    rows = range(len(images))
    return [i for i in rows if of_rows[i] not in unseen], [i for i in rows if of_rows[i] in unseen]


def _examples(images: list[int], tokens: list[list[np.ndarray]]) -> Examples:
    owners = [i for i in images for _ in tokens[i]]
    return Examples(np.array(owners, dtype=np.int64), [ids for i in images for ids in tokens[i]])


def batch_at(step: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """Examples of ``step`` (from 0), int64 [batch_size], out of ``count``."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // count
    parts = [_order(seed, int(e), count)[positions[epochs == e] - e * count] for e in np.unique(epochs)]
    return np.concatenate(parts)


@lru_cache(maxsize=2)  # a batch lies in one epoch or on the border of two
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of ``count`` examples that ``epoch`` takes."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


def shares(batch: np.ndarray, rank: int, world: int, pieces: int) -> Iterator[np.ndarray]:
    """What worker ``rank`` of ``world`` does of ``batch``, in ``pieces`` passes."""
    yield from (piece for piece in np.array_split(batch[rank::world], pieces) if len(piece))


def collate(examples: Examples, chosen: np.ndarray, device: torch.device) -> Tensor:
    """Target ids int64 [B, T], right-padded with ``IGNORED``."""
    longest = max(len(examples.tokens[i]) for i in chosen)
    rows = np.full((len(chosen), longest), IGNORED, dtype=np.int64)
    for row, i in zip(rows, chosen, strict=True):
        row[: len(examples.tokens[i])] = examples.tokens[i]
    return torch.from_numpy(rows).to(device)
