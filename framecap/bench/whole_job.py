"""The ``job`` stage: frame shards in, caption shards out, through Ray. Imports Ray, pyarrow and pydantic."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from framecap.bench.measure import Contestant, Row
from framecap.bench.subject import Bench
from framecap.errors import CaptionerError
from framecap.model.bridge_config import BridgeConfig
from framecap.model.captioner import BRIDGE_PREFIX, BRIDGE_WEIGHTS, Captioner
from framecap.model.captioner_config import CaptionerConfig
from framecap.model.convert import assemble
from framecap.model.decode_options import DecodeOptions
from framecap.model.weights import write_state_dict
from framecap.pipeline.run import EXIT_DONE, run
from framecap.pipeline.settings import CaptionSettings

SHARDS = 2


def job_stage(bench: Bench, captioner_uri: str | None = None) -> list[Row]:
    """The whole job on frames that all differ, on as many of which every one stands twice, and the same
    captioner without Ray. Always wall clock, since the work is done by other processes; ``frames`` per run.
    """
    options = bench.options
    count = 2 * (min(options.frames, options.batch) // 2) or 2
    frames = bench.jpegs("720p", count)
    with tempfile.TemporaryDirectory(prefix="framecap-benchmark-") as folder:
        work = Path(folder)
        captioner = captioner_uri or str(save(bench.captioner, work / "captioner"))
        half = frames[: count // 2]
        inputs = {"all differ": frames, "every frame twice": [*half, *half]}
        contestants = []
        for name, content in inputs.items():
            source = work / name.replace(" ", "-")
            write_shards(content, source)
            job = functools.partial(run_job, bench, captioner, source, work)
            contestants.append(Contestant(f"framecap job, {name}", count, job, False))
        greedy = DecodeOptions(max_new_tokens=options.max_new_tokens)
        alone = functools.partial(bench.captioner.caption, frames, greedy)
        contestants.append(Contestant("framecap captioner, without Ray", count, alone, False))
        return replace(bench.watch, clock="wall").compare("job", contestants)


def run_job(bench: Bench, captioner: str, source: Path, work: Path) -> None:
    """Run the job into a fresh folder; CaptionerError unless it captions everything."""
    options = bench.options
    flags = {
        "input-uri": source,
        "output-uri": tempfile.mkdtemp(prefix="out-", dir=work),
        "captioner": captioner,
        "device": options.device.type,
        "dtype": str(options.dtype).removeprefix("torch."),
        "max-new-tokens": options.max_new_tokens,
        "batch-size": options.batch,
    }
    settings = CaptionSettings.from_command_line([f"--{name}={value}" for name, value in flags.items()])
    summary = run(settings)
    if summary.exit_code != EXIT_DONE:
        raise CaptionerError(f"the job on {source} ended with exit code {summary.exit_code}; see its log above.")


def write_shards(frames: Sequence[bytes], folder: Path) -> None:
    """Write ``frames`` as Parquet frame shards with numbers for ids."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        numbers = range(shard, len(frames), SHARDS)
        table = pa.table({"frame_id": list(numbers), "image": [frames[number] for number in numbers]})
        pq.write_table(table, folder / f"frames-{shard:05d}.parquet")


def save(captioner: Captioner, folder: Path) -> Path:
    """Write a captioner that has only ever been in memory as a captioner directory."""
    parts = folder.parent / f"{folder.name}-parts"
    parts.mkdir(parents=True)
    captioner.encoder.save_pretrained(parts / "encoder")
    captioner.decoder.save_pretrained(parts / "decoder")
    state = {f"{BRIDGE_PREFIX}{name}": tensor for name, tensor in captioner.bridge.state_dict().items()}
    write_state_dict(parts / BRIDGE_WEIGHTS, state)
    config: BridgeConfig = captioner.config.bridge
    return assemble(parts / "encoder", parts / "decoder", parts / BRIDGE_WEIGHTS, folder, CaptionerConfig(config))
