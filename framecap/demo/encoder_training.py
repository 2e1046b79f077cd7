"""How the mini captioner's encoder learns: image and text towers, contrastively, with auxiliary heads.

The contrastive loss is CLIP's (Radford et al. 2021). So that minutes on two CPU cores are enough, linear heads
also read kind, colour, relation, setting … from the pooled embedding and from the patch features; they are
dropped afterwards and never reach the captioner. A decoder reads the patches along the way and its caption
loss is added (CoCa, Yu et al. 2022); ``train_captioner`` starts from that decoder. Real ruCLIP towers had neither.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from framecap.demo.pictures import PATCH_LABELS, SCENE_LABELS, Pictures
from framecap.model.images import normalise
from framecap.model.ruclip import ImageFeatures, RuClip
from framecap.model.rugpt import RuGpt
from framecap.training.examples import IGNORED
from framecap.training.loss import CaptionLoss

logger = logging.getLogger(__name__)
BATCH_SIZE, PEAK_RATE, JITTER, LOG_EVERY = 64, 1e-3, 4, 200
LOSS_WEIGHTS = {"contrastive": 1.0, "scene": 0.5, "patch": 2.0, "caption": 2.0}


class AuxiliaryHeads(nn.Module):
    """Linear read-outs of the scene's labels, from pooled and from patch features."""

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.scene = nn.Linear(embed_dim, sum(SCENE_LABELS.values()))
        self.patch = nn.Linear(width, sum(PATCH_LABELS.values()))

    def forward(self, features: ImageFeatures) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits per label: of scenes [N, classes], of patches [N, P, classes]."""
        scene = self.scene(features.pooled).float().split(list(SCENE_LABELS.values()), dim=-1)
        patch = self.patch(features.patches[:, 1:]).float().split(list(PATCH_LABELS.values()), dim=-1)
        return scene, patch


def contrastive_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the batch; ``images`` and ``texts`` are [N, D]."""
    similarity = logit_scale.exp() * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def labels_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropies of all labels added up; ``logits[i]`` is [..., classes of label i], ``labels`` [..., L]."""
    each = [F.cross_entropy(of.flatten(0, -2), labels[..., i].flatten()) for i, of in enumerate(logits)]
    return torch.stack(each).sum()


def caption_targets(decoder: RuGpt, captions: Sequence[str]) -> Tensor:
    """Captions as ids with ``</s>`` at the end, int64 [N, L], padded with ``IGNORED``."""
    eos = decoder.config.eos_token_id or 0
    rows = [torch.tensor([*decoder.tokenizer.encode(caption), eos]) for caption in captions]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def progress_rate(done: float, warmup: float = 0.03) -> float:
    """Warm-up, then cosine to 2 %: the share of the peak learning rate at ``done`` (0…1) of the time."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


def parameter_groups(modules: list[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """AdamW groups: matrices decay, vectors and scalars do not."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def jittered(pixels: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Pictures [N, R, R, 3] moved by up to ``JITTER`` pixels each way, their edges continued."""
    count, side = pixels.shape[:2]
    down, right = rng.integers(-JITTER, JITTER + 1, (2, count, 1))
    rows = np.clip(np.arange(side) + down, 0, side - 1)
    columns = np.clip(np.arange(side) + right, 0, side - 1)
    moved: npt.NDArray[np.uint8] = pixels[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved


class EncoderTraining:
    """Both towers, the auxiliary heads and the reader, learning together for a given time.

    ``encoder`` and ``reader`` are on the device to learn on.
    """

    def __init__(self, encoder: RuClip, reader: CaptionLoss, train: Pictures, seed: int) -> None:
        config = encoder.config
        torch.manual_seed(seed)
        self.encoder, self.reader, self.pictures = encoder, reader, train
        self.heads = AuxiliaryHeads(config.embed_dim, config.vision_width).to(encoder.device)
        self.rng = np.random.default_rng(seed)
        ids = encoder.tokenize(train.captions)
        self.texts = ids[:, : int((ids != 0).sum(1).max())]
        self.targets = caption_targets(reader.decoder, train.captions)
        groups = parameter_groups([encoder, self.heads, reader], 0.05)
        self.parameters = [p for module in (encoder, self.heads, reader) for p in module.parameters()]
        self.optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))

    def train(self, minutes: float, test: Pictures) -> None:
        """Take steps at the scheduled rate until the time is over; a line of losses every ``LOG_EVERY``."""
        start, step, order = time.monotonic(), 0, np.empty(0, dtype=np.int64)
        while (elapsed := (time.monotonic() - start) / 60) < minutes:
            if len(order) < BATCH_SIZE:
                order = self.rng.permutation(len(self.pictures.captions))
            rows, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            losses = self.step(rows, PEAK_RATE * progress_rate(elapsed / minutes))
            step += 1
            if step % LOG_EVERY == 0:
                named = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
                logger.info("encoder step %d  %.1f min  %s", step, elapsed, named)
            if step % (5 * LOG_EVERY) == 0:
                logger.info("unseen compositions: %s", probe_encoder(self.encoder, self.heads, test))
        logger.info("encoder finished: %d steps, %s", step, probe_encoder(self.encoder, self.heads, test))

    def step(self, rows: npt.NDArray[np.int64], rate: float) -> dict[str, float]:
        """Learn from the pictures ``rows`` (int64 [B]) at this learning rate; the losses by name, unweighted."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        losses = self._losses(rows)
        total = torch.stack([LOSS_WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        with torch.no_grad():
            self.encoder.logit_scale.clamp_(max=math.log(100))
        return {name: loss.item() for name, loss in losses.items()}

    def _losses(self, rows: npt.NDArray[np.int64]) -> dict[str, Tensor]:
        encoder, train = self.encoder, self.pictures
        config, device, picked = encoder.config, encoder.device, torch.from_numpy(rows)
        pixels = torch.from_numpy(jittered(train.pixels[rows], self.rng)).to(device)
        targets = self.targets[picked]
        targets = targets[:, : int((targets != IGNORED).sum(1).max())].to(device)
        # At 65 tokens plain attention is faster on a CPU than the fused kernel, backwards above all.
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            features = encoder.image_features(normalise(pixels, config.mean, config.std))
            texts = encoder.encode_text(self.texts[picked])
            scene, patch = self.heads(features)
            caption = self.reader(features, targets) / (targets != IGNORED).sum()
        return {
            "contrastive": contrastive_loss(features.pooled, texts, encoder.logit_scale),
            "scene": labels_loss(scene, torch.from_numpy(train.scene_labels[rows]).to(device)),
            "patch": labels_loss(patch, torch.from_numpy(train.patch_labels[rows].astype(np.int64)).to(device)),
            "caption": caption,
        }


@torch.no_grad()
def probe_encoder(encoder: RuClip, heads: AuxiliaryHeads, test: Pictures, rows: int = 512) -> str:
    """What the heads read from unseen compositions, label by label, and the share all right in six."""
    config = encoder.config
    encoder.eval()
    pixels = normalise(torch.from_numpy(test.pixels[:rows]).to(encoder.device), config.mean, config.std)
    features = encoder.image_features(pixels)
    texts = encoder.encode_text(encoder.tokenize(test.captions[:rows]))
    of_scene, _ = heads(features)
    scene = torch.from_numpy(test.scene_labels[:rows]).to(encoder.device)
    right = torch.stack([logits.argmax(-1) == scene[:, i] for i, logits in enumerate(of_scene)])
    similarity = F.normalize(features.pooled, dim=-1) @ F.normalize(texts, dim=-1).T
    pairs = (similarity.diagonal()[:, None] > similarity).float().sum() / (len(texts) * (len(texts) - 1))
    encoder.train()
    table = "  ".join(f"{name} {share:.3f}" for name, share in zip(SCENE_LABELS, right.float().mean(1), strict=True))
    return f"all {right[:6].all(0).float().mean():.3f}  pairs {pairs:.4f}  {table}"
