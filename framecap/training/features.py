"""Features of the frozen encoder, computed once per image and kept as arrays in the run's folder.

Each unit of pairs becomes ``part-N.npy`` (float32 pooled [n, D], or float16 patches [n, P+1, W]) and, last,
``part-N.json`` with captions, splits and the pairs left out; a unit that has both is done.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framecap.errors import FrameError, TrainingError
from framecap.image_uris import DEFAULT_RULES, FetchRules
from framecap.manifest import sha256_file
from framecap.model.decoder_process import shared_decoder
from framecap.model.images import IMAGE_TRANSFORM_VERSION
from framecap.model.ruclip import ImageFeatures, RuClip
from framecap.model.weights import find_weights
from framecap.training.disk import replace_file
from framecap.training.pairs import Pair, PairColumns, PairUnit, read_unit

_PART_VERSION = 2  # of what ``part-N.json`` holds
DTYPES = {"pooled": np.float32, "patches": np.float16, "text": np.float32}


@dataclass(frozen=True)
class EncodeOptions:
    """What the features depend on, and how they are computed.

    ``feature``: ``pooled`` or ``patches`` of the images, or ``text``: each caption's own embedding.
    """

    encoder: str
    feature: str
    columns: PairColumns
    batch_size: int
    device: str
    rules: FetchRules = DEFAULT_RULES


def features_folder(run_dir: Path, units: Sequence[PairUnit], options: EncodeOptions) -> Path:
    """Folder named by everything the features depend on, so that changed pairs or weights start afresh."""
    weights = [sha256_file(file) for file in find_weights(Path(options.encoder))]
    versions = [IMAGE_TRANSFORM_VERSION, _PART_VERSION]
    key = [weights, options.feature, asdict(options.columns), versions, [u.to_dict() for u in units]]
    if options.rules.allowed:  # what could not be fetched before may be there now
        key.append(options.rules.allowed)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return run_dir / f"features-{digest[:16]}"


def missing_units(folder: Path, units: Iterable[PairUnit]) -> list[PairUnit]:
    """Units whose part is not there yet."""
    return [unit for unit in units if not _part(folder, unit.index, "json").is_file()]


def encode_unit(encoder: RuClip, unit: PairUnit, folder: Path, options: EncodeOptions) -> None:
    """Write the part of one unit."""
    rows: list[dict[str, Any]] = []
    arrays: list[np.ndarray] = []
    bad: list[dict[str, Any]] = []
    batch: list[tuple[int, Pair]] = []
    decoder = shared_decoder()

    def flush() -> None:
        if options.feature == "text":
            rows.extend(_row(pair, pair.captions[0].encode()) for _, pair in batch)
            if batch:
                arrays.append(encode_texts(encoder, [pair.captions[0] for _, pair in batch]))
            batch.clear()
            return
        kept, pixels = [], []
        for place, pair in batch:
            try:
                square = decoder.crop_and_resize(pair.image or b"", encoder.config.image_resolution)
                pixels.append(encoder.preprocess([square]))
                kept.append(pair)
            except FrameError as error:
                bad.append({"row": place, "problem": str(error)})
        if kept:
            arrays.append(_encode(encoder, torch.cat(pixels), options.feature))
            rows.extend(_row(pair, pair.image or b"") for pair in kept)
        batch.clear()

    for place, pair in enumerate(read_unit(unit, options.columns, options.rules)):
        if pair.problem:
            bad.append({"row": place, "problem": pair.problem})
            continue
        if options.feature == "text":  # each caption has features of its own
            batch += [(place, Pair(None, [caption], pair.split)) for caption in pair.captions]
        else:
            batch.append((place, pair))
        if len(batch) >= options.batch_size:
            flush()
    flush()
    part = {"path": unit.path, "row_group": unit.row_group, "rows": rows, "bad": bad}
    if arrays:
        with replace_file(_part(folder, unit.index, "npy")) as stream:
            np.save(stream, np.concatenate(arrays))
    with replace_file(_part(folder, unit.index, "json")) as stream:
        stream.write(json.dumps(part, ensure_ascii=False).encode())


@torch.inference_mode()
def _encode(encoder: RuClip, pixels: torch.Tensor, feature: str) -> np.ndarray:
    features = encoder.image_features(pixels)
    tensor = features.patches if feature == "patches" else features.pooled
    return tensor.float().cpu().numpy().astype(DTYPES[feature])


@torch.inference_mode()
def encode_texts(encoder: RuClip, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of ``texts`` by the text tower, not normalised, float32 [N, D]."""
    embedded: np.ndarray = encoder.encode_text(encoder.tokenize(texts)).float().cpu().numpy()
    return embedded


def _row(pair: Pair, encoded: bytes) -> dict[str, Any]:
    """What is kept of a pair; ``image`` tells what was encoded from others, however many rows hold it."""
    return {"captions": pair.captions, "split": pair.split, "image": hashlib.sha256(encoded).hexdigest()[:32]}


def _part(folder: Path, index: int, ending: str) -> Path:
    return folder / f"part-{index:06d}.{ending}"


@dataclass(frozen=True)
class EncodedPairs:
    """All usable rows: captions, split and image of each, and where their features lie (memory-mapped).

    ``images``: a digest, equal in rows that hold the same image (of ``text`` features: the same sentence).
    """

    feature: str
    captions: list[list[str]]
    splits: list[str | None]
    images: list[str]
    arrays: list[np.ndarray]
    places: np.ndarray  # int64 [images, 2]: which array, which row
    bad: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, units: Sequence[PairUnit], feature: str) -> EncodedPairs:
        """Read the parts of all units, in order. Raises TrainingError when one is not there."""
        captions: list[list[str]] = []
        splits: list[str | None] = []
        images: list[str] = []
        arrays: list[np.ndarray] = []
        places: list[tuple[int, int]] = []
        bad: list[dict[str, Any]] = []
        for unit in missing_units(folder, units):
            raise TrainingError(
                f"the features of {unit.path}, row group {unit.row_group}, are not in {folder}; "
                "--work-dir must be one folder that all nodes see alike"
            )
        for unit in units:
            part = json.loads(_part(folder, unit.index, "json").read_bytes())
            bad += [{"path": unit.path, "row_group": unit.row_group} | entry for entry in part["bad"]]
            if part["rows"]:
                places += [(len(arrays), row) for row in range(len(part["rows"]))]
                arrays.append(np.load(_part(folder, unit.index, "npy"), mmap_mode="r"))
            captions += [row["captions"] for row in part["rows"]]
            splits += [row["split"] for row in part["rows"]]
            images += [row["image"] for row in part["rows"]]
        return cls(feature, captions, splits, images, arrays, np.array(places, dtype=np.int64).reshape(-1, 2), bad)

    def check_bad(self, largest_share: float) -> None:
        """Raise TrainingError when more than ``largest_share`` of the pairs were left out."""
        total = len(self.bad) + len(self.captions)
        if self.bad and (len(self.bad) > largest_share * total or not self.captions):
            kinds = Counter(entry["problem"].partition(":")[0] for entry in self.bad)
            counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
            first = self.bad[0]
            raise TrainingError(
                f"{len(self.bad)} of {total} pairs cannot be used ({counts}); first: {first['path']}, row group "
                f"{first['row_group']}, row {first['row']}: {first['problem']}. "
                f"Mend them or raise --max-bad-pairs above {largest_share}"
            )

    def features(self, images: np.ndarray, device: torch.device) -> ImageFeatures:
        """Features of ``images`` (int64 [B]) as the bridge reads them, float32 on ``device``.

        Only the kind that was stored is filled; the other is an empty tensor.
        """
        rows = np.stack([self.arrays[part][row] for part, row in self.places[images].tolist()])
        tensor = torch.from_numpy(rows).to(device).float()
        empty = tensor.new_empty(0)
        return ImageFeatures(empty, tensor) if self.feature == "patches" else ImageFeatures(tensor, empty)
