"""Make captioner directories: from parts as published, or from a ClipCap checkpoint.

ClipCap: github.com/rmokady/CLIP_prefix_caption (Mokady et al. 2021, arXiv:2111.09734); the Russian one is
AlexWortega/ruImageCaptioning (``coco_prefix_latest.pt``: OpenAI's ViT-B/32, ruGPT3-small, prefix 10, MLP).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from framecap.errors import BridgeMismatchError, CaptionerError, MissingFileError, SettingsError, StateDictError
from framecap.manifest import write_manifest
from framecap.model.bridge import build_bridge
from framecap.model.bridge_config import BridgeConfig
from framecap.model.captioner import BRIDGE_PREFIX, BRIDGE_WEIGHTS, load_bridge_state
from framecap.model.captioner_config import CONFIG_NAME, CaptionerConfig, check_fit
from framecap.model.ruclip import RuClip
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.weights import check_layout, find_weights, index_of, read_state_dict, write_state_dict

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


def assemble(
    encoder: str | Path,
    decoder: str | Path,
    bridge: str | Path,
    out: str | Path,
    config: CaptionerConfig | None = None,
) -> Path:
    """Put an encoder, a decoder and a bridge together as a captioner directory at ``out``; return its path.

    ``encoder``: a ruCLIP checkpoint directory, or one file in OpenAI's layout, which gives an image tower alone:
    ``ViT-B-32.pt`` as OpenAI publishes it (a TorchScript archive, whose code is not run), or the prototype's
    ``ViT-B32-small.pt``. ``decoder``: a ruGPT3 checkpoint directory. ``bridge``: ``bridge.safetensors`` (its
    ``config`` must then be given or lie beside it as config.json), or a ClipCap checkpoint (``.pt``), whose tuned
    decoder weights are taken too and whose tensors say the bridge's sizes. With it ``config`` is needed only for what
    they do not say: ``num_heads`` other than 8, ``normalize_features``, ``stop`` other than ".".

    All parts are loaded where they lie before anything is written, so that an error names the file that was given;
    ``out`` appears whole or not at all.

    Raises:
        MissingFileError, WeightsError, StateDictError, BridgeMismatchError: a part does not fit.
        SettingsError: ``out`` exists and is not empty.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingsError(f"{target} exists and is not empty; give a folder that does not exist yet")
    tower = _load_encoder(Path(encoder))
    state = read_state_dict(_existing(bridge))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assemble-", dir=target.parent) as temporary:
        staged = Path(temporary) / "captioner"
        staged.mkdir()
        if any(name.startswith(CLIPCAP_BRIDGE) for name in state):
            written = import_clipcap(state, Path(decoder), staged, str(bridge), config)
            check_fit(written.bridge, tower.config, RuGptConfig.from_json(Path(decoder) / CONFIG_NAME))
        else:
            written = config or _config_beside(Path(bridge), state)
            check_fit(written.bridge, tower.config, RuGptConfig.from_json(Path(decoder) / CONFIG_NAME))
            _place_decoder_and_bridge(state, Path(decoder), staged, str(bridge), written)
        written.write(staged / CONFIG_NAME)
        _place_encoder(tower, Path(encoder), staged / "encoder")
        write_manifest(staged)
        staged.replace(target)
    return target


def import_clipcap(
    state: Mapping[str, Tensor], decoder: Path, out: Path, source: str, config: CaptionerConfig | None = None
) -> CaptionerConfig:
    """Write decoder/ and bridge.safetensors of a ClipCap checkpoint below ``out``; return the captioner's config.

    ``state``: ``clip_project.*`` and, unless only the mapper was trained, ``gpt.*`` (old attention buffers and
    all); ``decoder``: the ruGPT3 directory it was trained from, for config and tokenizer; ``config``: what the
    tensors do not say, see ``assemble``.

    Raises:
        StateDictError: keys outside ``gpt.`` and ``clip_project.``, or of the wrong shape.
        BridgeMismatchError: ``config`` asks for another bridge than the tensors are.
    """
    foreign = [name for name in state if not name.startswith((CLIPCAP_DECODER, CLIPCAP_BRIDGE))]
    if foreign:
        raise StateDictError(source, unexpected=foreign)
    tuned = {k.removeprefix(CLIPCAP_DECODER): v for k, v in state.items() if k.startswith(CLIPCAP_DECODER)}
    mapper = {k.removeprefix(CLIPCAP_BRIDGE): v for k, v in state.items() if k.startswith(CLIPCAP_BRIDGE)}
    if set(mapper) == {"weight", "bias"}:  # one nn.Linear, as ClipCap's notebooks have it for prefixes beyond 10
        mapper = {f"linear.{name}": tensor for name, tensor in mapper.items()}
    model = RuGpt.from_pretrained(decoder)
    if tuned:
        model.load_published_state({name: tensor.float() for name, tensor in tuned.items()}, source)
    bridge = clipcap_bridge_config(mapper, model.config.n_embd, source, config.bridge if config else None)
    check_layout(build_bridge(bridge).state_dict(), mapper, source)
    model.save_pretrained(out / "decoder")
    write_state_dict(out / BRIDGE_WEIGHTS, {BRIDGE_PREFIX + k: v.float() for k, v in mapper.items()})
    return CaptionerConfig(bridge, config.stop if config else (CLIPCAP_STOP,), config.domain if config else None)


def clipcap_bridge_config(
    mapper: Mapping[str, Tensor], decoder_size: int, source: str, asked: BridgeConfig | None = None
) -> BridgeConfig:
    """Kind and sizes of a ClipCap ``clip_project``, read from its tensors' shapes.

    ``num_heads`` and ``normalize_features`` are in no tensor: they are those of ``asked``, or ClipCap's defaults.

    Raises:
        CaptionerError: neither an MLP of two layers, one linear layer, nor a transformer mapper.
        BridgeMismatchError: ``asked`` has another kind or another size.
    """
    sizes = _mapper_sizes(mapper, decoder_size, source)
    unsaid = {"num_heads": asked.num_heads, "normalize_features": asked.normalize_features} if asked else {}
    found = BridgeConfig.from_dict(sizes | {"decoder_size": decoder_size} | unsaid)
    for name in (*sizes, "decoder_size"):
        if asked and getattr(asked, name) != getattr(found, name):
            raise BridgeMismatchError(
                f"the config given for {source} says {name} {getattr(asked, name)!r}, its tensors say "
                f"{getattr(found, name)!r}; mend the config, or leave it out."
            )
    return found


def _mapper_sizes(mapper: Mapping[str, Tensor], decoder_size: int, source: str) -> dict[str, object]:
    if "prefix_const" in mapper and "linear.weight" in mapper:
        width, feature_size = mapper["linear.weight"].shape
        layers = {m[1] for name in mapper if (m := re.match(r"transformer\.layers\.(\d+)\.", name))}
        return {
            "kind": "transformer",
            "feature_size": feature_size,
            "prefix_length": mapper["prefix_const"].shape[0],
            "clip_length": width // decoder_size,
            "num_layers": len(layers),
        }
    if "model.0.weight" in mapper and "model.2.weight" in mapper:
        width, feature_size = mapper["model.2.weight"].shape[0], mapper["model.0.weight"].shape[1]
        return {"kind": "mlp", "feature_size": feature_size, "prefix_length": width // decoder_size}
    if set(mapper) == {"linear.weight", "linear.bias"}:
        width, feature_size = mapper["linear.weight"].shape
        return {"kind": "linear", "feature_size": feature_size, "prefix_length": width // decoder_size}
    raise CaptionerError(
        f"{source}: clip_project has the keys {', '.join(sorted(mapper)[:6])}…, which is none of ClipCap's mappers; "
        "known: an MLP of two layers, one linear layer, the transformer mapper."
    )


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise MissingFileError(f"bridge {path} does not exist; give bridge.safetensors or a ClipCap checkpoint (.pt)")
    return Path(path)


def _load_encoder(source: Path) -> RuClip:
    return RuClip.from_prototype(source) if source.is_file() else RuClip.from_pretrained(source)


def _place_encoder(tower: RuClip, source: Path, target: Path) -> None:
    if source.is_file():
        tower.save_pretrained(target)
    else:
        _copy_checkpoint(source, target)


def _place_decoder_and_bridge(
    state: Mapping[str, Tensor], decoder: Path, out: Path, source: str, config: CaptionerConfig
) -> None:
    """Load both strictly, then write them below ``out``: the decoder as published, the bridge as ``state``."""
    model = RuGpt.from_pretrained(decoder, cross_attention=config.bridge.kind == "cross_attention")
    load_bridge_state(state, build_bridge(config.bridge), model, source)
    _copy_checkpoint(decoder, out / "decoder")
    write_state_dict(out / BRIDGE_WEIGHTS, state)


def _copy_checkpoint(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint as published, and nothing else that lies in the folder."""
    weights = find_weights(source)
    target.mkdir()
    for file in weights:
        shutil.copyfile(file, target / file.name)
    index = index_of(weights)  # also of a single shard: without it nobody knows the shard's name
    for file in source.iterdir():
        if file.name in CHECKPOINT_FILES or file.name == index:
            shutil.copyfile(file, target / file.name)


def _config_beside(bridge: Path, state: Mapping[str, Tensor]) -> CaptionerConfig:
    """config.json in the folder of ``bridge``, whose tensors are ``state``."""
    path = bridge.with_name(CONFIG_NAME)
    wrapped = next((name for name in state if f".{CLIPCAP_BRIDGE}" in name), None)
    if wrapped is not None:
        prefix = wrapped.partition(CLIPCAP_BRIDGE)[0]
        raise StateDictError(
            f"{bridge} (ClipCap's tensors under {prefix!r}; take that prefix off all names)", unexpected=list(state)
        )
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist; a bridge's config.json lies beside {bridge.name} (or pass --config)"
        )
    return CaptionerConfig.from_file(path)
