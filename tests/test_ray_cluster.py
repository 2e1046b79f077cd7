"""Joining and starting Ray: what answers nothing is refused at once, and a signal is heard meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import free_port
from shards import write_shards

from framecap.pipeline.run import main

# Ray's start hangs, as on a machine that is out of memory; it tells a secret on standard error before.
HANGING = """
import os, sys, threading, ray
def init(**options):
    os.write(2, b"a note of Ray's own")
    threading.Event().wait()
ray.init = init
from framecap.pipeline.run import main
sys.exit(main(sys.argv[1:]))
"""


def job(tmp_path: Path, captioner: Path) -> list[str]:
    write_shards(tmp_path / "in", 1, 2)
    return ["--input-uri", f"{tmp_path}/in", "--output-uri", f"{tmp_path}/out", "--captioner", str(captioner)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_ends_the_run_in_good_order(
    number: int, tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    command = [sys.executable, "-c", HANGING, *job(tmp_path, tiny_captioner_dir)]
    told = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            told.append(line)
            if "starting Ray" in line:
                process.send_signal(number)
        assert process.wait(timeout=60) == 75
    text = "".join(told)
    assert f"stopping: {signal.Signals(number).name} was received" in text
    assert "exit code 75" in text
    assert "Traceback" not in text
    assert "a note of Ray's own" not in text
    assert not (tmp_path / "out" / "_framecap" / "lock").exists()
    assert len(list((tmp_path / "out" / "_framecap" / "runs").glob("*/summary.json"))) == 1


def test_an_address_where_nothing_answers_is_one_line_and_holds_no_lock(
    tmp_path: Path, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # that of the session's cluster
    address = f"127.0.0.1:{free_port()}"
    assert main([*job(tmp_path, tiny_captioner_dir), "--ray-address", address]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: no Ray cluster answers at {address} (")
    assert not (tmp_path / "out" / "_framecap" / "lock").exists()
