"""Training on drawn pictures: it learns by heart, resumes, shares work, and refuses bad input clearly."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cluster import ENVIRONMENT, started_cluster
from PIL import Image, ImageDraw

from framecap import Captioner, DecodeOptions
from framecap.errors import FramecapError, SettingsError, StorageError, TrainingError
from framecap.model.rugpt import RuGpt
from framecap.storage import open_fs
from framecap.training.checkpoint import Progress as TrainProgress
from framecap.training.checkpoint import load_checkpoint, save_checkpoint
from framecap.training.disk import check_space, clear_disk_errors
from framecap.training.examples import batch_at, shares
from framecap.training.loop import Team
from framecap.training.optimise import schedule
from framecap.training.pairs import read_unit
from framecap.training.plan import encode_here, load_data, make_plan
from framecap.training.run import train_captioner, train_locally, train_worker
from framecap.training.settings import TrainSettings

COLOURS = {"красный": "#d02020", "синий": "#2040d0", "жёлтый": "#e8d020", "зелёный": "#20a040"}
SHAPES = {"круг": "ellipse", "прямоугольник": "rectangle"}
PLACES = {"слева": (0, "#f0f0f0"), "справа": (60, "#303030")}
DATA = Path(__file__).parent / "data"


def drawn_pairs() -> list[tuple[bytes, str]]:
    """16 pictures that differ in colour, shape and place, each with its own sentence."""
    pairs = []
    for colour, value in COLOURS.items():
        for shape, method in SHAPES.items():
            for place, (x, ground) in PLACES.items():
                picture = Image.new("RGB", (128, 96), ground)
                getattr(ImageDraw.Draw(picture), method)((x + 16, 8, x + 52, 88), fill=value)
                data = io.BytesIO()
                picture.save(data, "PNG")
                pairs.append((data.getvalue(), f"{place.capitalize()} нарисован {colour} {shape}."))
    return pairs


def write_pairs(path: Path, **columns: list[Any]) -> Path:
    images, captions = zip(*drawn_pairs(), strict=True)
    table = pa.table({"image": list(images), "caption": list(captions)} | columns)
    pq.write_table(table, path, row_group_size=6)
    return path


def settings(folder: Path, pairs: Path | str, **values: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "encoder": str(DATA / "ruclip-vit-b32-tiny"),
        "decoder": str(DATA / "rugpt3-tiny"),
        "pairs": str(pairs),
        "out": str(folder / "captioner"),
        "train": "bridge+decoder",
        "steps": 12,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "log_every": 4,
        "device": "cpu",
    }
    return TrainSettings(**(defaults | values))


def curve(one: TrainSettings) -> list[dict[str, str]]:
    with (Path(one.run_dir) / "curve.csv").open() as stream:
        return list(csv.DictReader(stream))


def train_losses(one: TrainSettings) -> dict[int, float]:
    return {int(row["step"]): float(row["train_loss"]) for row in curve(one)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> TrainSettings:
    """One worker, twelve steps, in this process."""
    one = settings(tmp_path_factory.mktemp("whole"), pairs)
    train_locally(one)
    return one


@pytest.mark.parametrize("kind", ["mlp", "cross_attention"])
def test_sixteen_pairs_are_learned_by_heart_and_come_back_word_for_word(tmp_path: Path, pairs: Path, kind: str) -> None:
    one = settings(tmp_path, pairs, bridge=kind, steps=300, batch_size=16, log_every=100)
    captioner = Captioner.from_pretrained(train_locally(one), device="cpu")
    images, captions = zip(*drawn_pairs(), strict=True)
    said = captioner.caption(list(images), DecodeOptions(max_new_tokens=60))
    right = sum(caption.text == wanted for caption, wanted in zip(said, captions, strict=True))
    assert right >= 15, [caption.text for caption in said]


def test_training_the_bridge_alone_leaves_the_decoder_file_as_it_was(tmp_path: Path, pairs: Path) -> None:
    out = train_locally(settings(tmp_path, pairs, train="bridge", bridge="linear", steps=3))
    original = (DATA / "rugpt3-tiny" / "model.safetensors").read_bytes()
    assert (out / "decoder" / "model.safetensors").read_bytes() == original


def test_two_ray_workers_follow_the_loss_of_one(
    tmp_path: Path, pairs: Path, uninterrupted: TrainSettings, ray_cluster: None
) -> None:
    two = settings(tmp_path, pairs, workers=2, cpus_per_worker=1)
    train_captioner(two)
    assert train_losses(two) == pytest.approx(train_losses(uninterrupted), rel=1e-3)


def test_accumulation_changes_no_loss(tmp_path: Path, pairs: Path, uninterrupted: TrainSettings) -> None:
    four = settings(tmp_path, pairs, accumulate=4)
    train_locally(four)
    assert train_losses(four) == pytest.approx(train_losses(uninterrupted), rel=1e-3)


def test_a_killed_run_started_again_ends_with_the_same_steps_and_loss(tmp_path: Path, pairs: Path) -> None:
    whole = settings(tmp_path / "whole", pairs, steps=60, checkpoint_every=7)
    train_locally(whole)
    killed = settings(tmp_path / "killed", pairs, steps=60, checkpoint_every=7)
    code = (
        "import sys; from framecap.training.run import train_locally;"
        "from framecap.training.settings import TrainSettings;"
        "train_locally(TrainSettings.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, killed.model_dump_json()])
    checkpoints = Path(killed.run_dir) / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step-*.pt")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(int(path.stem.partition("-")[2]) for path in checkpoints.glob("step-*.pt"))
    assert 0 < reached < 60
    train_locally(killed)
    assert [row["step"] for row in curve(killed)] == [row["step"] for row in curve(whole)]
    assert train_losses(killed)[60] == pytest.approx(train_losses(whole)[60], rel=1e-3)


def test_bf16_on_the_cpu_follows_the_loss_of_fp32(tmp_path: Path, pairs: Path) -> None:
    for bridge in ("mlp", "cross_attention"):
        whole = settings(tmp_path / f"{bridge}-32", pairs, bridge=bridge)
        half = settings(tmp_path / f"{bridge}-16", pairs, bridge=bridge, precision="bf16")
        train_locally(whole)
        train_locally(half)
        assert train_losses(half) != train_losses(whole)
        assert train_losses(half) == pytest.approx(train_losses(whole), rel=0.02)


def test_a_work_dir_of_another_run_is_refused(tmp_path: Path, pairs: Path) -> None:
    train_locally(settings(tmp_path, pairs, steps=2, work_dir=str(tmp_path / "run")))
    with pytest.raises(TrainingError, match=r"learning_rate = 0\.003, this one has 0\.1"):
        train_locally(
            settings(
                tmp_path, pairs, steps=2, learning_rate=0.1, work_dir=str(tmp_path / "run"), out=str(tmp_path / "b")
            )
        )


class Straggler(Team):
    """The second worker of a run whose leader has seen the checkpoint of step 7."""

    def total(self, *values: float) -> list[float]:
        return [value + 7 for value in values]


def test_a_worker_that_sees_another_checkpoint_than_the_leader_is_an_error(tmp_path: Path, pairs: Path) -> None:
    plan = make_plan(settings(tmp_path, pairs), "cpu")
    team = Straggler(torch.device("cpu"), rank=1)
    with pytest.raises(TrainingError, match=r"row group 0, are not in .*; --work-dir must be one folder"):
        train_worker(plan, team)
    encode_here(plan)
    with pytest.raises(TrainingError, match=r"worker 1 finds the checkpoint of step 0 .* the leader that of step 7"):
        train_worker(plan, team)


def test_features_are_computed_once_and_anew_when_the_pairs_change(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.parquet")
    one = settings(tmp_path, path, steps=1)
    train_locally(one)
    parts = sorted(Path(one.run_dir).glob("features-*/part-*.npy"))
    assert len(parts) == 3
    times = [part.stat().st_mtime_ns for part in parts]
    train_locally(one.model_copy(update={"out": str(tmp_path / "again"), "work_dir": one.run_dir}))
    assert [part.stat().st_mtime_ns for part in parts] == times
    write_pairs(path, frame_id=list(range(16)))
    changed = one.model_copy(update={"out": str(tmp_path / "third")})
    assert make_plan(changed, "cpu").features.name != parts[0].parent.name


def test_early_stop_ends_a_run_that_no_longer_gains_and_keeps_the_best(tmp_path: Path) -> None:
    split = ["train", "validation"] * 8
    path = write_pairs(tmp_path / "pairs.parquet", split=split)
    one = settings(tmp_path, path, steps=400, learning_rate=2e-2, validate_every=5, patience=2)
    train_locally(one)
    rows = curve(one)
    assert int(rows[-1]["step"]) < 400
    losses = [float(row["validation_loss"]) for row in rows if row["validation_loss"]]
    assert losses[-2] > min(losses) < losses[-1]


def test_the_curve_is_drawn(uninterrupted: TrainSettings) -> None:
    pytest.importorskip("matplotlib")
    assert Image.open(Path(uninterrupted.run_dir) / "curve.png").size[0] > 400


def test_without_matplotlib_the_captioner_is_finished_and_the_picture_missed(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    one = settings(tmp_path, pairs, steps=1)
    Captioner.from_pretrained(train_locally(one), device="cpu")
    assert "pip install matplotlib" in caplog.text
    assert [path.name for path in Path(one.run_dir).glob("curve.*")] == ["curve.csv"]


def test_bad_pairs_are_left_out_and_listed_up_to_the_limit(tmp_path: Path) -> None:
    images, captions = (list(column) for column in zip(*drawn_pairs(), strict=True))
    images[3], captions[5], captions[7] = b"no picture", None, "  "  # type: ignore[call-overload]
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "pairs.parquet")
    one = settings(tmp_path, tmp_path / "pairs.parquet", steps=1, max_bad_pairs=0.2)
    train_locally(one)
    listed = (Path(one.run_dir) / "bad_pairs.jsonl").read_text()
    assert listed.count("no caption") == 2
    assert listed.count("not_an_image") == 1
    with pytest.raises(TrainingError, match=r"3 of 16 pairs cannot be used \(2 x no caption, 1 x not_an_image"):
        train_locally(one.model_copy(update={"out": str(tmp_path / "b"), "max_bad_pairs": 0.1}))


def test_an_image_with_several_captions_is_trained_on_each(tmp_path: Path) -> None:
    images, captions = zip(*drawn_pairs(), strict=True)
    several = [[text, text.upper()] for text in captions]
    pq.write_table(pa.table({"image": list(images), "caption": several}), tmp_path / "pairs.parquet")
    one = settings(tmp_path, tmp_path / "pairs.parquet", steps=0, epochs=2)
    train_locally(one)
    assert curve(one)[-1]["step"] == "8"  # 2 epochs of 32 captions in batches of 8


def test_rows_of_one_image_are_held_out_together(tmp_path: Path) -> None:
    images, captions = zip(*drawn_pairs(), strict=True)
    one_each = {"image": list(images) * 3, "caption": [f"{text} {k}" for k in range(3) for text in captions]}
    pq.write_table(pa.table(one_each), tmp_path / "pairs.parquet", row_group_size=5)
    one = settings(tmp_path, tmp_path / "pairs.parquet", validation_fraction=0.25)
    plan = make_plan(one, "cpu")
    encode_here(plan)
    data, _ = load_data(plan, RuGpt.from_pretrained(one.decoder))
    training, validation = (
        {data.pairs.images[row] for row in split.images.tolist()} for split in (data.training, data.validation)
    )
    assert (len(training), len(validation), training & validation) == (12, 4, set())


@pytest.mark.parametrize(
    ("captions", "column"),
    [
        ([{"en": "x", "ru": text} for _, text in drawn_pairs()], "caption.ru"),
        ([[{"id": 1, "text": text}] for _, text in drawn_pairs()], "caption.text"),
    ],
)
def test_captions_in_structs_are_refused_until_a_field_is_named(
    tmp_path: Path, captions: list[Any], column: str
) -> None:
    table = pa.table({"image": [image for image, _ in drawn_pairs()], "caption": captions})
    pq.write_table(table, tmp_path / "pairs.parquet")
    one = settings(tmp_path, tmp_path / "pairs.parquet")
    with pytest.raises(SettingsError, match=f"name the field that holds the text: --caption-column {column}"):
        make_plan(one, "cpu")
    plan = make_plan(one.model_copy(update={"caption_column": column}), "cpu")
    read = [pair.captions for unit in plan.units for pair in read_unit(unit, plan.encode.columns)]
    assert read == [[text] for _, text in drawn_pairs()]


def test_captions_that_are_numbers_are_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "caption": [1]}), tmp_path / "pairs.parquet")
    with pytest.raises(SettingsError, match=r"pairs\.parquet it is int64; it must be text or a list of texts"):
        make_plan(settings(tmp_path, tmp_path / "pairs.parquet"), "cpu")


def test_a_caption_that_is_not_utf8_is_a_bad_pair_and_ends_nothing(tmp_path: Path) -> None:
    torn = pa.array(["кот".encode(), "дом".encode()[:-1]])
    caption = pa.Array.from_buffers(pa.string(), 2, torn.buffers())
    pq.write_table(pa.table({"image": [b"x", b"y"], "caption": caption}), tmp_path / "pairs.parquet")
    plan = make_plan(settings(tmp_path, tmp_path / "pairs.parquet"), "cpu")
    problems = [pair.problem for unit in plan.units for pair in read_unit(unit, plan.encode.columns)]
    assert problems == [None, "a caption is not UTF-8"]


def test_weights_that_are_not_numbers_replace_no_checkpoint_and_are_not_resumed(tmp_path: Path) -> None:
    good = {"bridge.weight": torch.ones(3)}
    state = {"adamw": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    save_checkpoint(tmp_path, {}, TrainProgress(step=1), good, state)
    for broken, moments in (
        ({"bridge.weight": torch.tensor([1.0, math.nan])}, state),
        (good, {"a": [torch.tensor(math.inf)]}),
    ):
        with pytest.raises(TrainingError, match=r"is NaN or infinite after step 2 .* lower --learning-rate"):
            save_checkpoint(tmp_path, {}, TrainProgress(step=2), broken, moments)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000001.pt"]
    content = torch.load(tmp_path / "step-000000001.pt", weights_only=True)
    content["weights"]["bridge.weight"][0] = math.nan
    torch.save(content, tmp_path / "step-000000002.pt")  # of a framecap that saved such
    found = load_checkpoint(tmp_path, {})
    assert found is not None
    assert found["progress"]["step"] == 1


@pytest.fixture
def store(pairs: Path) -> Iterator[str]:
    """Encoder, decoder and pairs on a file system that is no disk."""
    fs = fsspec.filesystem("memory")
    for name in ("ruclip-vit-b32-tiny", "rugpt3-tiny"):
        for file in (DATA / name).iterdir():
            if file.is_file():
                fs.pipe(f"/store/{name}/{file.name}", file.read_bytes())
    fs.pipe("/store/pairs.parquet", pairs.read_bytes())
    yield "memory://store"
    fs.rm("/store", recursive=True)


def on_store(folder: Path, store: str, **values: Any) -> TrainSettings:
    parts = {"encoder": f"{store}/ruclip-vit-b32-tiny", "decoder": f"{store}/rugpt3-tiny", "out": f"{store}/captioner"}
    return settings(folder, f"{store}/pairs.parquet", work_dir=str(folder / "run"), **(parts | values))


def test_checkpoints_pairs_and_captioner_may_lie_on_any_file_system(
    tmp_path: Path, store: str, uninterrupted: TrainSettings
) -> None:
    one = on_store(tmp_path, store)
    train_locally(one)
    assert train_losses(one) == train_losses(uninterrupted)
    captioner = Captioner.from_pretrained(f"{store}/captioner", device="cpu")
    theirs = Captioner.from_pretrained(uninterrupted.out, device="cpu")
    image = drawn_pairs()[0][0]
    assert captioner.caption([image]) == theirs.caption([image])
    with pytest.raises(SettingsError, match="not empty"):
        train_locally(one)


def test_a_captioner_that_could_not_be_uploaded_is_uploaded_by_the_next_run_without_training_again(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, *_: object, **__: object) -> None:
        raise PermissionError("access denied")

    one = on_store(tmp_path, store, steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(fsspec.get_filesystem_class("memory"), "put_file", full)
        with pytest.raises(StorageError, match=r"access denied; .* holds the captioner"):
            train_locally(one)
    before = (Path(one.run_dir) / "curve.csv").read_bytes()
    fs, _ = open_fs(store)
    fs.pipe_file("/store/captioner/config.json", b"{}")  # what had arrived when the upload broke off
    for again in (one, one.model_copy(update={"out": f"{store}/elsewhere"})):
        train_locally(again)
        assert fs.exists(again.out.removeprefix("memory:/") + "/manifest.json")
    assert (Path(one.run_dir) / "curve.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"work_dir": ""}, r"captioner\.run is no folder on a disk; give --work-dir"),
        ({"encoder": "memory://store/nothing"}, "--encoder memory://store/nothing holds no files"),
        ({"decoder": "nosuch://store/nothing"}, "use a path, s3://, gs:// or abfs://"),
    ],
)
def test_places_that_cannot_be_used_are_one_clear_error(
    tmp_path: Path, store: str, change: dict[str, Any], message: str
) -> None:
    one = on_store(tmp_path, store).model_copy(update=change)
    with pytest.raises(FramecapError, match=message):
        train_locally(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_split": "learn"}, "split 'learn' is empty; column 'split' holds 'train'"),
        ({"caption_column": "text"}, "no column 'text'"),
        ({"prefix_length": 300}, "--prefix-length 300 and --max-tokens 0 leave -44 of the decoder's 256"),
        ({"max_tokens": 1}, "--max-tokens 1 leave 1 of"),
        ({"split_column": "", "validation_fraction": 0.01}, "both need one"),
    ],
)
def test_impossible_data_is_one_clear_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_pairs(tmp_path / "pairs.parquet", split=["train"] * 16)
    one = settings(tmp_path, path, **change)
    with pytest.raises(TrainingError, match=message):
        train_locally(one)
    # What files' columns and sizes tell is told before images are encoded.
    assert bool(list(tmp_path.glob("captioner.run/features-*"))) == ("validation_fraction" in change)


def test_a_split_that_some_files_lack_is_no_split_and_said(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    write_pairs(tmp_path / "pairs" / "a.parquet", split=["train", "validation"] * 8)
    write_pairs(tmp_path / "pairs" / "b.parquet")
    with pytest.raises(TrainingError, match=r"b.parquet has no column 'split' and others do"):
        train_locally(settings(tmp_path, tmp_path / "pairs"))


def test_pairs_that_are_not_there_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="check the path"):
        train_locally(settings(tmp_path, tmp_path / "nowhere.parquet"))


def test_an_output_that_holds_something_is_refused_before_anything_starts(tmp_path: Path, pairs: Path) -> None:
    (tmp_path / "captioner").mkdir()
    (tmp_path / "captioner" / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="not empty"):
        train_locally(settings(tmp_path, pairs))


@pytest.mark.timeout(300)
def test_a_joined_cluster_scaled_to_zero_is_waited_for_with_a_limit(tmp_path: Path, pairs: Path) -> None:
    code = (
        "import sys; from framecap.training.on_ray import connect;"
        "from framecap.training.settings import TrainSettings;"
        "print(connect(TrainSettings.model_validate_json(sys.argv[1])))"
    )

    def connected(node_timeout: float) -> subprocess.Popen[str]:
        one = settings(tmp_path, pairs, ray_address=cluster.address, node_timeout=node_timeout, cpus_per_worker=2)
        command = [sys.executable, "-c", code, one.model_dump_json()]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with started_cluster(head_cpus=0) as cluster:
        _, errors = connected(node_timeout=2).communicate(timeout=90)
        said = "--workers 1 x --cpus-per-worker 2 need 2 CPUs; the cluster has 0"
        assert f"{said}, and no node came in 2 seconds" in errors
        waiting = connected(node_timeout=120)
        cluster.add_worker(cpus=2)
        output, errors = waiting.communicate(timeout=120)
    assert output.strip() == "cpu", errors


def test_a_cluster_of_its_own_that_is_too_small_is_one_clear_error(
    tmp_path: Path, pairs: Path, ray_cluster: None
) -> None:
    with pytest.raises(SettingsError, match="--workers 1 x --cpus-per-worker 5 need 5 CPUs; the cluster has 4"):
        train_captioner(settings(tmp_path, pairs, cpus_per_worker=5))


def test_a_disk_without_room_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="free some or give another --work-dir"):
        check_space(tmp_path / "run", 10**18, "features")


def test_a_disk_that_fills_up_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no space left"), clear_disk_errors(tmp_path):
        Path("/dev/full").write_bytes(b"x" * 100_000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_checkpoint_on_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    full = pytest.raises(TrainingError, match="no space left")
    with full, clear_disk_errors(tmp_path), open("/dev/full", "wb") as stream:
        torch.save({"w": torch.zeros(100_000)}, stream)


def test_a_batch_of_several_workers_is_the_batch_of_one() -> None:
    for step in (0, 5, 100):
        batch = batch_at(step, 10, 8, seed=3)
        divided = [p for rank in range(2) for p in shares(batch, rank, 2, 2)]
        assert sorted(np.concatenate(divided)) == sorted(batch)
        assert [len(p) for p in divided] == [2, 2, 2, 2]


def test_every_epoch_takes_each_example_once_in_an_order_of_its_own() -> None:
    taken = np.concatenate([batch_at(step, 12, 4, seed=0) for step in range(6)])
    assert sorted(taken[:12]) == sorted(taken[12:]) == list(range(12))
    assert list(taken[:12]) != list(taken[12:])


def test_the_rate_rises_then_falls_as_a_cosine() -> None:
    rates = [schedule(step, 100, 0.1, 0.0) for step in range(100)]
    assert rates[9] == rates[10] == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[-1] < 0.001


def test_batch_size_must_divide_among_workers_and_passes() -> None:
    argv = ["--encoder", "e", "--decoder", "d", "--pairs", "p", "--out", "o"]
    argv += ["--batch-size", "10", "--workers", "2", "--accumulate", "2"]
    with pytest.raises(SettingsError, match="multiple of workers x accumulate = 4"):
        TrainSettings.from_command_line(argv)


def test_the_job_exits_2_with_one_line_for_a_missing_checkpoint(tmp_path: Path, pairs: Path) -> None:
    argv = ["--encoder", str(tmp_path), "--decoder", str(tmp_path), "--pairs", str(pairs), "--out", str(tmp_path / "o")]
    job = [sys.executable, "jobs/train_captioner.py", *argv]
    done = subprocess.run(job, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert "holds no config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_trains_in_mixed_precision(tmp_path: Path, pairs: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    one = settings(tmp_path, pairs, device="cuda", steps=160, batch_size=16, learning_rate=5e-3)
    train_locally(one)
    assert train_losses(one)[160] < 0.2
