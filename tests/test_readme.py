"""README and docs tell the truth: the reference is current, links lead somewhere, tables follow their formulas."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from framecap import reference
from framecap.pipeline.settings import CaptionSettings

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.fixture(scope="module")
def operator_page() -> str:
    return (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_pages_written_from_the_code_are_current(name: str) -> None:
    committed = (ROOT / name).read_text(encoding="utf-8")
    assert committed == reference.PAGES[name](), "run: python -m framecap.reference"


def test_every_file_says_in_a_line_what_it_is_for() -> None:
    lines = [line for line in reference.files_page().splitlines() if line.startswith("| `")]
    wrong = [line for line in lines if not 20 <= len(line.split("|")[2].strip()) <= 200]
    assert len(lines) > 50
    assert wrong == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_metric_of_the_actors_is_documented(operator_page: str) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "framecap" / "pipeline").rglob("*.py")]
    metrics = {
        name for text in sources for name in re.findall(r'(?:Counter|Gauge|Histogram)\(\s*"(framecap_\w+)"', text)
    }
    assert metrics
    assert [metric for metric in sorted(metrics) if f"`{metric}`" not in operator_page] == []


def test_the_sizing_table_is_its_formula(operator_page: str) -> None:
    table = operator_page.partition("| frames per night |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 4
    for line in table:
        frames, rate, *figures = (int(cell.replace(",", "")) for cell in line.strip("|").split("|"))
        needed = frames / (8 * 3600 * 0.85)
        assert rate == round(needed)
        assert figures == [math.ceil(needed / each) for each in (50, 100, 200, 400, 394, 191)]


def test_the_nightly_settings_of_the_operator_page_are_settings(operator_page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", operator_page, flags=re.DOTALL)
    nightly = next(block for block in blocks if block.startswith("input_uri"))
    (tmp_path / "nightly.yaml").write_text(nightly)
    settings = CaptionSettings.from_command_line(["--config", str(tmp_path / "nightly.yaml"), "--num-gpus", "1"])
    assert settings.time_budget == 6 * 3600
    manifest = yaml.safe_load(next(block for block in blocks if "kind: RayCronJob" in block))
    entry = manifest["spec"]["jobTemplate"]["entrypoint"].split()
    assert (ROOT / entry[1]).exists()
    mounts = manifest["spec"]["jobTemplate"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert entry[entry.index("--config") + 1].startswith(mounts["containers"][0]["volumeMounts"][0]["mountPath"])


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            dead.append(target)
    assert dead == []
