"""How the mini captioner's encoder learns: image and text towers, contrastively, with auxiliary heads.

The contrastive loss is CLIP's (Radford et al. 2021). So that minutes on two CPU cores are enough, linear heads
also read kind, colour, relation, setting … from the pooled embedding and from the patch features; they are
dropped afterwards and never reach the captioner. A decoder reads the patches along the way and its caption
loss is added (CoCa, Yu et al. 2022); the bridge training starts from it. Real ruCLIP towers had neither.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from framecap.demo.caption_reader import CaptionReader, TokenRows
from framecap.demo.pictures import PATCH_LABELS, SCENE_LABELS, Pictures
from framecap.model.images import normalise
from framecap.model.ruclip import ImageFeatures, RuClip

logger = logging.getLogger(__name__)
READER_SUFFIX = ".reader.pt"


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


def _auxiliary_loss(
    heads: AuxiliaryHeads, features: ImageFeatures, scene: Tensor, patch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_scene, of_patch = heads(features)
    scene_loss = sum(F.cross_entropy(logits, scene[:, i]) for i, logits in enumerate(of_scene))
    patch_loss = sum(
        F.cross_entropy(logits.flatten(0, 1), patch[..., i].flatten()) for i, logits in enumerate(of_patch)
    )
    right = torch.stack([logits.argmax(-1) == scene[:, i] for i, logits in enumerate(of_scene[:6])]).all(0)
    return torch.as_tensor(scene_loss), torch.as_tensor(patch_loss), right.float().mean()


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


def train_encoder(
    encoder: RuClip,
    train: Pictures,
    test: Pictures,
    minutes: float,
    checkpoint: Path,
    reader: CaptionReader,
    seed: int = 0,
    batch_size: int = 64,
    peak_rate: float = 1e-3,
) -> None:
    """Train both towers for ``minutes``; the latest state is kept in ``checkpoint`` (published layout).

    ``reader`` gives the caption loss of a batch and learns along.
    """
    config = encoder.config
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    heads = AuxiliaryHeads(config.embed_dim, config.vision_width).to(encoder.device)
    groups = parameter_groups([encoder, heads, reader.bridge, reader.decoder], 0.05)
    optimiser = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98))
    ids = encoder.tokenize(train.captions)
    ids = ids[:, : int((ids != 0).sum(1).max())]
    rows_of = reader.token_rows(train.captions)
    start, step, order, saved = time.monotonic(), 0, np.empty(0, dtype=np.int64), time.monotonic()
    while (elapsed := (time.monotonic() - start) / 60) < minutes:
        if len(order) < batch_size:
            order = rng.permutation(len(train.captions))
        rows, order = order[:batch_size], order[batch_size:]
        for group in optimiser.param_groups:
            group["lr"] = peak_rate * progress_rate(elapsed / minutes)
        loss, parts = _step_loss(encoder, heads, reader, train, ids, rows_of, rows)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)  # type: ignore[attr-defined]
        optimiser.step()
        with torch.no_grad():
            encoder.logit_scale.clamp_(max=math.log(100))
        step += 1
        if step % 200 == 0:
            logger.info(
                "encoder step %d  %.1f min  contrastive %.3f  scene %.3f  patch %.3f  caption %.3f  right %.3f",
                step, elapsed, *parts,
            )  # fmt: skip
        if time.monotonic() - saved > 90:
            saved = time.monotonic()
            encoder.save_pretrained(checkpoint)
            torch.save(reader.state(), checkpoint.with_suffix(READER_SUFFIX))
            logger.info("encoder step %d  unseen compositions: %s", step, probe_encoder(encoder, heads, test))
    encoder.save_pretrained(checkpoint)
    torch.save(reader.state(), checkpoint.with_suffix(READER_SUFFIX))
    logger.info("encoder finished: %d steps, %s", step, probe_encoder(encoder, heads, test))


def _step_loss(
    encoder: RuClip,
    heads: AuxiliaryHeads,
    reader: CaptionReader,
    train: Pictures,
    ids: Tensor,
    captions: TokenRows,
    rows: np.ndarray,
) -> tuple[Tensor, tuple[float, ...]]:
    config, device = encoder.config, encoder.device
    pixels = normalise(torch.from_numpy(train.pixels[rows]).to(device), config.mean, config.std)
    # At 65 tokens plain attention is faster on a CPU than the fused kernel, backwards above all.
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        features = encoder.image_features(pixels)
        texts = encoder.encode_text(ids[torch.from_numpy(rows)])
        scene = torch.from_numpy(train.scene_labels[rows]).to(device)
        patch = torch.from_numpy(train.patch_labels[rows].astype(np.int64)).to(device)
        picked = torch.from_numpy(rows)
        caption_loss = reader.loss(features, captions.ids[picked], captions.targets[picked])
        scene_loss, patch_loss, right = _auxiliary_loss(heads, features, scene, patch)
    contrastive = contrastive_loss(features.pooled, texts, encoder.logit_scale)
    parts = tuple(float(part.detach()) for part in (contrastive, scene_loss, patch_loss, caption_loss, right))
    return contrastive + 0.5 * scene_loss + 2 * patch_loss + 2 * caption_loss, parts


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
