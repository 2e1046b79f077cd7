"""Flags, environment and YAML say the same things, in that order; what nobody knows is refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from framecap.errors import SettingsError
from framecap.pipeline.settings import CaptionSettings
from framecap.settings import JobSettings, Seconds, StringList, Texts


class Example(JobSettings):
    """A job with one setting of each kind."""

    input_uri: str = Field(description="where from")
    beams: int = Field(1, ge=1, description="how many")
    quick: bool = Field(False, description="or not")
    stop: StringList = Field((), description="what ends it")
    budget: Seconds | None = Field(None, description="how long")


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input-uri: file\nbeams: 2\nbudget: 1.5h\nstop: ['.', '!']\n")
    monkeypatch.setenv("FRAMECAP_BEAMS", "3")
    arguments = ["--config", str(file)]
    settings = Example.from_command_line(arguments)
    assert (settings.input_uri, settings.beams, settings.budget) == ("file", 3, 5400.0)
    assert settings.stop == (".", "!")
    assert Example.from_command_line([*arguments, "--beams", "4"]).beams == 4


@pytest.mark.parametrize("name", ["flag", "environment", "file"])
def test_every_setting_means_the_same_wherever_it_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"input_uri": "s3://b/in", "quick": "true", "stop": "a,b", "budget": "90"}
    arguments: list[str] = []
    if name == "flag":
        arguments = ["--input-uri", "s3://b/in", "--quick", "--stop", "a,b", "--budget", "90"]
    elif name == "environment":
        for key, value in values.items():
            monkeypatch.setenv(f"FRAMECAP_{key.upper()}", value)
    else:
        (tmp_path / "job.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
        arguments = ["--config", str(tmp_path / "job.yaml")]
    settings = Example.from_command_line(arguments)
    assert (settings.input_uri, settings.quick, settings.stop, settings.budget) == (
        "s3://b/in", True, ("a", "b"), 90.0,
    )  # fmt: skip


def test_a_mistake_in_storage_options_does_not_repeat_them(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("storage_options: hush\n")
    with pytest.raises(SettingsError, match=r"--storage-options: .*dictionary") as caught:
        Example.from_command_line(["--config", str(tmp_path / "job.yaml"), "--input-uri", "x"])
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-urj", "x"], "unknown flag --input-urj; did you mean --input-uri?"),
        (["--beams", "x", "--input-uri", "a"], "--beams 'x': .*integer"),
        (["--beams", "0", "--input-uri", "a"], "--beams '0': .*greater than or equal to 1"),
        ([], "--input-uri is required"),
        (["--input-uri", "a", "stray"], "unrecognized arguments: stray"),
        (["--input-uri", "a", "--beams"], "--beams: expected one argument"),
        (["--input-uri", "a", "--budget", "soon"], r"--budget 'soon': not a duration; use seconds \(90\), or 30m"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Example.from_command_line(arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_the_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("beamz: 2\n")
    with pytest.raises(SettingsError, match=r"unknown key 'beamz' in .*; did you mean beams?"):
        Example.from_command_line(["--config", str(tmp_path / "job.yaml")])


def test_a_misspelt_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMECAP_INPUT_URL", "x")
    with pytest.raises(SettingsError, match="did you mean FRAMECAP_INPUT_URI"):
        Example.from_command_line([])


def test_help_explains_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        CaptionSettings.from_command_line(["--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in CaptionSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description
    assert "stop when a larger share of the rows fails (default: 0.2)" in shown


class Asking(JobSettings):
    """A repeatable text."""

    repeatable: ClassVar[frozenset[str]] = frozenset({"query"})
    query: Texts = Field((), description="what to look for")


def test_a_repeated_flag_keeps_commas_in_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("красный автобус, слева дерево", "кошка")
    assert Asking.from_command_line(["--query", texts[0], f"--query={texts[1]}"]).query == texts
    (tmp_path / "job.yaml").write_text(f"query: ['{texts[0]}', '{texts[1]}']", encoding="utf-8")
    assert Asking.from_command_line(["--config", str(tmp_path / "job.yaml")]).query == texts
    monkeypatch.setenv("FRAMECAP_QUERY", texts[0])
    assert Asking.from_command_line([]).query == texts[:1]
    with pytest.raises(SettingsError, match="--query needs a value"):
        Asking.from_command_line(["--query"])
