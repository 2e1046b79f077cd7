"""The job as it runs on a cluster: `ray start --head`, then `ray job submit --working-dir . -- python jobs/…`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, checkout, started_cluster
from shards import read_output, write_shards


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # The job asks for a GPU where Ray knows of one, and its actors take the CPU where torch sees none.
    with started_cluster(head_cpus=2, head_gpus=1) as cluster:
        yield cluster


@pytest.mark.timeout(420)
def test_a_submitted_job_captions_everything_and_a_mistaken_one_fails(
    cluster: Cluster, tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    write_shards(tmp_path / "in", 2, 10)
    options = json.dumps({"env_vars": {"FRAMECAP_STORAGE_OPTIONS": '{"s3": {"anon": true}}'}})
    folder = str(checkout(tmp_path / "checkout"))
    submit = ("submit", "--working-dir", folder, "--runtime-env-json", options, "--")
    job = [
        "python", "jobs/caption_frames.py", "--input-uri", str(tmp_path / "in"),
        "--output-uri", str(tmp_path / "out"), "--captioner", str(tiny_captioner_dir),
        "--max-new-tokens", "3", "--max-actors", "1",
    ]  # fmt: skip
    done = cluster.ray(*submit, *job)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert [len(table) for table in read_output(tmp_path / "out").values()] == [10, 10]
    summary = json.loads(next((tmp_path / "out" / "_framecap" / "runs").glob("*/summary.json")).read_text())
    assert summary["rows_by_status"] == {"truncated": 20}
    assert "captioning on" not in done.stdout, "the job did not ask for the GPU"

    mistaken = cluster.ray(*submit, *job, "--num-beems", "2")
    assert mistaken.returncode == 1
    assert "error: unknown flag --num-beems; did you mean --num-beams?" in mistaken.stdout
    assert "exit code 2" in mistaken.stdout + mistaken.stderr
