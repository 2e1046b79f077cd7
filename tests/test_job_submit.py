"""The job as it runs on a cluster: `ray start --head`, then `ray job submit --working-dir . -- python jobs/…`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shards import read_output, write_shards

REPOSITORY = Path(__file__).parent.parent
# `python` in an entrypoint is the one first on the head node's PATH, as in an activated environment.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT = {**os.environ, "PATH": PATH, "RAY_ADDRESS": "", "RAY_AUTH_MODE": "disabled"}
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A head node of its own with a dashboard; stopped by ending the processes that it started."""
    port, address = free_port(), free_port()
    temporary = tempfile.mkdtemp(prefix="fc-", dir="/tmp")  # Ray's socket paths may not be long
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={address}", f"--dashboard-port={port}",
        "--object-store-memory=200000000", "--disable-usage-stats", "--include-dashboard=true",
        f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={temporary}",
    ]  # fmt: skip
    head = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a fresh checkout would have it: library and jobs."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "demo")
    for name in ("framecap", "jobs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    return folder


def submit(dashboard: str, working_dir: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--address", dashboard, "--working-dir", str(working_dir), "--", *entrypoint]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=ENVIRONMENT)


def wait_until_up(dashboard: str) -> None:
    import time
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{dashboard}/api/version", timeout=5).read()
            return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.mark.timeout(420)
def test_a_submitted_job_captions_everything_and_a_mistaken_one_fails(
    dashboard: str, working_dir: Path, tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    write_shards(tmp_path / "in", 2, 10)
    wait_until_up(dashboard)
    job = [
        "python", "jobs/caption_frames.py", "--input-uri", str(tmp_path / "in"),
        "--output-uri", str(tmp_path / "out"), "--captioner", str(tiny_captioner_dir),
        "--max-new-tokens", "3", "--max-actors", "1",
    ]  # fmt: skip
    done = submit(dashboard, working_dir, *job)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert [len(table) for table in read_output(tmp_path / "out").values()] == [10, 10]
    summary = json.loads(next((tmp_path / "out" / "_framecap" / "runs").glob("*/summary.json")).read_text())
    assert summary["rows_by_status"] == {"truncated": 20}

    mistaken = submit(dashboard, working_dir, *job, "--num-beems", "2")
    assert mistaken.returncode == 1
    assert "error: unknown flag --num-beems; did you mean --num-beams?" in mistaken.stdout
    assert "exit code 2" in mistaken.stdout + mistaken.stderr
