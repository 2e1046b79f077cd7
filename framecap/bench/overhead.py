"""What the job costs beside its captioner: frames per second through Ray, and of a bare loop on the same cores.

    python -m framecap.bench.overhead [--frames 256] [--batch 16] [--rounds 2] [--clock cpu]

The bare loop is one process per core that decodes and captions its share of the frames, batch by batch, with one
thread. Both are timed after start-up: from the first batch of every process to its last but one. Rounds
alternate. Random weights of real shape (b32-384, ruGPT3-small), so that the models dominate.

``--clock cpu`` is for a machine that others use: frames per CPU second of all processes (driver, raylet, readers
and actors), times the cores; it holds for a quiet machine as far as no actor waits, and how long they waited stands
beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from framecap.bench.frames import SIZES, make_frames
from framecap.bench.random_captioner import DECODERS, ENCODERS, CaptionerShape, random_captioner
from framecap.bench.whole_job import save
from framecap.errors import CaptionerError
from framecap.model.captioner import Captioner
from framecap.model.decode_options import DecodeOptions
from framecap.model.images import crop_and_resize

JOB = Path(__file__).parents[2] / "jobs" / "caption_frames.py"
# Ray's workers have niceness 15; on a machine that others use, that alone would decide a comparison.
ENVIRONMENT = {**os.environ, "RAY_worker_niceness": "0"}


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        prog="framecap.bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=256, help="frames of a round (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="frames of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of each; medians count (default: %(default)s)")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="default: %(default)s")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--encoder", default="b32-384", choices=ENCODERS, help="default: %(default)s")
    parser.add_argument("--decoder", default="small", choices=DECODERS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="framecap-overhead-") as folder:
        work = Path(folder)
        captioner = make_captioner(CaptionerShape(arguments.encoder, arguments.decoder), work / "captioner")
        frames = make_frames(arguments.frames, SIZES["720p"])
        (work / "in").mkdir()
        table = pa.table({"frame_id": list(range(len(frames))), "image": frames})
        pq.write_table(table, work / "in" / "frames.parquet")
        job, bare, waits = [], [], []
        cores, batch, clock = arguments.cores, arguments.batch, arguments.clock
        for number in range(arguments.rounds):
            bare.append(rate(bare_loop(captioner, frames, batch, cores), cores, clock))
            ends, wait = job_run(captioner, work, f"out-{number}", batch, cores)
            job.append(rate(ends, cores, clock))
            waits.append(wait)
            print(f"round {number + 1}: bare loop {bare[-1]:.2f}, whole job {job[-1]:.2f} frames/s", flush=True)
    ratio = statistics.median(job) / statistics.median(bare)
    print(f"\n| {cores} cores, batches of {batch}, {clock} clock | frames/s (median of {arguments.rounds}) |")
    print("|---|---|")
    print(f"| bare loop, one process per core | {statistics.median(bare):.2f} |")
    print(f"| whole job, after start-up | {statistics.median(job):.2f} ({ratio:.0%}) |")
    print(f"| of their time, actors waited for frames | {statistics.median(waits):.1%} |")
    return 0


@dataclass(frozen=True)
class End:
    """A batch of ``frames`` is done at ``wall`` seconds, when all processes have used ``cpu`` seconds."""

    wall: float
    frames: int
    cpu: float


def make_captioner(shape: CaptionerShape, folder: Path) -> Path:
    """A random captioner of ``shape`` as a directory."""
    resolution = ENCODERS[shape.encoder].image_resolution
    sample = np.stack([crop_and_resize(frame, resolution) for frame in make_frames(4, SIZES["720p"])])
    made = random_captioner(shape, torch.from_numpy(sample), torch.device("cpu"), torch.float32)
    return save(made, folder)


def rate(ends: list[End], processes: int, clock: str) -> float:
    """Frames per second from the first batch that each of ``processes`` has finished to its last but one.

    An actor works on the next batch before one is finished: what it has done of it by then counts at both ends.
    """
    ends = sorted(ends, key=lambda end: end.wall)
    if len(ends) < 3 * processes:
        raise CaptionerError(f"{len(ends)} batches are too few to measure {processes} processes; give more frames.")
    first, last = ends[processes - 1], ends[-processes - 1]
    seconds = last.wall - first.wall if clock == "wall" else (last.cpu - first.cpu) / processes
    return sum(end.frames for end in ends[processes:-processes]) / seconds


def bare_loop(captioner: Path, frames: list[bytes], batch: int, processes: int) -> list[End]:
    """Decode and caption in ``processes`` loops side by side."""
    context = multiprocessing.get_context("spawn")
    ready, ends = context.Barrier(processes), context.SimpleQueue()
    loops = [
        context.Process(target=_loop, args=(captioner, frames[number::processes], batch, ready, ends))
        for number in range(processes)
    ]
    for loop in loops:
        loop.start()
    found, used = [], dict.fromkeys((loop.pid for loop in loops), 0.0)
    for _ in range(sum(-(-len(frames[number::processes]) // batch) for number in range(processes))):
        pid, wall, count, used[pid] = ends.get()
        found.append(End(wall, count, sum(used.values())))
    for loop in loops:
        loop.join()
    return found


def _loop(captioner: Path, frames: list[bytes], batch: int, ready: Barrier, ends: object) -> None:
    torch.set_num_threads(1)
    loaded = Captioner.from_pretrained(captioner, device="cpu")
    options = DecodeOptions()
    ready.wait()
    for start in range(0, len(frames), batch):
        part = frames[start : start + batch]
        loaded.caption(part, options)
        ends.put((os.getpid(), time.time(), len(part), time.process_time()))  # type: ignore[attr-defined]


def job_run(captioner: Path, work: Path, out: str, batch: int, actors: int) -> tuple[list[End], float]:
    """Run the whole job; returns when each fragment was written, and the share of their time that actors waited.
    All frames are one shard, whose fragments stay until the last of them."""
    command = [
        sys.executable, str(JOB), "--input-uri", str(work / "in"), "--output-uri", str(work / out),
        "--captioner", str(captioner), "--batch-size", str(batch), "--device", "cpu",
        "--min-actors", str(actors), "--max-actors", str(actors),
    ]  # fmt: skip
    ends: dict[str, End] = {}
    with tempfile.TemporaryFile() as log:
        job = psutil.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        while job.poll() is None:
            time.sleep(0.02)
            for path in (work / out / "_framecap" / "fragments").glob("*.fragment"):
                if path.name not in ends:
                    ends[path.name] = End(time.time(), batch, _cpu_seconds(job))
        log.seek(0)
        if job.returncode != 0:
            raise CaptionerError(f"the job ended with exit code {job.returncode}: {log.read().decode()[-2000:]}")
    [summary] = (work / out / "_framecap" / "runs").glob("*/summary.json")
    seconds = json.loads(summary.read_text())["stage_seconds"]
    wait = seconds["wait"] / sum(seconds[stage] for stage in ("wait", "encode", "generate"))
    return list(ends.values()), wait


def _cpu_seconds(root: psutil.Process) -> float:
    total = 0.0
    with suppress(psutil.Error):  # the job has just ended
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):  # gone meanwhile
                times = process.cpu_times()
                total += times.user + times.system
    return total


if __name__ == "__main__":
    sys.exit(main())
