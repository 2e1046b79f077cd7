"""The README tells the truth: every flag, output column, metric and command that exists is in it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

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


def test_every_flag_of_every_framecap_command_is_in_the_readme(
    readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = []
    for command in ("describe", "check", "assemble", "pack", "verify", "report"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        flags = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, flags=re.MULTILINE))
        rows = [line for line in readme.splitlines() if line.startswith("| `") and f"`{command}`" in line.split("|")[1]]
        missing += [(command, flag) for flag in sorted(flags) if not any(f"`{flag}`" in row for row in rows)]
    assert missing == []


def test_the_sizing_table_is_its_formula(readme: str) -> None:
    table = readme.partition("| frames per night |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 4
    for line in table:
        frames, rate, *figures = (int(cell.replace(",", "")) for cell in line.strip("|").split("|"))
        needed = frames / (8 * 3600 * 0.85)
        assert rate == round(needed)
        assert figures == [math.ceil(needed / each) for each in (50, 100, 200, 400, 394, 191)]


def test_the_nightly_settings_of_the_readme_are_settings(readme: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    nightly = next(block for block in blocks if block.startswith("input_uri"))
    (tmp_path / "nightly.yaml").write_text(nightly)
    settings = CaptionSettings.from_command_line(["--config", str(tmp_path / "nightly.yaml"), "--num-gpus", "1"])
    assert settings.time_budget == 6 * 3600
    manifest = yaml.safe_load(next(block for block in blocks if "kind: RayCronJob" in block))
    entry = manifest["spec"]["jobTemplate"]["entrypoint"].split()
    assert (ROOT / entry[1]).exists()
    mounts = manifest["spec"]["jobTemplate"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert entry[entry.index("--config") + 1].startswith(mounts["containers"][0]["volumeMounts"][0]["mountPath"])


def test_every_file_the_readme_links_to_exists(readme: str) -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in t]
    assert [target for target in targets if not (ROOT / target).exists()] == []
