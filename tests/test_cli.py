"""The `framecap` command as a person types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import framecap
from framecap.cli import main
from framecap.demo import bundled_captioner
from framecap.pipeline.settings import CaptionSettings


@pytest.fixture(autouse=True)
def _tiny_captioner(tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAMECAP_CAPTIONER", str(tiny_captioner_dir))


@pytest.fixture(scope="module")
def photo(data: Path) -> str:
    return str(data / "ruclip-vit-b32-tiny" / "images" / "00_RGB_640x360.jpg")


def test_describe_prints_one_caption(photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", photo]) == 0
    out = capsys.readouterr().out
    assert out.strip()
    assert photo not in out


def test_describe_as_json_gives_every_figure(photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", photo, photo, "--json", "--num-beams", "2", "--max-new-tokens", "6"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [photo, photo]
    assert {"text", "logprob", "min_logprob", "tokens", "similarity", "status", "error"} <= rows[0].keys()
    assert rows[0]["tokens"] <= 6


def test_describe_names_the_bad_image_and_goes_on(
    photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    assert main(["describe", str(bad), photo]) == 3
    captured = capsys.readouterr()
    assert f"{bad}: not_an_image" in captured.err
    assert photo in captured.out


@pytest.mark.parametrize(
    "start", [b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3", b"RIFF\0\0\0\0AVI "], ids=["mp4", "mkv", "avi"]
)
def test_describe_says_that_a_video_is_one_and_what_to_do(
    start: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip").write_bytes(start + bytes(200 << 20 if start[:1] == b"R" else 500))
    assert main(["describe", str(tmp_path / "clip")]) == 3
    assert "this is a video; `framecap pack VIDEO" in capsys.readouterr().err


def test_describe_says_once_that_the_bundled_captioner_knows_only_its_drawn_world(
    photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", photo, photo, "--captioner", str(bundled_captioner())]) == 0
    assert capsys.readouterr().err.count("knows only the drawn world") == 1
    assert main(["describe", photo]) == 0
    assert capsys.readouterr().err == "", "a captioner without a domain"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["describe", "x.jpg", "--captioner", "/nowhere"], "/nowhere"),
        (["describe", "x.jpg", "--num-beams", "0"], "num_beams"),
        (["describe", "s3://bucket/x.jpg"], "s3://bucket/x.jpg is not a local file"),
        (["describe", "x.jpg", "--device", "tpu"], "tpu"),
        (["assemble", "--encoder", "/e", "--decoder", "/d", "--bridge", "/b.pt", "--out", "/tmp/framecap-none"], "/e"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_an_unknown_flag_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["describe", "x.jpg", "--num-beam5"])
    assert caught.value.code == 2
    assert "--num-beam5" in capsys.readouterr().err


def test_check_says_what_a_captioner_is(tiny_captioner_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_captioner_dir)]) == 0
    out = capsys.readouterr().out
    assert f"{tiny_captioner_dir}: whole" in out
    assert "mlp" in out
    assert "2 layers of" in out


def test_check_names_the_damaged_file(
    tiny_captioner_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_captioner_dir, tmp_path / "copy")
    with (copy / "bridge.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert main(["check", str(copy)]) == 2
    assert "bridge.safetensors has sha256" in capsys.readouterr().err


def test_interrupting_is_one_line(
    photo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("framecap.model.captioner.Captioner.from_pretrained", interrupted)
    assert main(["describe", photo]) == 130
    assert capsys.readouterr().err == "framecap: interrupted\n"


def test_assemble_makes_a_captioner_that_describes(
    tiny_captioner_dir: Path, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "captioner")
    parts = {"encoder": "encoder", "decoder": "decoder", "bridge": "bridge.safetensors"}
    flags = [text for flag, name in parts.items() for text in (f"--{flag}", str(tiny_captioner_dir / name))]
    assert main(["assemble", *flags, "--out", out]) == 0
    assert main(["describe", photo, "--captioner", out]) == 0
    assert out in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(flag: str) -> None:
    code = (
        f"import sys; from framecap import cli; sys.argv[1:] = ['{flag}']\n"
        "try: cli.main()\n"
        "except SystemExit as left: assert left.code == 0\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'pandas', 'pydantic', 'transformers', 'PIL'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
    assert framecap.__version__ in done.stdout or flag == "--help"


def test_run_is_the_caption_job_with_its_settings_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["run", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: framecap run --input-uri INPUT --output-uri OUTPUT")
    places = [shown.index(f"\n{heading}:\n") for heading in CaptionSettings.headings.values()]
    assert places == sorted(places)
    decoding = shown[shown.index("\ndecoding:\n") : shown.index("\ndevices, actors and readers:\n")]
    assert "--num-beams N" in decoding
    assert "--device" not in decoding


def test_a_mistake_in_run_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--input-uri", "x"]) == 2
    assert capsys.readouterr().err == "error: --output-uri is required\n"
