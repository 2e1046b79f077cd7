"""A captioner of published shape with random weights whose captions have lengths drawn beforehand.

No weights need to be downloaded to measure speed, but the lengths of captions decide it. Here they lie in the
weights, so that every contestant meets them in the same manner, without hooks: each token of the vocabulary
has a length of its own in one coordinate of its embedding, a caption repeats its first token (input and output
embeddings are tied), and the position embedding lets ``</s>`` win once the length of that token is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from framecap.errors import SettingsError
from framecap.model.bpe import GptTokenizer
from framecap.model.bridge import build_bridge
from framecap.model.bridge_config import BridgeConfig
from framecap.model.captioner import Captioner
from framecap.model.captioner_config import CaptionerConfig
from framecap.model.images import normalise
from framecap.model.ruclip import RuClip
from framecap.model.ruclip_layout import RuClipConfig
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig

# embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size: the published image towers.
ENCODERS = {
    "b32-224": RuClipConfig(512, 224, 12, 768, 32),
    "b16-224": RuClipConfig(512, 224, 12, 768, 16),
    "b32-384": RuClipConfig(512, 384, 12, 768, 32),
    "b16-384": RuClipConfig(512, 384, 12, 768, 16),
    "l14-224": RuClipConfig(768, 224, 24, 1024, 14),
    "l14-336": RuClipConfig(768, 336, 24, 1024, 14),
    "tiny": RuClipConfig(32, 64, 2, 64, 32),
}
# ruGPT3's small, medium and large.
DECODERS = {
    "small": RuGptConfig(50264, 2048, 768, 12, 12),
    "medium": RuGptConfig(50257, 2048, 1024, 24, 16),
    "large": RuGptConfig(50257, 2048, 1536, 24, 16),
    "tiny": RuGptConfig(96, 64, 64, 2, 2),
}
BRIDGES = ("mlp", "linear", "transformer")

MEAN_LENGTH, MAX_LENGTH = 14, 40
_LENGTH_SHAPE = 8.0  # of the gamma distribution; standard deviation about 5 tokens
_CLOCK = 0  # the coordinate of the residual stream in which lengths are counted; no layer writes to it
_EMBEDDING = 0.1  # standard deviation of token embeddings
_EOS = 100.0  # length of </s>'s embedding, which points along the clock
_TICK = 1.5  # what one position adds to </s>'s score, before the last layer norm
_SHARPNESS = 11.5  # the score of the token to be repeated; half of the probability for 50,000 tokens
_BEFORE_START = -0.5  # the prefix's clock


@dataclass(frozen=True)
class CaptionerShape:
    """Names from ``ENCODERS``, ``DECODERS`` and ``BRIDGES``."""

    encoder: str = "b32-384"
    decoder: str = "small"
    bridge: str = "mlp"
    prefix_length: int = 10

    def __post_init__(self) -> None:
        for kind, known in (("encoder", ENCODERS), ("decoder", DECODERS), ("bridge", BRIDGES)):
            if getattr(self, kind) not in known:
                raise SettingsError(f"{kind} {getattr(self, kind)!r} is unknown; known: {', '.join(known)}.")


def random_captioner(
    shape: CaptionerShape, sample: Tensor, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Captioner:
    """Build a captioner; ``sample`` uint8 [N, R, R, 3] holds a few frames by which the bridge is scaled, since
    a random encoder gives almost the same features for all frames. No text tower."""
    torch.manual_seed(seed)
    encoder = RuClip.from_config(ENCODERS[shape.encoder]).eval().requires_grad_(False)
    decoder = random_decoder(DECODERS[shape.decoder], shape.prefix_length, seed)
    width = decoder.config.n_embd
    config = BridgeConfig(shape.bridge, encoder.config.embed_dim, width, shape.prefix_length)
    bridge = build_bridge(config).eval().requires_grad_(False)
    with torch.inference_mode():
        pixels = normalise(sample, encoder.config.mean, encoder.config.std)
        _spread(bridge, encoder.encode_image(pixels), shape.prefix_length)
    models = (encoder.to(device, dtype), bridge.to(device, dtype), decoder.to(device, dtype))
    return Captioner(*models, CaptionerConfig(config))


def draw_lengths(count: int, seed: int = 0, limit: int = MAX_LENGTH) -> Tensor:
    """int64 [count] caption lengths in tokens: a gamma distribution of mean 14, cut to 3 … ``limit``."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.rand(count, int(_LENGTH_SHAPE), generator=generator).clamp_min(1e-9).log()
    gamma = -parts.sum(dim=1) * MEAN_LENGTH / _LENGTH_SHAPE  # a sum of exponentials is a gamma variable
    return gamma.round().long().clamp(3, limit)


@torch.no_grad()
def random_decoder(config: RuGptConfig, prefix_length: int, seed: int = 0) -> RuGpt:
    """A decoder whose greedy captions have the lengths of ``draw_lengths``; frozen, on the CPU, float32."""
    torch.manual_seed(seed)
    model = RuGpt.from_config(config, _tokenizer(config)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            parameter.mul_(0.1)
            parameter[_CLOCK] = 0
    eos = config.eos_token_id
    if eos is None:
        raise SettingsError("the decoder's config has no eos_token_id; lengths need one.")
    tokens = torch.randn(config.vocab_size, config.n_embd) * _EMBEDDING
    tokens[:, _CLOCK] = 0
    tokens -= tokens.mean(dim=1, keepdim=True)
    own = config.n_embd * _EMBEDDING**2
    tokens *= own**0.5 / tokens.norm(dim=1, keepdim=True)
    lengths = draw_lengths(config.vocab_size, seed)
    tokens[:, _CLOCK] = (own - _TICK * (lengths - 0.5)) / _EOS
    tokens[eos] = 0
    tokens[eos, _CLOCK] = _EOS
    model.wte.weight.copy_(tokens)
    model.wpe.weight.normal_(std=_EMBEDDING / 10)
    ticks = torch.arange(config.n_positions) - (prefix_length - 1)
    model.wpe.weight[:, _CLOCK] = ticks.clamp(0, MAX_LENGTH + 1) * (_TICK / _EOS)
    model.ln_f.weight.fill_(_SHARPNESS * _EMBEDDING / own)
    model.arrange_for_small_batches()  # as after loading a checkpoint
    return model


def _tokenizer(config: RuGptConfig) -> GptTokenizer:
    """A vocabulary of made-up words, so that captions have a text."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"t{index}" for index in range(len(special), config.vocab_size))]
    return GptTokenizer.from_vocabulary({word: index for index, word in enumerate(words)}, [], special)


def random_prefixes(decoder: RuGpt, count: int, prefix_length: int, seed: int = 0) -> Tensor:
    """[count, prefix_length, E] prefixes for ``random_decoder``, on its device and in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = torch.randn(count, prefix_length, decoder.config.n_embd, generator=generator) * 0.5
    prefixes[..., _CLOCK] = _BEFORE_START
    return prefixes.to(decoder.device, decoder.dtype)


def _spread(bridge: torch.nn.Module, pooled: Tensor, prefix_length: int) -> None:
    """Scale the bridge's first layer so that the features of frames differ, and keep its clock still."""
    layers = [module for module in bridge.modules() if isinstance(module, torch.nn.Linear)]
    first, last = layers[0], layers[-1]
    deviation = pooled - pooled.mean(dim=0)
    first.weight.div_(deviation.square().mean().sqrt().clamp_min(1e-6)).mul_(4)
    first.bias.copy_(-first.weight @ pooled.mean(dim=0))
    constant = getattr(bridge, "prefix_const", None)
    if constant is None:
        last.weight.view(prefix_length, -1, last.in_features)[:, _CLOCK] = 0
        last.bias.view(prefix_length, -1)[:, _CLOCK] = _BEFORE_START
        return
    constant.zero_()
    constant[:, _CLOCK] = _BEFORE_START
    for layer in layers[1:]:
        if layer.out_features == constant.shape[1]:
            layer.weight[_CLOCK] = 0
            if layer.bias is not None:
                layer.bias[_CLOCK] = 0
