"""ruCLIP's published layout: its ``config.json``, and where an OpenAI-layout checkpoint has its image tower.

Source: ``ruclip`` 0.0.2 (ai-forever/ru-clip, ``model.py``), which follows OpenAI's CLIP. Knows nothing about
weight files or arithmetic.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framecap.errors import CaptionerError, WeightsError
from framecap.model.json_files import read_json

if TYPE_CHECKING:
    from torch import Tensor  # a driver reads the config and loads no torch

logger = logging.getLogger(__name__)

HEAD_WIDTH = 64
PROTOTYPE_PREFIXES = ("visual_encoder.model.", "visual.", "")
_TEXT_FIELDS = ("vocab_size", "transformer_width", "transformer_heads", "transformer_layers")


@dataclass(frozen=True)
class RuClipConfig:
    """Shapes of a ruCLIP checkpoint, under the names of its published ``config.json``.

    Image heads are ``vision_width // 64``. The text tower is absent when ``transformer_layers`` is 0.
    ``mean`` and ``std`` default to CLIP's, as in ``ruclip/processor.py``.
    """

    embed_dim: int
    image_resolution: int
    vision_layers: int
    vision_width: int
    vision_patch_size: int
    context_length: int = 77
    vocab_size: int = 0
    transformer_width: int = 0
    transformer_heads: int = 0
    transformer_layers: int = 0
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_file(cls, path: str | Path) -> RuClipConfig:
        """Read ``config.json``. CaptionerError names what it lacks; unknown keys are logged."""
        content: dict[str, Any] = read_json(path)
        known = {field.name for field in fields(cls)}
        strangers = sorted(set(content) - known)
        if strangers:
            logger.warning("%s: keys without a meaning for ruCLIP: %s", path, ", ".join(strangers))
        values = {name: value for name, value in content.items() if name in known and value is not None}
        for name in ("mean", "std"):
            if name in values:
                values[name] = tuple(float(number) for number in values[name])
        try:
            config = cls(**values)
        except TypeError as error:
            raise CaptionerError(
                f"{path} is no ruCLIP config ({error}); it needs {', '.join(sorted(known))}."
            ) from None
        config.check(path)
        return config

    def check(self, source: str | Path) -> None:
        """Raise CaptionerError for shapes that no tower can have; ``source`` goes into the message."""
        shapes = {name: value for name, value in asdict(self).items() if name not in ("mean", "std")}
        needed = [name for name in shapes if name not in _TEXT_FIELDS or self.transformer_layers]
        wrong = [f"{n}={shapes[n]!r}" for n in needed if not isinstance(shapes[n], int) or shapes[n] <= 0]
        if not wrong and self.vision_width % HEAD_WIDTH:
            wrong = [f"vision_width={self.vision_width} (must be a multiple of {HEAD_WIDTH})"]
        if not wrong and self.transformer_layers and self.transformer_width % self.transformer_heads:
            wrong = [f"transformer_width={self.transformer_width} for {self.transformer_heads} heads"]
        if len(self.mean) != 3 or len(self.std) != 3:
            wrong.append("mean and std must have three numbers")
        if wrong:
            raise CaptionerError(f"{source}: impossible ruCLIP shapes: {', '.join(wrong)}.")

    def to_json(self) -> dict[str, object]:
        """The published ``config.json``: without the text tower's fields where there is no text tower."""
        content = asdict(self)
        return {name: value for name, value in content.items() if self.transformer_layers or name not in _TEXT_FIELDS}


def openai_image_tower(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The image tower of an OpenAI-layout state dict, as ``visual.*``; WeightsError if there is none."""
    for prefix in PROTOTYPE_PREFIXES:
        if f"{prefix}conv1.weight" in state:
            tower = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            return {f"visual.{name}": tensor for name, tensor in tower.items()}
    prefixes = ", ".join(f"{prefix}conv1.weight" for prefix in PROTOTYPE_PREFIXES)
    raise WeightsError(f"{source} holds no image tower in OpenAI's layout: none of {prefixes} is there.")


def config_from_shapes(state: Mapping[str, Tensor], source: str | Path) -> RuClipConfig:
    """Read the config of an image tower (``visual.*``) off its tensors' shapes."""
    needed = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj")
    lacking = [name for name in needed if name not in state]
    if lacking or any(state[name].dim() != dims for name, dims in zip(needed, (4, 2, 2), strict=True)):
        raise WeightsError(f"{source}: the shapes cannot be read from {', '.join(needed)}; lacking: {lacking}.")
    width, _, _, patch = state["visual.conv1.weight"].shape
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    blocks = {name.split(".")[3] for name in state if name.startswith("visual.transformer.resblocks.")}
    config = RuClipConfig(
        embed_dim=state["visual.proj"].shape[1],
        image_resolution=grid * patch,
        vision_layers=len(blocks),
        vision_width=width,
        vision_patch_size=patch,
    )
    config.check(source)
    return config
