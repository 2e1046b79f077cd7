"""The process, summary.json and the log agree on how a run ended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from shards import caption, without_ray, write_shards

from framecap.errors import StorageError, StoreUnavailableError
from framecap.pipeline.run import main
from framecap.storage import temporary_name

__all__ = ["without_ray"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture
def places(tmp_path: Path, tiny_captioner_dir: Path) -> list[str]:
    write_shards(tmp_path / "in", 2, 3)
    return ["--input-uri", f"{tmp_path}/in", "--output-uri", f"{tmp_path}/out", "--captioner", str(tiny_captioner_dir)]


def told(tmp_path: Path, log: pytest.LogCaptureFixture) -> tuple[Any, bool]:
    """The exit code of summary.json, and whether the closing line says the same."""
    [path] = (tmp_path / "out" / "_framecap" / "runs").glob("*/summary.json")
    code = json.loads(path.read_text())["exit_code"]
    return code, f"; exit code {code}" in log.messages[-1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 75),
        (StoreUnavailableError("the store does not answer"), 75),
        (StorageError("s3://x cannot be listed"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("where", ["framecap.pipeline.run.take_up_fragments", "framecap.pipeline.run.Publisher.finish"])
def test_whatever_breaks_a_run_off_its_three_exit_codes_agree(
    where: str,
    error: BaseException,
    code: int,
    places: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(where, broken)
    with caplog.at_level(logging.INFO):
        assert main(places) == code
    assert told(tmp_path, caplog) == (code, True)


def test_an_error_that_the_caller_is_handling_is_not_the_runs(
    places: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        raise ValueError("of the caller")
    except ValueError:
        with caplog.at_level(logging.INFO):
            assert main(places) == 0
    assert told(tmp_path, caplog) == (0, True)


def test_a_dry_run_after_a_kill_passes_over_what_the_killed_run_was_writing(
    tmp_path: Path, tiny_captioner_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", 2, 3)
    first = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    runs = tmp_path / "out" / "_framecap" / "runs"
    (runs / "99991231T000000-killed").mkdir()
    (runs / "99991231T000000-killed" / temporary_name()).write_bytes(b"{")
    again = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, dry_run=True, max_new_tokens=5)
    assert again.exit_code == 0
    assert f"at the {first.frames_per_second:.1f} frames/s of the last run" in capsys.readouterr().out
