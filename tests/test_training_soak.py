"""Training through Ray Data and Ray Train, by the commands a person types: ``make soak``.

Real photographs are learnt by heart, and a run whose driver is killed ends like one that was left alone.
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
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPOSITORY = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def photographs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """98 photographs with their first Russian caption: training pairs and frame shards at once."""
    source = shared / "photos" / "ru98"
    lines = [json.loads(line) for line in (source / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    table = pa.table(
        {
            "frame_id": [line["file"] for line in lines],
            "image": [(source / "images" / line["file"]).read_bytes() for line in lines],
            "caption": [line["captions"][0][0] for line in lines],
        }
    )
    path = tmp_path_factory.mktemp("ru98") / "pairs.parquet"
    pq.write_table(table, path, row_group_size=50)
    return path


def command(pairs: Path, out: Path, *flags: str) -> list[str]:
    parts = [f"--encoder={DATA / 'ruclip-vit-b32-tiny'}", f"--decoder={DATA / 'rugpt3-tiny'}", f"--pairs={pairs}"]
    job = str(REPOSITORY / "jobs" / "train_captioner.py")
    return [sys.executable, job, *parts, f"--out={out}", "--train=bridge+decoder", "--ray-address=local", *flags]


def losses(out: Path) -> dict[int, float]:
    with Path(f"{out}.run/curve.csv").open() as stream:
        return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(stream)}


def test_photographs_are_learnt_by_heart_and_said_by_the_caption_job(photographs: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    learn = ["--bridge=mlp", "--steps=2400", "--batch-size=49", "--learning-rate=3e-3", "--log-every=200"]
    subprocess.run(command(photographs, tmp_path / "captioner", *learn), check=True, timeout=1800)
    places = [f"--input-uri={photographs}", f"--output-uri={tmp_path / 'out'}", f"--captioner={tmp_path / 'captioner'}"]
    job = [sys.executable, str(REPOSITORY / "jobs" / "caption_frames.py"), *places, "--max-new-tokens=100"]
    subprocess.run([*job, "--keep-columns=frame_id"], check=True, timeout=600)
    wanted = pq.read_table(photographs, columns=["caption"])["caption"].to_pylist()
    said = pq.read_table(tmp_path / "out" / photographs.name, columns=["caption"])["caption"].to_pylist()
    right = sum(one == other for one, other in zip(said, wanted, strict=True))
    print(f"{right} of {len(wanted)} captions word for word in {time.monotonic() - began:.0f} s")
    assert right >= 0.95 * len(wanted), [pair for pair in zip(said, wanted, strict=True) if pair[0] != pair[1]]


def test_a_driver_killed_at_a_random_step_and_started_again_ends_like_one_left_alone(
    photographs: Path, tmp_path: Path
) -> None:
    flags = ["--steps=400", "--batch-size=14", "--learning-rate=1e-3", "--checkpoint-every=10", "--log-every=50"]
    subprocess.run(command(photographs, tmp_path / "whole", *flags), check=True, timeout=900)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(photographs, killed, *flags), start_new_session=True)
    chosen = random.Random(0).randrange(30, 300)
    deadline = time.monotonic() + 600
    while not any(int(path.stem[5:]) >= chosen for path in Path(f"{killed}.run/checkpoints").glob("step-*.pt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"no checkpoint of step {chosen} in ten minutes"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the driver and the Ray it started
    process.wait(60)
    done = subprocess.run(command(photographs, killed, *flags), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout + done.stderr
    left_alone, resumed = losses(tmp_path / "whole"), losses(killed)
    print(f"killed after step {chosen}; loss at step 400: left alone {left_alone[400]:.4f}, resumed {resumed[400]:.4f}")
    assert max(resumed) == max(left_alone) == 400
    assert resumed[400] == pytest.approx(left_alone[400], rel=0.02)
