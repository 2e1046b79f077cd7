"""Temporary folders of a killed process are swept by the next run on that host; those of one at work are not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from framecap.scratch import ScratchFolder, sweep_scratch_folders

KILLED = """
import os, signal, sys
from framecap.scratch import ScratchFolder
folder = ScratchFolder()
open(folder.name + "/shard", "w").write("half")
print(folder.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def make_old(folder: Path) -> None:
    os.utime(folder, (time.time() - 3600, time.time() - 3600))


def test_a_folder_is_swept_once_its_process_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None
        folder = Path(one.stdout.readline().strip())
        make_old(folder)
        assert sweep_scratch_folders() == 0
        assert (folder / "shard").read_text() == "half"
        one.kill()
    assert sweep_scratch_folders() == 1
    assert not folder.exists()


def test_a_folder_of_this_process_and_one_just_made_are_left_alone(tmp_path: Path) -> None:
    just_made = tmp_path / "framecap-work-abcdefgh"
    just_made.mkdir()
    with ScratchFolder() as folder:
        make_old(Path(folder))
        assert sweep_scratch_folders() == 0
        assert sorted(tmp_path.iterdir()) == sorted([just_made, Path(folder)])
    assert list(tmp_path.iterdir()) == [just_made]


@pytest.mark.parametrize(
    "name", ["framecap-demo", "framecap-work-of-mine", "framecap-workspace", "framecap-work-ABCDEFGH"]
)
def test_what_has_another_name_is_nobodys_scratch_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    make_old(tmp_path / name)
    assert sweep_scratch_folders() == 0
    assert (tmp_path / name).is_dir()


def test_a_link_with_such_a_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    make_old(tmp_path / "mine")
    (tmp_path / "framecap-work-abcdefgh").symlink_to(tmp_path / "mine")
    assert sweep_scratch_folders() == 0
    assert (tmp_path / "mine").is_dir()
