"""Joining and starting Ray: what answers nothing is refused at once, and a signal is heard meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import free_port
from shards import write_shards

from framecap.errors import SettingsError
from framecap.pipeline.run import main
from framecap.ray_cluster import check_place_of_job, join_or_start

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


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("/tmp/" + "x" * 110, "is too long for the names of Ray's sockets; set RAY_TMPDIR"),
        ("/proc/1/nothing", "Ray cannot use /proc/1/nothing"),
    ],
)
def test_a_temporary_folder_that_ray_cannot_use_is_one_line(folder: str, said: str) -> None:
    code = (
        "from framecap.errors import SettingsError\nfrom framecap.ray_cluster import join_or_start\n"
        "try:\n    join_or_start('local')\nexcept SettingsError as error:\n    print(error)"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert said in done.stdout


def test_training_names_an_address_where_nothing_answers() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(SettingsError, match=f"no Ray cluster answers at {address}"):
        join_or_start(address)


def test_a_relative_output_under_ray_job_submit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_place_of_job("--output-uri", "captions")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for fine in ("/data/captions", "s3://bucket/captions", "file:///data/captions", None):
        check_place_of_job("--output-uri", fine)
    with pytest.raises(SettingsError, match=r"--output-uri captions is relative, and under `ray job submit`"):
        check_place_of_job("--output-uri", "captions")
