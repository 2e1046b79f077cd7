"""Watching a run: what an actor tells Ray's metrics endpoint, and the log lines of a run without a terminal."""

from __future__ import annotations

import logging
import pickle
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import caption, caption_in_process, jpeg, start_nothing, without_ray, write_shards

from framecap.model.captioner import Captioner
from framecap.model.decode_options import DecodeOptions
from framecap.pipeline import progress
from framecap.pipeline.caption import RayCaptionActor
from framecap.pipeline.host import Host
from framecap.pipeline.job import Job, Resources
from framecap.pipeline.plan import Chunk, Piece
from framecap.pipeline.read import ReadOptions, read_units
from framecap.pipeline.records import ActorOptions, ChunkRecord
from framecap.pipeline.run import run
from framecap.pipeline.settings import CaptionSettings
from framecap.pipeline.stops import Stops
from framecap.schema import InputColumns
from framecap.shards import mark_of

__all__ = ["without_ray"]  # a fixture


class Clock(Host):
    """A host whose clock goes by itself no more than a test lets it."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


STAGES = {"read", "decode", "wait", "encode", "generate", "write"}


def blocks(folder: Path, captioner: Path, images: list[bytes]) -> list[pa.Table]:
    """What readers would hand to an actor: one shard of ``images`` as one chunk."""
    folder.mkdir()
    table = pa.table({"frame_id": [str(i) for i in range(len(images))], "image": images})
    pq.write_table(table, folder / "a.parquet")
    chunk = (Piece("a.parquet", mark_of(str(folder / "a.parquet")), 0, len(images)),)
    options = ReadOptions(str(folder), InputColumns(), Captioner.from_pretrained(captioner).resolution, seed=0)
    return list(read_units(pa.table({"unit": [pickle.dumps((chunk,))]}), options))


def scrape(port: int) -> dict[str, dict[str, float]]:
    """Worker → series → value of every framecap metric at a node's endpoint; labels other than ours left out."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = re.findall(r"^ray_(framecap_\w+)(\{[^}]*\}) (\S+)$", answer.read().decode(), flags=re.MULTILINE)
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in lines:
        ours = "".join(f"[{label}]" for label in re.findall(r'\b(?:status|stage|le)="([^"]*)"', labels))
        [worker] = re.findall(r'\bWorkerId="([^"]*)"', labels)
        found.setdefault(worker, {})[name + ours] = float(value)
    return found


def test_an_actor_reports_every_stage_on_the_metrics_endpoint(
    ray_cluster: None, tiny_captioner_dir: Path, tmp_path: Path
) -> None:
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    others = set(scrape(port))  # actors of other tests on the same cluster
    images = [jpeg(1), jpeg(2), jpeg(2), b"no picture"]
    options = ActorOptions(str(tiny_captioner_dir), str(tmp_path), "f", DecodeOptions(max_new_tokens=4), batch_size=8)
    actor = ray.remote(RayCaptionActor).options(num_cpus=0.5).remote(options, "")
    [record] = [
        pickle.loads(ray.get(actor.__call__.remote(block)).column("record")[0].as_py())
        for block in blocks(tmp_path / "in", tiny_captioner_dir, images)
    ]
    assert set(record.seconds) == STAGES
    assert all(record.seconds[stage] > 0 for stage in ("decode", "encode", "generate", "write"))
    deadline = time.monotonic() + 40
    while not (own := scrape(port).keys() - others) and time.monotonic() < deadline:
        time.sleep(0.5)
    ray.kill(actor)
    [worker] = own
    seen = scrape(port)[worker]
    assert seen["framecap_frames_total[truncated]"] == 3
    assert seen["framecap_frames_total[error]"] == 1
    assert seen["framecap_frames_reused_total"] == 1
    assert seen["framecap_tokens_total"] == 8
    assert {f"framecap_stage_seconds_total[{stage}]" for stage in ("decode", "encode", "generate")} <= set(seen)
    assert seen["framecap_batch_fill_bucket[0.5]"] == 1


@pytest.mark.usefixtures("without_ray")
def test_the_last_line_of_a_run_says_how_it_ended_and_where_its_summary_is(
    tiny_captioner_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "in", 2, 3)
    with caplog.at_level(logging.INFO):
        summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    last = caplog.messages[-1]
    assert last.startswith("6 frames captioned in ")
    assert "0 with errors, 2 shards published; exit code 0; " in last
    assert Path(last.rpartition("; ")[2]).parent.name == summary.run_id


@pytest.mark.usefixtures("without_ray")
def test_the_last_line_names_errors_by_kind_and_what_to_do_about_them(
    tiny_captioner_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    images = [jpeg(1), b"no picture", b"", b"none"]
    pq.write_table(pa.table({"frame_id": list("abcd"), "image": images}), tmp_path / "in" / "a.parquet")
    with caplog.at_level(logging.INFO):
        caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, max_error_rate=1.0)
    assert "to do: 1 shard, 4 rows (1 new); done: 0 shards" in caplog.text
    told = "3 with errors (2 not_an_image, 1 empty; --retry-errors takes them up again), 1 shard published"
    assert told in caplog.messages[-1]


@pytest.mark.usefixtures("without_ray")
def test_what_prune_deletes_is_named(
    tiny_captioner_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = write_shards(tmp_path / "in", 2, 3)
    places = (tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    caption(*places)
    (tmp_path / "in" / names[0]).unlink()
    with caplog.at_level(logging.INFO):
        caption(*places, prune=True)
    assert f"deleted 1 caption shard without a frame shard: {names[0]}" in caplog.messages
    assert "1 shard deleted (--prune)" in caplog.messages[-1]


def test_the_rate_of_a_run_counts_from_its_first_batch(
    tiny_captioner_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray and the models take a minute to start, then come two batches, 20 s apart."""
    host = Clock()

    class Stream:
        def start(self, job: Job, stops: Stops) -> Resources:
            host.seconds += 60
            return start_nothing(job.settings)

        def records(
            self, job: Job, units: list[tuple[Chunk, ...]], resources: Resources, stops: Stops
        ) -> Iterator[ChunkRecord]:
            for record in caption_in_process(job, units, resources, stops):
                yield record
                host.seconds += 20

    write_shards(tmp_path / "in", 1, 12)
    settings = CaptionSettings(
        input_uri=str(tmp_path / "in"), output_uri=str(tmp_path / "out"), captioner=str(tiny_captioner_dir),
        batch_size=6, max_new_tokens=3,
    )  # fmt: skip
    summary = run(settings, host, Stream())
    assert (summary.captioned_rows, summary.frames_per_second) == (12, 6 / 40)


def test_without_a_terminal_a_line_tells_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY_S", 0.0)
    record = ChunkRecord("", (), {}, statuses={"ok": 25}, error_kinds={}, reused=0, tokens=0, seconds={})
    with caplog.at_level(logging.INFO, progress.__name__), progress.Progress(100) as shown:
        shown.add(record)
        time.sleep(0.01)
        shown.add(record)
    assert "25 of 100 frames, no rate yet" in caplog.text, "Ray's start does not count"
    assert re.search(r"50 of 100 frames, [\d.]+ frames/s, \d+ s left", caplog.text)
    assert capsys.readouterr().err == ""
