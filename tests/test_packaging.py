"""The wheel holds what the work needs, and the constraint files are what pyproject.toml allows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import framecap
from framecap.demo import bundled_captioner

REPOSITORY = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip would build it; from a copy, without network."""
    root = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(REPOSITORY / "framecap", root / "source" / "framecap", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, root / "source")
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(root)], cwd=root / "source", check=True, capture_output=True, timeout=240
    )
    [path] = root.glob("framecap-*.whl")
    return path


def test_the_wheel_holds_the_captioner_the_report_and_the_licence_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    captioner = json.loads((bundled_captioner() / "manifest.json").read_text())["files"]
    needed = {f"framecap/demo/mini/{name}" for name in (*captioner, "manifest.json")}
    sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "framecap").rglob("*.py")}
    assert needed | sources | {"framecap/py.typed", "framecap/report/page.html"} <= names
    info = f"framecap-{framecap.__version__}.dist-info/"
    assert f"{info}licenses/LICENSE" in names
    assert {name.partition("/")[0] for name in names} == {"framecap", info.rstrip("/")}
    assert "framecap = framecap.cli:main" in zipfile.ZipFile(wheel).read(f"{info}entry_points.txt").decode()


def test_outside_the_clone_the_unpacked_wheel_describes_a_picture(wheel: Path, data: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    photo = data / "ruclip-vit-b32-tiny" / "images" / "00_RGB_640x360.jpg"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def command(*arguments: str) -> str:
        code = "import sys, framecap, framecap.cli; print(framecap.__file__); sys.exit(framecap.cli.main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        where, _, rest = done.stdout.partition("\n")
        assert Path(where).is_relative_to(tmp_path), "the clone was imported"
        return rest

    assert command("--version") == f"framecap {framecap.__version__}\n"
    assert command("describe", str(photo)).strip()
    assert "--input-uri" in command("run", "--help")


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, extras included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [
        found for found in map(Requirement, texts) if found.name not in ("framecap", "gcsfs", "adlfs", "setuptools")
    ]


def pinned(path: Path, python: str) -> dict[str, Version]:
    """Package → the version that a constraint file gives for a Python."""
    found = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            entry = Requirement(line)
            if entry.marker is None or entry.marker.evaluate({"python_version": python}):
                [version] = entry.specifier
                assert entry.name.lower() not in found, f"{entry.name} twice"
                found[entry.name.lower()] = Version(version.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_what_was_tested_is_what_is_allowed(python: str) -> None:
    versions = pinned(REPOSITORY / "constraints.txt", python)
    wrong = [str(need) for need in requirements() if versions[need.name.lower()] not in need.specifier]
    assert wrong == []


def test_the_oldest_that_is_tested_is_the_oldest_that_is_allowed() -> None:
    versions = pinned(REPOSITORY / ".ci" / "oldest.txt", "3.11")
    for need in requirements():
        lower = next(part for part in need.specifier if part.operator == ">=")
        assert versions[need.name.lower()] in need.specifier, need
        assert (
            versions[need.name.lower()].release[: len(Version(lower.version).release)] == Version(lower.version).release
        )
