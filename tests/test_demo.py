"""The drawn world, its Russian, and the bundled mini captioner."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from caption_data import write_dataset

from framecap.cli import main
from framecap.demo import bundled_captioner, sample
from framecap.demo.frames import draw_video, write_demo_frames
from framecap.demo.russian import ADJECTIVES, NOUNS, claims_of, describe, noun_phrase, parse, verb_phrase
from framecap.demo.scenes import (
    COLOURS,
    FLYING_KINDS,
    KINDS,
    RELATIONS,
    ROLES,
    SETTINGS,
    Scene,
    Thing,
    composition_split,
    draw_scenes,
)
from framecap.demo.silhouettes import ASPECT, SILHOUETTES
from framecap.demo.world import FRAME_SIZES, draw_frame, place

MAX_BYTES = 12 * 2**20


def test_the_world_is_as_varied_as_promised() -> None:
    assert len(KINDS) >= 20
    assert len(COLOURS) >= 8
    assert len(SETTINGS) >= 6
    assert set(KINDS) == set(NOUNS) == set(SILHOUETTES) == set(ASPECT)
    assert set(COLOURS) == set(ADJECTIVES)


def test_train_and_test_share_no_composition() -> None:
    train = {c for scene in draw_scenes(4000, 1, "train") for c in scene.compositions()}
    test = {c for scene in draw_scenes(4000, 1, "test") for c in scene.compositions()}
    assert train
    assert test
    assert train.isdisjoint(test)


def test_each_kind_colour_and_role_is_both_trained_and_held_out() -> None:
    every = list(itertools.product(KINDS, COLOURS, ROLES))
    held_out = {composition for composition in every if composition_split(composition) == "test"}
    for names, part in ((KINDS, 0), (COLOURS, 1), (ROLES, 2)):
        assert {composition[part] for composition in held_out} == set(names)
    assert 0.08 < len(held_out) / len(every) < 0.12


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("kind", KINDS)
def test_gender_and_number_agree(kind: str, colour: str) -> None:
    noun, forms = NOUNS[kind], ADJECTIVES[colour]
    one, two = noun_phrase(Thing(kind, colour)), noun_phrase(Thing(kind, colour, 2))
    if kind == "person":
        assert one == f"человек в {forms[5]}"
        assert two == f"два человека в {forms[5]}"
        return
    endings = {"m": ("ый", "ий"), "f": ("ая", "яя"), "n": ("ое", "ее")}[noun.gender]
    adjective = one.split()[0]
    assert adjective.endswith(endings)
    assert one.endswith(noun.nominative)
    numeral, plural, *_ = two.split()
    assert numeral == ("две" if noun.gender == "f" else "два")
    assert plural.endswith(("ые", "ие") if noun.gender == "f" else ("ых", "их"))
    assert two.split()[-1] == noun.genitive.split()[-1]


def test_verbs_agree_in_number() -> None:
    assert verb_phrase(Thing("bus", "red", 1, moving=True)) == "едет"
    assert verb_phrase(Thing("bus", "red", 2, moving=True)) == "едут"
    assert verb_phrase(Thing("tree", "red", 3)) == "растут"


def test_a_known_scene_is_described_in_known_words() -> None:
    scene = Scene(Thing("bus", "red", 1, True), "left", Thing("tree", "yellow"), "bridge", "night", "clear")
    texts = {describe(scene, np.random.default_rng(seed)) for seed in range(40)}
    assert "Ночью по мосту едет красный автобус, слева растёт жёлтое дерево." in texts
    assert "Ночью по мосту едет красный автобус, слева от автобуса растёт жёлтое дерево." in texts
    assert "Красный автобус едет по мосту ночью, слева растёт жёлтое дерево." in texts


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_parser_reads_back_what_the_description_says(split: str) -> None:
    rng = np.random.default_rng(3)
    for scene in draw_scenes(3000, 3, split):  # type: ignore[arg-type]
        assert parse(describe(scene, rng)) == claims_of(scene)


def test_the_parser_claims_nothing_from_nonsense() -> None:
    for text in ("", "Привет, мир", "красный синий автобус стоит", "автобус автобус, слева стоит", ",,,"):
        claims = parse(text)
        assert None in claims.essentials()


def test_a_wrong_colour_or_relation_is_noticed() -> None:
    right = parse("Ночью по мосту едет красный автобус, слева растёт жёлтое дерево.")
    for wrong in (
        "Ночью по мосту едет жёлтый автобус, слева растёт жёлтое дерево.",
        "Ночью по мосту едет красный автобус, справа растёт жёлтое дерево.",
        "Ночью по городу едет красный автобус, слева растёт жёлтое дерево.",
        "Ночью по мосту едет красный автобус.",
    ):
        assert parse(wrong).essentials() != right.essentials()


def test_drawing_is_deterministic() -> None:
    scene = draw_scenes(1, 5, "test")[0]
    first, second = (draw_frame(scene, np.random.default_rng(9))[0] for _ in range(2))
    assert first == second


def test_things_lie_inside_the_centred_square_and_keep_their_relation() -> None:
    rng = np.random.default_rng(11)
    for scene in draw_scenes(1500, 11, "train"):
        things = place(scene, rng)
        for placed in things:
            left, top, right, bottom = placed.box
            assert min(left, top) >= -0.001
            assert max(right, bottom) <= 1.001
        if scene.other is None:
            assert len(things) == scene.main.count
            continue
        main = next(placed for placed in things if not placed.is_other)
        other = next(placed for placed in things if placed.is_other)
        if scene.relation == "left":
            assert other.x < main.x - 0.3
        elif scene.relation == "right":
            assert other.x > main.x + 0.3
        elif scene.relation == "above":
            assert other.thing.kind in FLYING_KINDS
            assert other.y < main.y - 0.4
        else:
            assert other.y > main.y + 0.1


def test_every_frame_size_setting_and_relation_is_drawn() -> None:
    rng = np.random.default_rng(1)
    for setting, relation, size in itertools.product(SETTINGS, RELATIONS, FRAME_SIZES):
        other = None if relation == "alone" else Thing("kite" if relation == "above" else "cat", "white")
        scene = Scene(Thing("horse", "black"), relation, other, setting, "night", "rain")
        assert draw_frame(scene, rng, size)[0].startswith(b"\xff\xd8")


def test_something_moves_in_a_demo_video() -> None:
    _, frames, _ = draw_video(0, 4)
    assert len(set(frames)) == 4


def test_demo_frames_are_the_same_each_time(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    first, second = (write_demo_frames(tmp_path / name, videos=2, length=3) for name in "ab")
    table = pq.read_table(first[0])
    assert table.equals(pq.read_table(second[0]))
    assert table.num_rows == 6
    assert table.column_names == [
        "frame_id", "video_id", "frame_index", "timestamp_ms", "width", "height", "image",
    ]  # fmt: skip


def test_a_learnt_yttm_vocabulary_reads_back_its_words(tmp_path: Path) -> None:
    from framecap.demo.tokens import train_yttm
    from framecap.model.yttm import YttmTokenizer, save_yttm

    texts = ["красный автобус стоит на мосту.", "две красные машины"]
    made = train_yttm(texts, 90)
    save_yttm(tmp_path / "bpe.model", made.char2id, made.rules, made.specials)
    read = YttmTokenizer.from_file(tmp_path / "bpe.model")
    for text in texts:
        assert read.encode(text) == made.encode(text)
        assert read.decode(read.encode(text)) == text


def test_the_bundled_captioner_fits_in_twelve_megabytes_and_has_a_manifest() -> None:
    directory = bundled_captioner()
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) <= MAX_BYTES
    files = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert {"config.json", "bridge.safetensors", "encoder/bpe.model", "decoder/vocab.json"} <= set(files)


def test_the_bundled_captioner_is_right_about_unseen_compositions() -> None:
    from framecap.demo.evaluate import evaluate
    from framecap.model.captioner import Captioner

    figures = evaluate(Captioner.from_pretrained(bundled_captioner(), device="cpu"), scenes=120, seed=777)
    assert figures["right"] >= 0.85  # 90 % on 1,000 scenes is the promise; 120 scenes leave room for chance
    assert figures["pairs_right"] >= 0.95


def test_every_frame_size_can_be_drawn_at_the_doubled_size_of_the_demo_videos(tmp_path: Path) -> None:
    paths = write_demo_frames(tmp_path, videos=24, length=1)
    assert sum(pq.read_metadata(path).num_rows for path in paths) == 24


def test_training_pairs_hold_no_composition_that_is_held_out(tmp_path: Path) -> None:
    from framecap.demo.pairs import write_pairs

    write_pairs(tmp_path / "pairs.parquet", training=40, validation=10, seed=3)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table["split"].to_pylist() == ["train"] * 40 + ["validation"] * 10
    held_out = {c for scene in draw_scenes(4000, 1, "test") for c in scene.compositions()}
    captions = table["caption"].to_pylist()
    scenes = [*draw_scenes(40, 3, "train"), *draw_scenes(10, 4, "train")]
    assert [parse(caption) for caption in captions] == [claims_of(scene) for scene in scenes]
    assert held_out.isdisjoint(c for scene in scenes for c in scene.compositions())


def test_a_moved_picture_is_the_same_picture_elsewhere() -> None:
    from framecap.demo.encoder_training import JITTER, jittered

    pixels = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    pixels[:, 16, 16] = 255
    moved = jittered(pixels, np.random.default_rng(0))
    places = np.argwhere(moved[..., 0] == 255)
    assert len(places) == 20
    assert np.abs(places[:, 1:] - 16).max() == JITTER
    assert len({tuple(place[1:]) for place in places}) > 10


def test_the_encoder_and_its_reader_learn_from_a_few_pictures() -> None:
    from framecap.demo.encoder_training import EncoderTraining
    from framecap.demo.new_models import GRID, RESOLUTION, new_encoder, new_reader
    from framecap.demo.pictures import draw_pictures

    pictures = draw_pictures(8, 5, "train", RESOLUTION, GRID)
    encoder = new_encoder(pictures.captions, seed=0)
    training = EncoderTraining(encoder, new_reader(pictures.captions, encoder.config, 0), pictures, seed=0)
    first, *_, last = [training.step(np.arange(8), 1e-3) for _ in range(12)]
    assert all(last[name] < first[name] for name in ("contrastive", "scene", "patch", "caption"))


def test_the_encoder_learns_on_the_gpu_if_there_is_one_and_is_saved_from_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from framecap.demo import mini
    from framecap.demo.encoder_training import EncoderTraining
    from framecap.demo.pictures import Pictures

    used: list[str] = []

    def learn(training: EncoderTraining, minutes: float, test: Pictures) -> None:
        used.extend(parameter.device.type for parameter in training.parameters)
        used.extend(p.device.type for group in training.optimiser.param_groups for p in group["params"])
        for module in (training.encoder, training.reader):
            module.to_empty(device="cpu")  # no figures can be taken from a stand-in

    monkeypatch.setattr(mini, "choose_device", lambda device: torch.device("meta"))  # stands in for a GPU
    monkeypatch.setattr(EncoderTraining, "train", learn)
    mini.train_encoder(tmp_path, scenes=40, minutes=1)
    assert set(used) == {"meta"}
    assert (tmp_path / "encoder" / "config.json").is_file()
    assert (tmp_path / "decoder" / "config.json").is_file()


def test_a_halved_captioner_is_smaller_and_says_the_same(tmp_path: Path) -> None:
    import shutil

    from framecap.demo.mini import halved, size_in_bytes
    from framecap.model.captioner import Captioner
    from framecap.model.weights import read_state_dict, write_state_dict

    whole = Path(shutil.copytree(bundled_captioner(), tmp_path / "whole"))
    for weights in whole.rglob("*.safetensors"):
        write_state_dict(weights, {name: tensor.float() for name, tensor in read_state_dict(weights).items()})
    half = halved(whole, tmp_path / "half")
    assert size_in_bytes(half) < 0.6 * size_in_bytes(whole)
    frames = [draw_frame(scene, np.random.default_rng(1))[0] for scene in draw_scenes(3, 1, "test")]
    same = [Captioner.from_pretrained(where, device="cpu").caption(frames) for where in (half, bundled_captioner())]
    assert same[0] == same[1]


def test_the_better_bridge_is_kept(tmp_path: Path) -> None:
    from framecap.demo.mini import keep_better

    for name in ("mlp", "cross_attention"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    assert keep_better({"mlp": {"right": 0.91}, "cross_attention": {"right": 0.9}}, tmp_path) == "mlp"
    assert (tmp_path / "best" / "who").read_text() == "mlp"
    assert json.loads((tmp_path / "figures.json").read_text())["best"] == "mlp"


@pytest.mark.soak
def test_one_command_makes_the_mini_captioner_from_nothing(tmp_path: Path) -> None:
    from framecap.demo.mini import train_mini
    from framecap.model.captioner import Captioner

    best = train_mini(tmp_path, minutes=0.2, scenes=300, pairs=400, epochs=2, threads=1)
    assert Captioner.from_pretrained(tmp_path / "best").config.bridge.kind == best
    assert sum(path.stat().st_size for path in (tmp_path / "best").rglob("*") if path.is_file()) <= MAX_BYTES


def test_the_sample_shows_captions_keeps_a_frame_and_says_what_to_try(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(["--out", str(tmp_path)]) == 2
    assert "make demo" in capsys.readouterr().err
    data = write_dataset(tmp_path, frames=24, shards=1)
    assert sample.main(["--out", str(tmp_path), "--every", "6"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "video-000/" in line] == [
        "video-000/000000", "video-000/000006", "video-000/000012", "video-000/000018",
    ]  # fmt: skip
    assert f"24 captions are in {data.captions}" in out
    assert main(["describe", str(tmp_path / "frame.jpg")]) == 0
