"""Training on text alone: a text embedding stands in for the image that nobody has.

Both towers of ruCLIP embed into one space, so a bridge that learns to read noisy text embeddings reads image
embeddings, too (CapDec: Nukrai et al. 2022, "Text-Only Training for Image Captioning using Noise-Injected CLIP"). The
noise covers the gap between a text and its image. Where a few pairs show that gap, its size is measured, and the two
means can be subtracted. Knows nothing of decoders or of the training loop.
"""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from framecap.errors import FrameError, SettingsError
from framecap.model.bridge import Bridge, PrefixBridge
from framecap.model.ruclip import RuClip
from framecap.training.disk import replace_file
from framecap.training.features import encode_texts
from framecap.training.pairs import plan_units, read_unit
from framecap.training.settings import TrainSettings

log = logging.getLogger(__name__)

CAPDEC_VARIANCE = 0.016  # of each of 640 features of length-1 embeddings; Nukrai et al. 2022, section 4
MOST_PAIRS = 500  # pairs that the gap is measured on
FILE = "text_space.json"


@dataclass(frozen=True)
class TextSpace:
    """How texts become stand-ins for images.

    ``variance`` of the Gaussian noise on each feature of an embedding of length 1; ``shift`` float32 [D], mean of the
    texts less mean of the images: zero unless centred.
    """

    variance: float
    shift: np.ndarray

    def noise(self, seed: int, step: int, rows: int) -> np.ndarray:
        """The noise of one batch, float32 [rows, D]: the same for the same seed and step, whoever asks."""
        drawn = np.random.default_rng([seed, 3, step]).standard_normal((rows, len(self.shift)), dtype=np.float32)
        return drawn * np.float32(self.variance**0.5)

    def save(self, folder: Path) -> None:
        """Leave it in the run's folder for the workers."""
        with replace_file(folder / FILE) as stream:
            stream.write(json.dumps({"variance": self.variance, "shift": self.shift.tolist()}).encode())

    @classmethod
    def load(cls, folder: Path) -> TextSpace:
        """What ``save`` left."""
        values = json.loads((folder / FILE).read_bytes())
        return cls(values["variance"], np.array(values["shift"], dtype=np.float32))


def measure_text_space(settings: TrainSettings, device: str) -> TextSpace:
    """The noise and the shift that ``settings`` ask for, measured on ``--gap-pairs`` where it is given.

    Raises SettingsError for too few pairs, TrainingError for pairs that cannot be read.
    """
    encoder = RuClip.from_pretrained(settings.encoder, device)
    size = encoder.config.embed_dim
    variance = CAPDEC_VARIANCE
    shift: np.ndarray = np.zeros(size, dtype=np.float32)
    if settings.gap_pairs:
        images, texts = _embed_pairs(encoder, settings)
        gap = texts.mean(0) - images.mean(0)
        if settings.center:
            shift = gap
        variance = float(np.mean((texts - images - shift) ** 2))
        log.info("%d pairs: variance of texts about their images %.5f a feature", len(images), variance)
    if settings.noise_variance is not None:
        variance = settings.noise_variance
    return TextSpace(variance, shift)


def _embed_pairs(encoder: RuClip, settings: TrainSettings) -> tuple[np.ndarray, np.ndarray]:
    """L2-normalised image and text embeddings of the first pairs that can be used, float32 [N, D] each."""
    plain = {"train_on": "pairs", "noise_variance": None, "gap_pairs": "", "center": False}
    units, columns = plan_units(settings.model_copy(update={"pairs": settings.gap_pairs} | plain))
    images, texts = [], []
    usable = (pair for unit in units for pair in read_unit(unit, columns) if not pair.problem)
    for pair in itertools.islice(usable, MOST_PAIRS):
        try:
            pixels = encoder.preprocess([pair.image or b""])
        except FrameError:
            continue  # a damaged picture tells nothing of the gap
        with torch.inference_mode():
            images.append(encoder.encode_image(pixels).float().cpu().numpy())
        texts.append(encode_texts(encoder, pair.captions[:1]))
    if len(images) < 2:
        raise SettingsError(f"--gap-pairs {settings.gap_pairs} has {len(images)} usable pairs; give 2 or more")
    return _normalised(np.concatenate(images)), _normalised(np.concatenate(texts))


def _normalised(embeddings: np.ndarray) -> np.ndarray:
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)


@torch.no_grad()
def move_to_images(bridge: Bridge, space: TextSpace) -> None:
    """Make a bridge that learnt from texts read images: its first matrix sees each image moved by the shift.

    W(x + shift) + b = Wx + (b + W shift), so only the bias changes and the result is an ordinary bridge.
    """
    assert isinstance(bridge, PrefixBridge), "TrainSettings refuses patch features"
    layer = bridge.first_layer
    layer.bias.add_(layer.weight @ torch.from_numpy(space.shift).to(layer.weight))
