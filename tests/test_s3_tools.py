"""pack, verify, report and read_captions on an S3 endpoint, as on a folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from caption_data import FINGERPRINT, Dataset, picture, write_dataset

from framecap import read_captions, schema
from framecap.cli import main
from framecap.shards import mark_of
from framecap.storage import open_fs, read_bytes

SHARD = "day-1/frames-00001.parquet"


def upload(data: Dataset, uri: str) -> tuple[str, str]:
    """The dataset at ``uri``/frames and ``uri``/captions, signed with what S3 says of its frame shards."""
    fs, root = open_fs(uri)
    fs.put(f"{data.frames}/", f"{root}/frames/", recursive=True)
    for path in data.captions.rglob("day-*/*.parquet"):
        name = path.relative_to(data.captions).as_posix()
        table = pq.read_table(path)
        metadata = schema.output_metadata(name, mark_of(f"{uri}/frames/{name}"), FINGERPRINT, errors(table))
        pq.write_table(table.replace_schema_metadata(metadata), path)
    fs.put(f"{data.captions}/", f"{root}/captions/", recursive=True)
    return f"{uri}/frames", f"{uri}/captions"


def errors(table: pa.Table) -> int:
    return int(pc.sum(pc.equal(table["caption_status"], "error")).as_py())


@pytest.fixture(scope="module")
def places(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return upload(write_dataset(tmp_path_factory.mktemp("s3")), f"{bucket}/whole")


def test_a_whole_output_on_s3_passes_and_a_planted_fault_is_found(
    bucket: str, tmp_path: Path, places: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *places]) == 0
    frames, captions = upload(write_dataset(tmp_path), f"{bucket}/faulty")
    fs, path = open_fs(captions)
    fs.rm_file(f"{path}/{SHARD}")
    fs.pipe_file(f"{path}/_framecap/fragments/a/0-20.parquet", b"half")
    assert main(["verify", frames, captions]) == 1
    out = capsys.readouterr().out
    assert f"missing_shard  {SHARD}" in out
    assert "1 × unfinished" in out


def test_a_place_that_is_not_on_s3_is_one_line(
    bucket: str, places: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["verify", places[0], f"{bucket}/none"], ["report", f"{bucket}/none"]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert f"{bucket}/none" in error
        assert error.count("\n") == 1


def test_report_reads_from_s3_and_writes_to_it(bucket: str, places: tuple[str, str]) -> None:
    frames, captions = places
    out = f"{bucket}/report.html"
    assert main(["report", captions, "--frames", frames, "--against", captions, "--out", out]) == 0
    page = read_bytes(out)
    assert page.count(b"data:image/webp") > 50
    assert b"20260101-000000-abcd" in page


def test_read_captions_takes_columns_and_a_filter_on_s3(places: tuple[str, str]) -> None:
    table = read_captions(places[1], columns=["frame_id"], filter=pc.field("caption_status") == "truncated")
    assert table.column_names == ["frame_id"]
    assert 0 < table.num_rows < 10
    assert read_captions(places[1]).num_rows == 60


def test_pack_reads_from_s3_and_writes_to_it(bucket: str, tmp_path: Path, places: tuple[str, str]) -> None:
    fs, root = open_fs(bucket)
    images = read_captions(places[0], columns=["image"])["image"].to_pylist()[:3]
    for name, image in zip(("б/кот.jpg", "a.jpg", "broken.jpg"), [*images[:2], b"no picture"], strict=True):
        fs.pipe_file(f"{root}/pictures/{name}", image)
    out = f"{bucket}/packed"
    assert main(["pack", f"{bucket}/pictures", "--out", out]) == 3
    table = read_captions(out)
    assert table["frame_id"].to_pylist() == ["a.jpg", "б/кот.jpg"]
    assert table["image"].to_pylist() == [images[1], images[0]]
    assert main(["pack", f"{bucket}/pictures", "--out", out]) == 2
    assert main(["pack", f"{bucket}/pictures", "--out", out, "--overwrite"]) == 3
    assert read_captions(out).equals(table)


@pytest.mark.parametrize(
    "mistake",
    [
        ("{}", "credentials", 2),
        ('{"endpoint_url": "http://127.0.0.1:9"}', "endpoint http://127.0.0.1:9 cannot be reached", 75),
    ],
)
def test_a_bucket_that_cannot_be_reached_is_one_line_of_every_command(
    mistake: tuple[str, str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    options, said, code = mistake
    monkeypatch.setenv("FRAMECAP_STORAGE_OPTIONS", options)
    local = write_dataset(tmp_path, 3)
    (tmp_path / "frame.jpg").write_bytes(picture(0, (40, 30)))
    for argv in (
        ["pack", "s3://b/in", "--out", str(tmp_path / "out")],
        ["pack", str(tmp_path), "--out", "s3://b/out"],
        ["verify", "s3://b/in", str(local.captions)],
        ["verify", str(local.frames), "s3://b/out"],
        ["report", "s3://b/out"],
        ["check", "s3://b/captioner"],
    ):
        assert main(argv) == code
        error = capsys.readouterr().err
        assert said in error.replace(str(tmp_path), "")
        assert error.count("\n") == 1
