"""The README tells the truth: every flag, output column, metric and command that exists is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from framecap.cli import main
from framecap.pipeline.settings import CaptionSettings
from framecap.schema import CANDIDATES_FIELD, CAPTION_FIELDS, EMBEDDING_COLUMN
from framecap.training.settings import EvaluateSettings, TrainSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("settings", [CaptionSettings, TrainSettings, EvaluateSettings])
def test_every_flag_of_every_job_is_in_the_readme(settings: type, readme: str) -> None:
    flags = [f"`--{name.replace('_', '-')}`" for name in settings.model_fields]  # type: ignore[attr-defined]
    assert [flag for flag in flags if flag not in readme] == []


def test_every_column_that_framecap_adds_is_in_the_readme(readme: str) -> None:
    columns = [field.name for field in CAPTION_FIELDS] + [CANDIDATES_FIELD.name, EMBEDDING_COLUMN]
    assert [column for column in columns if f"`{column}`" not in readme] == []


def test_every_metric_of_the_actors_is_in_the_readme(readme: str) -> None:
    source = (ROOT / "framecap" / "pipeline" / "stages.py").read_text(encoding="utf-8")
    metrics = set(re.findall(r'(?:Counter|Gauge|Histogram)\(\s*"(framecap_\w+)"', source))
    assert metrics
    assert [metric for metric in sorted(metrics) if f"`{metric}`" not in readme] == []


def test_every_framecap_command_is_in_the_readme(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(commands) >= 5
    assert [name for name in commands if f"framecap {name}" not in readme] == []


def test_every_file_the_readme_links_to_exists(readme: str) -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in t]
    assert [target for target in targets if not (ROOT / target).exists()] == []
