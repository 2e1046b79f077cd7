"""Operations and bytes that a frame needs, counted from shapes. A multiplication with its addition is two."""

from __future__ import annotations

from framecap.bench.measure import Work
from framecap.model.ruclip_layout import RuClipConfig
from framecap.model.rugpt_config import RuGptConfig


def encode_work(config: RuClipConfig, batch: int, item_bytes: int) -> Work:
    """One frame through the image tower; its weights are read once a batch, activations stay in caches."""
    side = config.image_resolution // config.vision_patch_size
    tokens, width = side * side + 1, config.vision_width
    weights = config.vision_layers * 12 * width**2
    patches = 3 * config.vision_patch_size**2 * width
    attention = config.vision_layers * 4 * tokens**2 * width
    operations = 2 * (tokens * weights + side * side * patches + width * config.embed_dim) + attention
    read = (weights + patches + width * config.embed_dim) * item_bytes / batch
    return Work(operations, read + 3 * config.image_resolution**2)


def generate_work(
    config: RuGptConfig, prefix: int, mean_length: float, batch: int, beams: int, item_bytes: int
) -> Work:
    """One caption of ``mean_length`` tokens and ``</s>``: the prefix once, then a token per beam and step.

    Weights are read once a step for all rows, keys and values once per row (a beam's prefix is shared).
    """
    width, steps = config.n_embd, mean_length + 1
    weights = config.n_layer * (4 * width**2 + 2 * width * (config.n_inner or 4 * width))
    head = config.vocab_size * width
    tokens = beams * mean_length  # fed after the prefix
    attention = config.n_layer * 4 * width * (prefix**2 / 2 + tokens * (prefix + mean_length / 2))
    operations = 2 * (weights * (prefix + tokens) + head * (1 + tokens)) + attention
    cache = 2 * config.n_layer * width * item_bytes * (prefix + beams * mean_length / 2) * mean_length
    return Work(operations, (weights + head) * item_bytes * steps / batch + cache)
