"""framecap pairs: every form that people have becomes the Parquet that training reads; what is left out is counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from framecap.cli import main
from framecap.errors import SettingsError
from framecap.pairs import PairOptions, PairsResult, captions_of, write_pairs

CAPTIONS = {
    "astronaut": ["Женщина в оранжевом скафандре улыбается.", "Портрет астронавта."],
    "chelsea": ["Рыжая кошка смотрит в сторону."],
    "coffee": ["Чашка кофе на столе.", "Кофе на деревянном столе."],
}


@pytest.fixture(scope="module")
def forms(data: Path) -> Path:
    return data / "pairs"


@pytest.fixture(scope="module")
def pictures(forms: Path) -> dict[str, bytes]:
    return {name: (forms / "images" / f"{name}.jpg").read_bytes() for name in CAPTIONS}


def converted(
    source: Path, out: Path, options: PairOptions | None = None
) -> tuple[PairsResult, dict[bytes, list[str]]]:
    """The result, and the captions by picture as training would read them."""
    result = write_pairs(str(source), str(out), options, progress=False)
    rows = pq.read_table(out).to_pylist() if result.shards else []
    return result, {row["image"]: row["caption"] for row in rows}


def test_coco_json_gathers_the_captions_of_each_image(forms: Path, pictures: dict[str, bytes], tmp_path: Path) -> None:
    options = PairOptions(images=str(forms / "images"))
    result, found = converted(forms / "captions_val.json", tmp_path / "out", options)
    assert found == {pictures[name]: texts for name, texts in CAPTIONS.items()}
    assert dict(result.left_out) == {"image file is missing": 1}


def test_parquet_of_hugging_face_datasets(forms: Path, pictures: dict[str, bytes], tmp_path: Path) -> None:
    result, found = converted(forms / "datasets_list.parquet", tmp_path / "out")
    assert found == {pictures[name]: texts for name, texts in CAPTIONS.items()}
    assert not result.left_out


def test_captions_that_are_structs_want_their_field(forms: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"structs of en, ru; say which with --caption-field"):
        converted(forms / "datasets_struct.parquet", tmp_path / "none")
    _, found = converted(forms / "datasets_struct.parquet", tmp_path / "out", PairOptions(caption_field="ru"))
    assert sorted(found.values()) == sorted([texts[0]] for texts in CAPTIONS.values())


def test_img2datasets_tars(forms: Path, tmp_path: Path) -> None:
    # Its folder also holds a Parquet file without pictures for each tar.
    result, found = converted(forms / "img2dataset-webdataset", tmp_path / "out")
    assert sorted(found.values()) == sorted([texts[0]] for texts in CAPTIONS.values())
    assert all(image.startswith(b"\xff\xd8") for image in found)
    assert not result.left_out


def test_img2datasets_parquet_leaves_out_what_could_not_be_fetched(forms: Path, tmp_path: Path) -> None:
    result, found = converted(forms / "img2dataset-parquet", tmp_path / "out")
    assert sorted(found.values()) == sorted([texts[0]] for texts in CAPTIONS.values())
    assert dict(result.left_out) == {"img2dataset: failed_to_download": 1}


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_with_a_path_column(forms: Path, pictures: dict[str, bytes], tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"pairs.{ending}"
    with source.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if ending == "tsv" else ",")
        writer.writerow(["file_name", "caption", "split"])
        for name, texts in CAPTIONS.items():
            writer.writerows([f"{name}.jpg", text, "validation" if name == "coffee" else "train"] for text in texts)
        writer.writerows([["../secret.jpg", "Снаружи.", "train"], ["astronaut.jpg", " ", "train"]])
    result, found = converted(source, tmp_path / "out", PairOptions(images=str(forms / "images")))
    assert found == {pictures[name]: texts for name, texts in CAPTIONS.items()}
    assert dict(result.left_out) == {"path outside the image folder": 1}
    splits = {row["caption"][0]: row["split"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert splits["Чашка кофе на столе."] == "validation"


def test_captions_are_strings_lists_or_structs_and_spaces_are_one() -> None:
    assert captions_of("  Кошка \n спит. ", None, "f") == ["Кошка спит."]
    assert captions_of(["а", None, " ", ["б"]], None, "f") == ["а", "б"]
    assert captions_of([{"ru": "а", "en": "b"}], "ru", "f") == ["а"]
    assert captions_of(float("nan"), None, "f") == []


def test_shards_are_cut_by_size(forms: Path, tmp_path: Path) -> None:
    result, found = converted(forms / "datasets_list.parquet", tmp_path / "out", PairOptions(shard_mb=0.001))
    assert len(result.shards) == result.pairs == len(found) == 3


def test_what_is_there_already_is_not_written_over(forms: Path, tmp_path: Path) -> None:
    converted(forms / "datasets_list.parquet", tmp_path / "out")
    with pytest.raises(SettingsError, match="already holds shards"):
        converted(forms / "datasets_list.parquet", tmp_path / "out")


def test_training_reads_what_the_command_writes(
    forms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from framecap.training.pairs import plan_units, read_unit
    from framecap.training.settings import TrainSettings

    out = tmp_path / "pairs"
    assert main(["pairs", str(forms / "datasets_list.parquet"), "--out", str(out), "--split", "train"]) == 0
    assert "3 pairs in 1 shard" in capsys.readouterr().out
    settings = TrainSettings(encoder="e", decoder="d", pairs=str(out), out="o")
    units, columns = plan_units(settings)
    assert [pair.captions for pair in read_unit(units[0], columns)] == list(CAPTIONS.values())


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("pairs.csv", "a,b\n1,2\n", "--image-column, one of a, b"),
        ("pairs.json", "[1]", "not COCO's captions JSON"),
        ("pairs.json", "{", "cannot be read"),
        ("pairs.xml", "", "known endings"),
        ("pairs.tar", "no tar", "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, hint: str
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["pairs", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert len(error.splitlines()) == 1


def test_pairs_that_were_left_out_are_counted_and_the_exit_code_says_so(
    forms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "out"), "--images", str(forms / "images")]
    assert main(["pairs", str(forms / "captions_val.json"), *flags]) == 3
    assert "left out: 1 (image file is missing)" in capsys.readouterr().err
    assert json.loads((forms / "captions_val.json").read_text())["images"][-1]["file_name"] == "gone.jpg"
