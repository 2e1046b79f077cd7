"""Training on text alone: sentences in, an ordinary captioner out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from framecap import Captioner
from framecap.demo import bundled_captioner
from framecap.demo.pairs import write_pairs
from framecap.errors import SettingsError
from framecap.model.bridge import PrefixBridge, build_bridge
from framecap.model.bridge_config import BridgeConfig
from framecap.model.ruclip import ImageFeatures
from framecap.training.run import train_locally
from framecap.training.settings import TrainSettings
from framecap.training.text_space import CAPDEC_VARIANCE, TextSpace, measure_text_space, move_to_images

SENTENCES = [
    "Днём на дороге стоит красный автобус.",
    "Ночью в поле растёт белый гриб.",
    "Днём по мосту бежит чёрная собака.",
]


def settings(folder: Path, pairs: Path, **values: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "encoder": str(bundled_captioner() / "encoder"),
        "decoder": str(bundled_captioner() / "decoder"),
        "pairs": str(pairs),
        "out": str(folder / "captioner"),
        "train_on": "text",
        "prefix_length": 4,
        "steps": 4,
        "batch_size": 4,
        "device": "cpu",
    }
    return TrainSettings(**(defaults | values))


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.txt"
    path.write_text("\ufeff" + "\n\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def drawn_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "pairs.parquet"
    write_pairs(path, 12, 0, seed=9)
    return path


def test_sentences_train_an_ordinary_captioner(tmp_path: Path, sentences: Path) -> None:
    folder = train_locally(settings(tmp_path, sentences, max_bad_pairs=0.5))
    captioner = Captioner.from_pretrained(folder, device="cpu")
    frame = np.zeros((40, 60, 3), np.uint8)
    assert captioner.caption([frame])[0].status in ("ok", "truncated")
    config = json.loads((folder / "config.json").read_text())
    assert config["bridge"]["normalize_features"]


def test_a_text_file_and_parquet_without_images_give_the_same_bridge(tmp_path: Path, sentences: Path) -> None:
    table = tmp_path / "sentences.parquet"
    pq.write_table(pa.table({"caption": SENTENCES}), table)
    lines = train_locally(settings(tmp_path / "lines", sentences, max_bad_pairs=0.5))
    rows = train_locally(settings(tmp_path / "rows", table))
    assert (lines / "bridge.safetensors").read_bytes() == (rows / "bridge.safetensors").read_bytes()


def test_the_noise_of_a_step_follows_from_seed_and_step() -> None:
    space = TextSpace(0.25, np.zeros(64, np.float32))
    noise = space.noise(seed=1, step=7, rows=500)
    assert np.array_equal(noise, space.noise(1, 7, 500))
    assert not np.array_equal(noise, space.noise(1, 8, 500))
    assert noise.std() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer"])
def test_a_shifted_bridge_reads_an_image_as_it_read_the_image_moved_to_the_texts(kind: str) -> None:
    torch.manual_seed(0)
    bridge = build_bridge(BridgeConfig(kind, 6, 8, prefix_length=2, num_layers=1, num_heads=2, clip_length=2))
    assert isinstance(bridge, PrefixBridge)
    shift, pooled = torch.randn(6), torch.randn(3, 6)
    moved, _ = bridge(ImageFeatures(pooled + shift, pooled.new_empty(0)))
    move_to_images(bridge, TextSpace(0.0, shift.numpy()))
    read, _ = bridge(ImageFeatures(pooled, pooled.new_empty(0)))
    torch.testing.assert_close(read, moved)


def test_noise_and_shift_are_measured_on_the_pairs(tmp_path: Path, drawn_pairs: Path) -> None:
    measured = measure_text_space(settings(tmp_path, drawn_pairs, gap_pairs=str(drawn_pairs), center=True), "cpu")
    rows = pq.read_table(drawn_pairs).to_pylist()
    captioner = Captioner.from_pretrained(bundled_captioner(), device="cpu")
    images = captioner.embed_images([row["image"] for row in rows])
    texts = captioner.embed_texts([row["caption"] for row in rows])
    shift = texts.mean(0) - images.mean(0)
    np.testing.assert_allclose(measured.shift, shift, atol=1e-5)
    assert measured.variance == pytest.approx(np.mean((texts - images - shift) ** 2), rel=1e-4)


def test_without_pairs_the_noise_is_capdecs_or_the_one_given(tmp_path: Path, sentences: Path) -> None:
    assert measure_text_space(settings(tmp_path, sentences), "cpu").variance == CAPDEC_VARIANCE
    assert measure_text_space(settings(tmp_path, sentences, noise_variance=0.1), "cpu").variance == 0.1


@pytest.mark.parametrize(
    "values",
    [
        {"bridge": "cross_attention"},
        {"center": True},
        {"train_on": "pairs", "noise_variance": 0.1},
    ],
)
def test_settings_that_do_not_go_with_text_are_refused(tmp_path: Path, sentences: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"--train-on text|--gap-pairs"):
        settings(tmp_path, sentences, **values)


def test_an_encoder_without_text_tower_is_refused_with_one_line(tmp_path: Path, sentences: Path) -> None:
    encoder = tmp_path / "encoder"
    captioner = Captioner.from_pretrained(bundled_captioner(), device="cpu")
    captioner.encoder.text = captioner.encoder.tokenizer = None
    captioner.encoder.save_pretrained(encoder)
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"transformer_layers": 0}))
    with pytest.raises(SettingsError, match="no text tower") as refused:
        train_locally(settings(tmp_path, sentences, encoder=str(encoder)))
    assert "\n" not in str(refused.value)
