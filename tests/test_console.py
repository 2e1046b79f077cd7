"""Whatever a command prints comes out, on every terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = "from framecap.console import print_anything; print_anything(); print('кот', 'frame-\\udce9.jpg')"


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("ascii", rb"\u043a\u043e\u0442 frame-\udce9.jpg"),
        ("cp1251", "кот".encode("cp1251") + rb" frame-\udce9.jpg"),
        ("utf-8", "кот".encode() + rb" frame-\udce9.jpg"),
    ],
)
def test_russian_text_and_odd_names_end_in_no_traceback(encoding: str, said: bytes) -> None:
    environment = {"PYTHONIOENCODING": encoding, "LANG": "C"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.strip() == said


@pytest.mark.parametrize("command", ["framecap", "run", "train_captioner", "evaluate_captions"])
def test_every_command_prints_so(command: str) -> None:
    """A mistake whose line is Russian, with standard error as strict as standard output is."""
    start = {
        "framecap": ["-m", "framecap.cli", "кот"],
        "run": ["-m", "framecap.cli", "run", "--кот"],
    }.get(command, [f"jobs/{command}.py", "--кот"])
    environment = {"PYTHONIOENCODING": "ascii:strict", "LANG": "C"}
    done = subprocess.run([sys.executable, *start], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert rb"\u043a\u043e\u0442" in done.stderr
    assert b"Traceback" not in done.stderr
