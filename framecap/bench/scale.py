"""What the job costs by the number of shards and frames, whatever the captioner: planning, shards, memory.

    python -m framecap.bench.scale --subjects plan,shards,memory [--json FILE]

- ``plan``: a dry run over tiny shards: seconds, CPU seconds, growth of the driver.
- ``shards``: the whole job over shards of one frame: milliseconds a shard; and the same command again, with
  nothing to do.
- ``memory``: the whole job over many tiny frames, the memory of every process sampled as it runs.

The captioner is random and tiny, so that what is measured is the rest.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from framecap.bench.overhead import ENVIRONMENT, JOB, make_captioner
from framecap.bench.random_captioner import CaptionerShape
from framecap.errors import CaptionerError, SettingsError

MIB = 2**20
# What a process is, by its command line; the first that fits counts.
KINDS = {
    "actor": "ray::MapWorker",
    "reader": "ray::",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
    "driver": "caption_frames.py",
}


def main(argv: list[str] | None = None) -> int:
    """Measure and print tables; 2 for settings that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="framecap.bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--subjects", default="plan,shards,memory", help=f"of {', '.join(SUBJECTS)} (default: all)")
    add("--plan-shards", default="1000,10000,50000", metavar="A,B", help="shards to plan (default: %(default)s)")
    add("--job-shards", type=int, default=1000, metavar="N", help="shards of one frame (default: %(default)s)")
    add("--frames", type=int, default=200_000, metavar="N", help="frames of `memory` (default: %(default)s)")
    add("--shard-rows", type=int, default=2000, metavar="N", help="rows of its shards (default: %(default)s)")
    add("--every", type=float, default=2.0, metavar="S", help="seconds between samples (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything measured to FILE")
    arguments = parser.parse_args(argv)
    found: dict[str, Any] = {}
    try:
        names = arguments.subjects.split(",")
        if unknown := [name for name in names if name not in SUBJECTS]:
            raise SettingsError(f"--subjects: {unknown[0]!r} is unknown; known: {', '.join(SUBJECTS)}")
        with tempfile.TemporaryDirectory(prefix="framecap-scale-") as folder:
            for name in names:
                found[name] = SUBJECTS[name](arguments, Path(folder) / name)
                print(flush=True)
    except SettingsError as error:
        print(f"scale: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def write_frames(folder: Path, shards: int, rows: int) -> None:
    """``shards`` frame shards of ``rows`` frames of 32×32 pixels, all different; up to 1,000 in a folder."""
    for shard in range(shards):
        path = folder / f"{shard // 1000:03d}" / f"frames-{shard:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        first = shard * rows
        images = [_picture(number) for number in range(first, first + rows)]
        pq.write_table(pa.table({"frame_id": range(first, first + rows), "image": images}), path)


def _picture(number: int) -> bytes:
    tiles = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(tiles).resize((32, 32), Image.Resampling.NEAREST).save(sink, "JPEG")
    return sink.getvalue()


def plan_subject(arguments: argparse.Namespace, work: Path) -> list[dict[str, float]]:
    """Dry runs, each in a process of its own."""
    captioner = make_captioner(CaptionerShape("tiny", "tiny"), work / "captioner")
    print("| shards | listing and planning, s | CPU s | driver grows by, MiB |\n|---|---|---|---|")
    found = []
    for text in arguments.plan_shards.split(","):
        shards = int(text)
        write_frames(work / text, 1, 1)
        write_frames(work / f"one-{text}", 1, 1)
        [original] = (work / text).rglob("*.parquet")
        content = original.read_bytes()
        for shard in range(1, shards):
            path = work / text / f"{shard // 1000:03d}" / f"frames-{shard:06d}.parquet"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(_plan, (str(work / f"one-{text}"), str(captioner), str(work / "out")))  # imports and caches
            figures = pool.apply(_plan, (str(work / text), str(captioner), str(work / "out")))
        print("| {shards:,.0f} | {seconds:.2f} | {cpu_seconds:.2f} | {mib:.0f} |".format(shards=shards, **figures))
        found.append({"shards": shards, **figures})
    return found


def _plan(source: str, captioner: str, out: str) -> dict[str, float]:
    from framecap.pipeline.run import run
    from framecap.pipeline.settings import CaptionSettings

    settings = CaptionSettings(input_uri=source, output_uri=out, captioner=captioner, dry_run=True)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before, begun, used = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    with redirect_stdout(io.StringIO()):
        summary = run(settings)
    if summary.plan_failed:
        raise CaptionerError(f"{len(summary.plan_failed)} shards could not be planned")
    seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu_seconds": cpu, "mib": (peak - before) / MIB}


def shards_subject(arguments: argparse.Namespace, work: Path) -> dict[str, float]:
    """The whole job over N shards and over N/5: their difference is free of start-up; then once more."""
    captioner = make_captioner(CaptionerShape("tiny", "tiny"), work / "captioner")
    few, many = arguments.job_shards // 5, arguments.job_shards
    seconds = {}
    for shards in (few, many):
        write_frames(work / f"in-{shards}", shards, 1)
        run_job(work / f"in-{shards}", work / f"out-{shards}", captioner)
        seconds[shards] = summaries(work / f"out-{shards}")[-1]["seconds"]
    begun = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    log = run_job(work / f"in-{many}", work / f"out-{many}", captioner)
    again, cpu = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
    last = summaries(work / f"out-{many}")[-1]
    if last["captioned_rows"] or last["shards_done_before"] != many or "CPU cores" in log:
        raise CaptionerError("the second run had something to do")
    found = {
        "shards": many,
        "ms_per_shard": 1000 * (seconds[many] - seconds[few]) / (many - few),
        "seconds": seconds[many],
        "again_process_seconds": again,
        "again_process_cpu_seconds": cpu,
    }
    print("| whole job, shards of one frame | |\n|---|---|")
    print(f"| {many:,} shards, with start-up | {found['seconds']:.1f} s |")
    print(f"| a shard, without start-up | {found['ms_per_shard']:.1f} ms |")
    print(f"| once more, nothing changed: no Ray, no actor, imports included | {again:.1f} s ({cpu:.1f} s CPU) |")
    return found


@dataclass
class Sample:
    """Memory in MiB when ``frames`` were published. ``largest``: by kind of process, the largest RSS less shared
    pages (those of libraries and of Ray's object store, whose size has a limit of its own); ``largest_rss`` with
    them; ``total``: RSS of all ``processes``."""

    seconds: float
    frames: int
    total: float = 0.0
    processes: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    largest_rss: dict[str, float] = field(default_factory=dict)


def memory_subject(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Memory of every process over one run, as a table in steps of a tenth."""
    captioner = make_captioner(CaptionerShape("tiny", "tiny"), work / "captioner")
    write_frames(work / "in", -(-arguments.frames // arguments.shard_rows), arguments.shard_rows)
    samples: list[Sample] = []
    ended, begun = threading.Event(), time.perf_counter()
    own = psutil.Process()

    def watch() -> None:
        while not ended.wait(arguments.every):
            frames = arguments.shard_rows * sum(1 for _ in (work / "out").rglob("frames-*.parquet"))
            samples.append(sample(own, time.perf_counter() - begun, frames))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run_job(work / "in", work / "out", captioner, "--max-new-tokens=3", "--no-similarity", "--batch-size=256")
    ended.set()
    watcher.join()
    print("largest process of each kind without shared pages, and RSS of all with them, MiB\n")
    print(f"| frames published | s | {' | '.join(KINDS)} | all (processes) |\n|{'---|' * (len(KINDS) + 3)}")
    for row in _tenths(samples, arguments.frames):
        cells = " | ".join(f"{row.largest.get(kind, 0):.0f}" for kind in KINDS)
        print(f"| {row.frames:,} | {row.seconds:.0f} | {cells} | {row.total:.0f} ({row.processes}) |")
    return [asdict(row) for row in samples]


def sample(root: psutil.Process, seconds: float, frames: int) -> Sample:
    """Memory of all descendants of ``root`` now."""
    found = Sample(seconds, frames)
    for process in root.children(recursive=True):
        try:
            command, memory = " ".join(process.cmdline()), process.memory_info()
        except psutil.Error:  # gone meanwhile
            continue
        kind = next((kind for kind, words in KINDS.items() if words in command), "other")
        found.largest[kind] = max(found.largest.get(kind, 0.0), (memory.rss - memory.shared) / MIB)
        found.largest_rss[kind] = max(found.largest_rss.get(kind, 0.0), memory.rss / MIB)
        found.total += memory.rss / MIB
        found.processes += 1
    return found


def _tenths(samples: list[Sample], frames: int) -> Iterator[Sample]:
    """The first sample at or after each tenth of the frames."""
    wanted = 1
    for row in samples:
        if row.frames >= wanted:
            yield row
            wanted = (row.frames * 10 // frames + 1) * frames // 10
            if row.frames >= frames:
                return


def run_job(source: Path, out: Path, captioner: Path, *flags: str) -> str:
    """Run the job as a process of its own; returns its log. Raises ``CaptionerError`` unless all is done."""
    places = ["--input-uri", str(source), "--output-uri", str(out), "--captioner", str(captioner), "--device", "cpu"]
    done = subprocess.run([sys.executable, str(JOB), *places, *flags], capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode != 0:
        raise CaptionerError(f"the job ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stderr


def summaries(out: Path) -> list[dict[str, Any]]:
    """Summaries of all runs, in order."""
    return [json.loads(path.read_text()) for path in sorted((out / "_framecap" / "runs").glob("*/summary.json"))]


SUBJECTS = {"plan": plan_subject, "shards": shards_subject, "memory": memory_subject}

if __name__ == "__main__":
    sys.exit(main())
