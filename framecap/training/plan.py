"""What a training run is made of, settled and checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from framecap.errors import MissingFileError, SettingsError, TrainingError
from framecap.image_uris import FetchRules, allowed_places
from framecap.manifest import sha256_file
from framecap.model.bridge import build_bridge
from framecap.model.bridge_config import BridgeConfig
from framecap.model.captioner_config import check_fit
from framecap.model.ruclip import RuClip, RuClipConfig
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.weights import find_weights
from framecap.storage import storage_options
from framecap.training.disk import check_space, clear_disk_errors
from framecap.training.examples import split_examples, tokenise
from framecap.training.features import (
    DTYPES,
    EncodedPairs,
    EncodeOptions,
    encode_unit,
    features_folder,
    missing_units,
)
from framecap.training.loop import TrainingData
from framecap.training.loss import CaptionLoss
from framecap.training.pairs import PairUnit, plan_units
from framecap.training.places import check_out, fetch_checkpoint, reach, with_absolute_paths
from framecap.training.settings import TrainSettings
from framecap.training.text_space import TextSpace, measure_text_space

# Settings that may change between a run and its resumption.
_PLACES = {"encoder", "decoder", "pairs", "out", "work_dir"}  # their content is in the identity instead
_MEANS = {
    *("workers", "cpus_per_worker", "max_failures", "node_timeout", "device", "ray_address"),
    *("encode_batch_size", "accumulate"),
}
_REPORTS = {"config", "storage_options", "fetch_timeout", "max_bad_pairs", "log_every", "checkpoint_every"}
_FREE = _PLACES | _MEANS | _REPORTS


@dataclass(frozen=True)
class TrainPlan:
    """Units to encode, where their features go, the bridge to train, what makes this run itself, storage options."""

    settings: TrainSettings
    units: tuple[PairUnit, ...]
    encode: EncodeOptions
    features: Path
    bridge: BridgeConfig
    identity: dict[str, Any]
    storage: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        """Folder of features, checkpoints and curves."""
        return Path(self.settings.run_dir)


def make_plan(settings: TrainSettings, device: str) -> TrainPlan:
    """Check paths, sizes, columns and space; nothing is computed yet.

    Raises SettingsError, StorageError, MissingFileError, BridgeMismatchError, TrainingError.
    """
    places = (settings.encoder, settings.decoder, settings.pairs, settings.gap_pairs, settings.out)
    reach(settings.storage_options, places)
    settings = with_absolute_paths(settings)
    check_out(settings)
    settings = with_local_checkpoints(settings)
    units, columns = plan_units(settings)
    bridge = bridge_config(settings)
    feature = "text" if settings.train_on == "text" else bridge.feature
    allowed = allowed_places(settings.pairs, settings.image_uri_allow) if settings.image_uri_allow else ()
    rules = FetchRules(allowed, seconds=settings.fetch_timeout)
    encode = EncodeOptions(settings.encoder, feature, columns, settings.encode_batch_size, device, rules)
    run_dir = Path(settings.run_dir)
    with clear_disk_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    features = features_folder(run_dir, units, encode)
    plan = TrainPlan(settings, tuple(units), encode, features, bridge, _identity(settings, features), storage_options())
    check_space(run_dir, _bytes_needed(plan), "features and checkpoints")
    return plan


def with_local_checkpoints(settings: TrainSettings) -> TrainSettings:
    """The same settings with encoder and decoder as folders that all nodes see."""
    copies = Path(settings.run_dir) / "checkpoints-from"
    parts = {name: fetch_checkpoint(getattr(settings, name), copies, f"--{name}") for name in ("encoder", "decoder")}
    return settings.model_copy(update=parts)


def bridge_config(settings: TrainSettings) -> BridgeConfig:
    """Sizes of the bridge from the two checkpoints it joins."""
    encoder = RuClipConfig.from_file(_config(settings.encoder, "--encoder"))
    decoder = RuGpt.from_pretrained(settings.decoder).config
    crosses, from_text = settings.bridge == "cross_attention", settings.train_on == "text"
    if from_text and not encoder.transformer_layers:
        raise SettingsError(f"--train-on text: the encoder {settings.encoder} has no text tower; give one that has")
    bridge = BridgeConfig(
        kind=settings.bridge,
        feature_size=encoder.vision_width if crosses else encoder.embed_dim,
        decoder_size=decoder.n_embd,
        prefix_length=settings.prefix_length,
        feature="patches" if crosses else "pooled",
        clip_length=settings.clip_length,
        num_layers=settings.bridge_layers,
        num_heads=settings.bridge_heads,
        normalize_features=settings.normalize_features or from_text,
    )
    check_fit(bridge, encoder, decoder)
    if (room := caption_room(bridge, decoder, settings)) < 2:
        raise TrainingError(
            f"--prefix-length {bridge.prefix_length} and --max-tokens {settings.max_tokens} leave {room} of the "
            f"decoder's {decoder.n_positions} positions for a caption, which needs 2; lower the one or raise the other"
        )
    return bridge


def caption_room(bridge: BridgeConfig, decoder: RuGptConfig, settings: TrainSettings) -> int:
    """Tokens of a caption, eos included, that are trained on."""
    room = decoder.n_positions - (1 if bridge.kind == "cross_attention" else bridge.prefix_length)
    return min(room, settings.max_tokens or room)


def _config(folder: str, flag: str) -> Path:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{flag} {folder} holds no config.json; give the folder of a checkpoint")
    return path


def _identity(settings: TrainSettings, features: Path) -> dict[str, Any]:
    kept = {k: v for k, v in settings.model_dump(mode="json").items() if k not in _FREE}
    weights = [sha256_file(file) for file in find_weights(Path(settings.decoder))]
    digest = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
    return kept | {"features": features.name, "decoder_weights": digest}


def _bytes_needed(plan: TrainPlan) -> int:
    encoder = RuClipConfig.from_file(Path(plan.settings.encoder) / "config.json")
    patches = (encoder.image_resolution // encoder.vision_patch_size) ** 2 + 1
    values = plan.bridge.feature_size * (patches if plan.bridge.feature == "patches" else 1)
    rows = sum(unit.rows for unit in missing_units(plan.features, plan.units))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_bridge(plan.bridge).parameters())
    decoder = sum(file.stat().st_size for file in find_weights(Path(plan.settings.decoder)))
    encoder_bytes = sum(file.stat().st_size for file in find_weights(Path(plan.settings.encoder)))
    # Weights and two moments in each of two kept checkpoints and the one being written, best, result.
    trained = 4 * parameters + (decoder if plan.settings.train != "bridge" else 0)
    features = rows * values * stored_size(plan.bridge.feature)
    return features + 11 * trained + 2 * (decoder + encoder_bytes)


def stored_size(feature: str) -> int:
    """Bytes of one stored feature value."""
    return 2 if DTYPES[feature].__name__ == "float16" else 4


def encode_here(plan: TrainPlan) -> None:
    """Compute all missing features in this process."""
    missing = missing_units(plan.features, plan.units)
    if missing:
        encoder = RuClip.from_pretrained(plan.encode.encoder, plan.encode.device)
        for unit in missing:
            encode_unit(encoder, unit, plan.features, plan.encode)


def prepare_text_space(plan: TrainPlan) -> None:
    """For training on text: measure noise and shift, and leave them in the run's folder for all workers."""
    if plan.settings.train_on == "text":
        measure_text_space(plan.settings, "cpu").save(plan.run_dir)


def build_model(plan: TrainPlan, device: torch.device) -> CaptionLoss:
    """Bridge (random by the run's seed) and decoder on ``device``, in fp32."""
    settings = plan.settings
    torch.manual_seed(settings.seed)
    crosses = plan.bridge.kind == "cross_attention"
    decoder = RuGpt.from_pretrained(settings.decoder, cross_attention=crosses)
    model = CaptionLoss(build_bridge(plan.bridge), decoder, settings.train == "bridge+decoder")
    return model.to(device)


def load_data(plan: TrainPlan, decoder: RuGpt) -> tuple[TrainingData, int]:
    """Encoded pairs as examples of both splits, and how many captions were cut.

    Raises TrainingError for too many bad pairs or an empty split.
    """
    settings = plan.settings
    pairs = EncodedPairs.open(plan.features, plan.units, plan.bridge.feature)
    pairs.check_bad(settings.max_bad_pairs)
    tokens, cut = tokenise(pairs.captions, decoder, caption_room(plan.bridge, decoder.config, settings))
    space = TextSpace.load(plan.run_dir) if settings.train_on == "text" else None
    return TrainingData(pairs, *split_examples(pairs, tokens, settings), space), cut
