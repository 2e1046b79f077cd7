"""Make captioner directories: from parts as published, or from a ClipCap checkpoint.

ClipCap: github.com/rmokady/CLIP_prefix_caption (Mokady et al. 2021, arXiv:2111.09734); the Russian one is
AlexWortega/ruImageCaptioning (``coco_prefix_latest.pt``: OpenAI-layout ViT-B/32, ruGPT3-small, prefix 10, MLP).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from framecap.errors import CaptionerError, MissingFileError, SettingsError, StateDictError
from framecap.model.bridge import BridgeConfig, build_bridge
from framecap.model.captioner import BRIDGE_PREFIX, BRIDGE_WEIGHTS, load_bridge
from framecap.model.captioner_config import CONFIG_NAME, CaptionerConfig, check_fit
from framecap.model.ruclip import RuClip
from framecap.model.rugpt import RuGpt
from framecap.model.weights import check_layout, find_weights, read_state_dict, write_state_dict
from framecap.storage import MANIFEST, sha256_file

CLIPCAP_DECODER, CLIPCAP_BRIDGE = "gpt.", "clip_project."
CLIPCAP_STOP = "."
CHECKPOINT_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "bpe.model",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    }
)


def write_manifest(directory: str | Path) -> None:
    """Write manifest.json: sha256 and size in bytes of every file below ``directory``, in name order."""
    root = Path(directory)
    files = {
        path.relative_to(root).as_posix(): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (root / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def assemble(
    encoder: str | Path,
    decoder: str | Path,
    bridge: str | Path,
    out: str | Path,
    config: CaptionerConfig | None = None,
) -> Path:
    """Put an encoder, a decoder and a bridge together as a captioner directory at ``out``; return its path.

    ``encoder``: a ruCLIP checkpoint directory, or the prototype's file ``ViT-B32-small.pt`` (OpenAI layout).
    ``decoder``: a ruGPT3 checkpoint directory. ``bridge``: ``bridge.safetensors`` (its ``config`` must then be
    given or lie beside it as config.json), or a ClipCap checkpoint (``.pt``), whose tuned decoder weights are
    taken too. ``out`` appears whole or not at all.

    Raises:
        MissingFileError, WeightsError, StateDictError, BridgeMismatchError: a part does not fit.
        SettingsError: ``out`` exists and is not empty.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingsError(f"{target} exists and is not empty; give a folder that does not exist yet")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assemble-", dir=target.parent) as temporary:
        staged = Path(temporary) / "captioner"
        staged.mkdir()
        _place_encoder(Path(encoder), staged / "encoder")
        state = read_state_dict(_existing(bridge))
        if any(name.startswith(CLIPCAP_BRIDGE) for name in state):
            import_clipcap(state, Path(decoder), staged, source=str(bridge))
        else:
            _copy_checkpoint(Path(decoder), staged / "decoder")
            write_state_dict(staged / BRIDGE_WEIGHTS, state)
            (config or _config_beside(Path(bridge))).write(staged / CONFIG_NAME)
        check_captioner(staged)
        write_manifest(staged)
        staged.replace(target)
    return target


def import_clipcap(state: Mapping[str, Tensor], decoder: Path, out: Path, source: str) -> CaptionerConfig:
    """Write decoder/, bridge.safetensors and config.json of a ClipCap checkpoint below ``out``.

    ``state``: ``clip_project.*`` and, unless only the mapper was trained, ``gpt.*`` (old attention buffers and
    all); ``decoder``: the ruGPT3 directory it was trained from, for config and tokenizer.

    Raises:
        StateDictError: keys outside ``gpt.`` and ``clip_project.``, or of the wrong shape.
    """
    foreign = [name for name in state if not name.startswith((CLIPCAP_DECODER, CLIPCAP_BRIDGE))]
    if foreign:
        raise StateDictError(source, unexpected=foreign)
    tuned = {k.removeprefix(CLIPCAP_DECODER): v for k, v in state.items() if k.startswith(CLIPCAP_DECODER)}
    mapper = {k.removeprefix(CLIPCAP_BRIDGE): v for k, v in state.items() if k.startswith(CLIPCAP_BRIDGE)}
    model = RuGpt.from_pretrained(decoder)
    if tuned:
        model.load_published_state({name: tensor.float() for name, tensor in tuned.items()}, source)
    model.save_pretrained(out / "decoder")
    bridge = clipcap_bridge_config(mapper, model.config.n_embd, source)
    check_layout(build_bridge(bridge).state_dict(), mapper, source)
    write_state_dict(out / BRIDGE_WEIGHTS, {BRIDGE_PREFIX + k: v.float() for k, v in mapper.items()})
    config = CaptionerConfig(bridge, stop=(CLIPCAP_STOP,))
    config.write(out / CONFIG_NAME)
    return config


def clipcap_bridge_config(mapper: Mapping[str, Tensor], decoder_size: int, source: str) -> BridgeConfig:
    """Kind and sizes of a ClipCap ``clip_project``, read from its tensors' shapes.

    Raises:
        CaptionerError: neither an MLP of two layers, one linear layer, nor a transformer mapper.
    """
    if "prefix_const" in mapper and "linear.weight" in mapper:
        prefix_length = mapper["prefix_const"].shape[0]
        width, feature_size = mapper["linear.weight"].shape
        layers = {m[1] for name in mapper if (m := re.match(r"transformer\.layers\.(\d+)\.", name))}
        return BridgeConfig(
            "transformer",
            feature_size=feature_size,
            decoder_size=decoder_size,
            prefix_length=prefix_length,
            clip_length=width // decoder_size,
            num_layers=len(layers),
        )
    if "model.0.weight" in mapper and "model.2.weight" in mapper:
        out, feature_size = mapper["model.2.weight"].shape[0], mapper["model.0.weight"].shape[1]
        return BridgeConfig("mlp", feature_size, decoder_size, prefix_length=out // decoder_size)
    if set(mapper) == {"weight", "bias"}:  # the published notebook: one nn.Linear for long prefixes
        out, feature_size = mapper["weight"].shape
        return BridgeConfig("linear", feature_size, decoder_size, prefix_length=out // decoder_size)
    raise CaptionerError(
        f"{source}: clip_project has the keys {', '.join(sorted(mapper)[:6])}…, which is none of ClipCap's mappers; "
        "known: an MLP of two layers, one linear layer, the transformer mapper."
    )


def check_captioner(directory: Path) -> None:
    """Load every part of a captioner directory strictly, on the CPU; raise what does not fit."""
    config = CaptionerConfig.from_file(directory / CONFIG_NAME)
    encoder = RuClip.from_pretrained(directory / "encoder")
    decoder = RuGpt.from_pretrained(directory / "decoder", cross_attention=config.bridge.kind == "cross_attention")
    check_fit(config.bridge, encoder.config, decoder.config)
    load_bridge(directory / BRIDGE_WEIGHTS, build_bridge(config.bridge), decoder)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise MissingFileError(f"bridge {path} does not exist; give bridge.safetensors or a ClipCap checkpoint (.pt)")
    return Path(path)


def _place_encoder(source: Path, target: Path) -> None:
    if source.is_file():
        RuClip.from_prototype(source).save_pretrained(target)
    else:
        _copy_checkpoint(source, target)


def _copy_checkpoint(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint as published, and nothing else that lies in the folder."""
    weights = find_weights(source)
    target.mkdir()
    for file in weights:
        shutil.copyfile(file, target / file.name)
    for file in source.iterdir():
        if file.name in CHECKPOINT_FILES or (file.name.endswith(".index.json") and len(weights) > 1):
            shutil.copyfile(file, target / file.name)


def _config_beside(bridge: Path) -> CaptionerConfig:
    path = bridge.with_name(CONFIG_NAME)
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist; a bridge's config.json lies beside {bridge.name} (or pass --config)"
        )
    return CaptionerConfig.from_file(path)
