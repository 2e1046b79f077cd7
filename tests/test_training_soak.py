"""`jobs/train_captioner.py` as an operator runs it, to the end: 98 real photographs learned by heart, runs killed.

Minutes each, so all are soak tests: `python -m pytest -m soak tests/test_training_soak.py`. The photographs and
their human Russian captions are those of ../shared/photos/ru98, which may not be committed.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from framecap.model.bpe import GptTokenizer
from framecap.model.ruclip import RuClip
from framecap.model.ruclip_layout import RuClipConfig
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.yttm import YttmTokenizer

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).parent.parent
STEPS = 120
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}


class Parts(NamedTuple):
    encoder: Path
    decoder: Path
    pairs: Path
    frames: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, shared: Path, data: Path) -> Parts:
    """A small random ruCLIP, a small random ruGPT3, and the 98 pairs, with and without captions."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    clip = data / "ruclip-vit-b32-tiny"
    shape = replace(
        RuClipConfig.from_file(clip / "config.json"),
        image_resolution=96, vision_patch_size=16, vision_width=128, vision_layers=2, embed_dim=128,
    )  # fmt: skip
    RuClip.from_config(shape, YttmTokenizer.from_file(clip / "bpe.model")).save_pretrained(folder / "encoder")
    tokenizer = GptTokenizer.from_pretrained(data / "rugpt3-tiny")
    size = RuGptConfig.from_json(data / "rugpt3-tiny" / "config.json").vocab_size
    decoder = RuGptConfig(vocab_size=size, n_positions=128, n_embd=128, n_layer=2, n_head=2)
    RuGpt.from_config(decoder, tokenizer).save_pretrained(folder / "decoder")
    photos = shared / "photos" / "ru98"
    rows = [json.loads(line) for line in (photos / "captions.jsonl").read_text().splitlines()]
    table = {
        "frame_id": [row["file"] for row in rows],
        "image": [(photos / "images" / row["file"]).read_bytes() for row in rows],
        "caption": [row["captions"][0][0] for row in rows],
    }
    pairs = pa.table(table)
    pq.write_table(pairs, folder / "pairs.parquet", row_group_size=25)
    pq.write_table(pairs.drop_columns(["caption"]), folder / "frames.parquet")
    return Parts(*(folder / name for name in ("encoder", "decoder", "pairs.parquet", "frames.parquet")))


def train_command(parts: Parts, out: Path, steps: int, *flags: str) -> list[str]:
    return [
        sys.executable, str(REPOSITORY / "jobs" / "train_captioner.py"),
        "--encoder", str(parts.encoder), "--decoder", str(parts.decoder), "--pairs", str(parts.pairs),
        "--out", str(out), "--train", "bridge+decoder", "--steps", str(steps), "--batch-size", "48",
        "--learning-rate", "2e-3", "--checkpoint-every", "10", "--ray-address", "local", *flags,
    ]  # fmt: skip


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The job in a process group of its own; whatever is left of it is ended."""
    job = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True)
    family = psutil.Process(job.pid)
    try:
        yield job
    finally:
        left = family.children(recursive=True) if family.is_running() else []
        job.kill()
        job.wait()
        for process in left:
            if process.is_running():
                process.kill()


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[bytes], timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the job did not come that far"
        assert job.poll() is None, "the job ended too soon"
        time.sleep(0.02)


def run(command: list[str]) -> None:
    with started(command) as job:
        assert job.wait(timeout=1700) == 0


def curve(out: Path) -> list[tuple[int, float]]:
    """(step, training loss) of every row."""
    path = Path(f"{out}.run") / "curve.csv"
    if not path.is_file():
        return []
    with path.open() as stream:
        return [(int(row["step"]), float(row["train_loss"])) for row in csv.DictReader(stream)]


def summary(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((Path(f"{out}.run") / "trained" / "summary.json").read_text())
    return found


def saved_step(out: Path) -> int:
    found = (Path(f"{out}.run") / "checkpoints").glob("step-*.pt")
    return max((int(path.stem.partition("-")[2]) for path in found), default=0)


@pytest.fixture(scope="module")
def uninterrupted(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "captioner"
    run(train_command(parts, out, STEPS))
    return out


def assert_same_end(out: Path, uninterrupted: Path, tolerance: float) -> None:
    print("rows of the curve", len(curve(out)), "last", curve(out)[-1], "uninterrupted", curve(uninterrupted)[-1])
    assert [step for step, _ in curve(out)] == [step for step, _ in curve(uninterrupted)]
    assert summary(out)["steps"] == summary(uninterrupted)["steps"] == STEPS
    assert curve(out)[-1][1] == pytest.approx(curve(uninterrupted)[-1][1], rel=tolerance)


def test_98_photographs_are_learned_by_heart_and_come_back_word_for_word(parts: Parts, tmp_path: Path) -> None:
    out = tmp_path / "captioner"
    begun = time.monotonic()
    run(train_command(parts, out, 300))
    seconds = time.monotonic() - begun
    run([
        sys.executable, str(REPOSITORY / "jobs" / "caption_frames.py"), "--input-uri", str(parts.frames),
        "--output-uri", str(tmp_path / "captions"), "--captioner", str(out), "--max-new-tokens", "60",
        "--ray-address", "local",
    ])  # fmt: skip
    said = pq.read_table(tmp_path / "captions").to_pylist()
    wanted = pq.read_table(parts.pairs).to_pylist()
    rows = [(one["caption"], other["caption"]) for one, other in zip(said, wanted, strict=True)]
    right = sum(one == other for one, other in rows)
    print(f"{right} of {len(rows)} word for word, {seconds:.0f} s of training, loss {summary(out)['train_loss']:.5f}")
    assert len(rows) == 98
    assert right >= 0.95 * len(rows)


def test_a_driver_killed_at_a_random_step_and_started_again_ends_as_if_nothing_had_been(
    parts: Parts, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captioner"
    command = train_command(parts, out, STEPS)
    step = random.SystemRandom().randrange(STEPS // 6, STEPS - 20)
    with started(command) as job:
        wait_for(lambda: bool(curve(out)) and curve(out)[-1][0] >= step, job)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    reached = saved_step(out)
    print(f"killed at or after step {step}, checkpoint of step {reached}")
    assert 0 < reached < STEPS
    run(command)
    assert_same_end(out, uninterrupted, 1e-3)


def test_a_killed_worker_is_replaced_and_the_run_goes_on_from_its_checkpoint(
    parts: Parts, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captioner"
    with started(train_command(parts, out, STEPS)) as job:
        wait_for(lambda: saved_step(out) >= STEPS // 4, job)
        family = psutil.Process(job.pid).children(recursive=True)
        workers = [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]
        assert workers, "no worker was there to kill"
        for worker in workers:
            worker.kill()
        reached = saved_step(out)
        assert reached < STEPS, "the run had ended before its worker was killed"
        assert job.wait(timeout=900) == 0
    print(f"{len(workers)} worker killed, checkpoint of step {reached}")
    assert_same_end(out, uninterrupted, 1e-3)


def test_two_workers_reach_the_loss_of_one(parts: Parts, uninterrupted: Path, tmp_path: Path) -> None:
    run(train_command(parts, tmp_path / "captioner", STEPS, "--workers", "2"))
    assert_same_end(tmp_path / "captioner", uninterrupted, 0.02)
