"""Captions per second, stage by stage, beside what people would use instead.

`python jobs/benchmark.py` measures this machine with a captioner of real shape and random weights (nothing is
downloaded); `--captioner DIR` takes a real one. All contestants of a stage have the same weights, the same frames
and the same caption lengths, run interleaved, and are given as medians. The last lines size a cluster. All stages
but `job` and `host` run on a bare PyTorch machine, without Ray, pyarrow or pydantic. `host` has no contestants: it runs
the job's actor with a device that answers at once, and tells how many frames/s its Python allows (`taskset -c 0`: one
core's).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, without installation

import torch
import transformers

from framecap.bench.measure import CLOCKS, Row, Stopwatch, measure_ceilings
from framecap.bench.random_captioner import BRIDGES, DECODERS, ENCODERS, MAX_LENGTH, CaptionerShape
from framecap.bench.stages import STAGES
from framecap.bench.subject import Bench, BenchOptions
from framecap.bench.table import as_json, format_sizing, format_table, sizing
from framecap.errors import FramecapError, SettingsError
from framecap.model.captioner import Captioner
from framecap.model.devices import DTYPES, choose_device, choose_dtype

FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_floating_point]
DEFAULT_STAGES = "decode,encode,generate,caption,captioner"
CORES = len(os.sched_getaffinity(0))
KNOWN_STAGES = (*STAGES, "job", "host")
# Where a flag is not given.
AMOUNTS = {
    "cpu": {"frames": 64, "beam_frames": 16, "slow_frames": 8, "memory_frames": 512, "threads": 1},
    "cuda": {"frames": 4096, "beam_frames": 2048, "slow_frames": 8, "memory_frames": 4096, "threads": CORES},
}
BATCHES = {"cpu": "8,32", "cuda": "512,1024,2048"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stages", default=DEFAULT_STAGES, metavar="A,B", help=f"of {', '.join(KNOWN_STAGES)} (default: %(default)s)")
    add("--captioner", metavar="DIR", help="a real captioner directory or URI, in place of random weights")
    add("--encoder", default="b32-384", choices=ENCODERS, help="shape of the ruCLIP encoder (default: %(default)s)")
    add("--decoder", default="small", choices=DECODERS, help="shape of the ruGPT3 decoder (default: %(default)s)")
    add("--bridge", default="mlp", choices=BRIDGES, help="kind of bridge (default: %(default)s)")
    add("--frames", type=int, metavar="N", help="frames of a run (default: 64; GPU 4096)")
    add("--batches", metavar="A,B", help="batches of generation, the last for all (default: 8,32; GPU 512,1024,2048)")
    add("--beam-frames", type=int, metavar="N", help="frames of beam search (default: 16; GPU 2048)")
    add("--slow-frames", type=int, metavar="N", help="frames of ClipCap's loop (default: 8)")
    add("--memory-frames", type=int, metavar="N", help="memory stage: N and 8 N frames (default: 512; GPU 4096)")
    add("--max-new-tokens", type=int, default=MAX_LENGTH, metavar="N", help="longest caption (default: %(default)s)")
    add("--pictures", metavar="DIR", help="pictures to make JPEG frames of (default: drawn ones)")
    add("--no-static-cache", action="store_true", help="leave out transformers.generate with a static cache")
    add("--repeats", type=int, default=3, metavar="N", help="rounds; the medians count (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads of torch and JPEG decoding (default: 1; GPU all cores)")
    add("--clock", default="wall", choices=CLOCKS, help="cpu: CPU seconds, for a machine in use (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", *FLOATS), help="auto: float16 on a GPU, else float32")
    add("--seed", type=int, default=0, help="of weights, frames and lengths (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything measured to FILE as JSON, after every stage")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 0 done, 2 for settings that cannot be used."""
    arguments = parse(argv)
    try:
        measure(arguments)
    except FramecapError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Run the stages, print the table as it grows and the sizing; what ``--json`` names grows with it."""
    stages = chosen_stages(arguments.stages)
    options = bench_options(arguments)
    torch.set_num_threads(options.threads)
    if "host" in stages:
        stages.remove("host")
        print(host_rows(arguments), flush=True)
        if not stages:
            return
    watch = Stopwatch(arguments.repeats, arguments.clock, options.device)
    ceilings = measure_ceilings(watch, options.dtype)
    where = machine(options.device)
    print(f"{where['device']}, {options.dtype}, {options.threads} CPU thread(s), {where['date']}")
    print(f"ceilings: {ceilings.operations / 1e9:,.0f} GFLOP/s, {ceilings.bytes / 1e9:,.0f} GB/s\n")
    shape = CaptionerShape(arguments.encoder, arguments.decoder, arguments.bridge)
    captioner = arguments.captioner and Captioner.from_pretrained(arguments.captioner, options.device, options.dtype)
    bench = Bench(captioner or shape, options, watch, ceilings)
    rows: list[Row] = []
    settings = vars(arguments) | {"stages": stages} | options.as_settings()

    def keep() -> None:
        if arguments.json:
            report = json.dumps(as_json(rows, where, ceilings, settings), indent=1, ensure_ascii=False)
            Path(arguments.json).write_text(report + "\n", encoding="utf-8")

    keep()  # a file that cannot be written is found now, not after all stages
    for stage in stages:
        print(f"{stage} …", file=sys.stderr, flush=True)
        found = STAGES[stage](bench) if stage in STAGES else job_rows(bench, arguments.captioner)
        print(format_table(found), flush=True)
        print()
        rows += found
        keep()
    unit = "GPU" if options.device.type == "cuda" else f"{options.threads} CPU thread(s)"
    print(f"{format_sizing(sizing(rows), unit)}")


def chosen_stages(text: str) -> list[str]:
    """The stages named by ``--stages``; SettingsError for an unknown one."""
    stages = [name.strip() for name in text.split(",") if name.strip()]
    for name in stages:
        if name not in KNOWN_STAGES:
            raise SettingsError(f"--stages: {name!r} is unknown; known: {', '.join(KNOWN_STAGES)}.")
    if not stages:
        raise SettingsError(f"--stages is empty; known: {', '.join(KNOWN_STAGES)}.")
    return stages


def bench_options(arguments: argparse.Namespace) -> BenchOptions:
    """Flags, with what suits the device where a flag was not given. Raises SettingsError."""
    device = choose_device(arguments.device)
    given = arguments.batches or BATCHES[device.type]
    try:
        sizes = tuple(int(size) for size in given.split(","))
    except ValueError:
        sizes = ()
    flags = {name: getattr(arguments, name) for name in AMOUNTS[device.type]}
    amounts = AMOUNTS[device.type] | {name: value for name, value in flags.items() if value is not None}
    amounts["max_new_tokens"] = arguments.max_new_tokens
    for name, value in {**amounts, "repeats": arguments.repeats}.items():
        if value < 1:
            raise SettingsError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if not sizes or min(sizes) < 1:
        raise SettingsError(f"--batches is {given!r}; give numbers from 1 on, such as 8,32.")
    return BenchOptions(
        **amounts,
        batches=sizes,
        pictures=arguments.pictures,
        no_static_cache=arguments.no_static_cache,
        device=device,
        dtype=choose_dtype(arguments.dtype, device),
        seed=arguments.seed,
    )


def job_rows(bench: Bench, captioner: str | None) -> list[Row]:
    """The whole job; the one stage that needs Ray, pyarrow and pydantic."""
    from framecap.bench.whole_job import job_stage

    return job_stage(bench, captioner)


def host_rows(arguments: argparse.Namespace) -> str:
    """What the actor's Python allows; needs Ray and pyarrow, and no model."""
    from framecap.bench.host import host_table

    side = ENCODERS[arguments.encoder].image_resolution
    print(f"{processor()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n")
    return host_table(side, arguments.repeats, arguments.clock)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "cpu_cores": os.cpu_count(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name and its widest vector instructions."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({capability})"


if __name__ == "__main__":
    sys.exit(main())
