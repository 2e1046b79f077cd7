"""Bad frames become rows with a kind, bad shards entries of the summary, and the good ones are all captioned."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shards import caption, jpeg, read_output, shard_table, skip_ray, without_ray

from framecap.errors import SettingsError
from framecap.pipeline.run import main
from framecap.pipeline.settings import CaptionSettings

__all__ = ["without_ray"]  # a fixture
FRAMES = 60
BAD_ROWS = {5: "not_an_image", 17: "missing", 23: "empty", 31: "too_large", 44: "truncated"}
BAD_SHARDS = {
    "cut.parquet": "unreadable",
    "no_image.parquet": "missing_column",
    "text.parquet": "unreadable",
    "types.parquet": "wrong_type",
    "conflict.parquet": "column_conflict",
}


def bomb() -> bytes:
    """A PNG of a few kilobytes that unpacks to 400 million pixels."""
    sink = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(sink, "PNG")
    return sink.getvalue()


def plant(source: Path) -> None:
    """Every kind of bad row and bad shard, among good ones."""
    (source / "deep" / "er").mkdir(parents=True)
    table = shard_table("planted", FRAMES)
    images = table.column("image").to_pylist()
    images[5], images[17], images[23], images[31] = b"no picture at all", None, b"", bomb()
    images[44] = images[44][: len(images[44]) // 2]
    planted = table.set_column(3, "image", pa.array(images, pa.binary()))
    pq.write_table(planted, source / "planted.parquet", row_group_size=7)

    (source / "frame.jpg").write_bytes(jpeg(1))
    uris = ["../../frame.jpg", str(source / "frame.jpg"), "nowhere.jpg", "bogus://a/b", None]
    pq.write_table(pa.table({"frame_id": [1, 2, 3, 4, 5], "image_uri": uris}), source / "deep/er/uris.parquet")
    structs = [{"bytes": jpeg(2), "path": "a.jpg"}, {"bytes": None, "path": "../frame.jpg"}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    hugging = pa.table({"frame_id": [1, 2, 3], "image": pa.array(structs, kind)})
    pq.write_table(hugging, source / "deep" / "hugging.parquet")

    whole = source / "cut.parquet"
    pq.write_table(shard_table("cut", 4), whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    (source / "text.parquet").write_text("frame_id,image\n1,2\n")
    pq.write_table(shard_table("empty", 0), source / "zero.parquet")
    pq.write_table(pa.table({"frame_id": [1]}), source / "no_image.parquet")
    pq.write_table(pa.table({"frame_id": [1.5], "image": [b"x"]}), source / "types.parquet")
    pq.write_table(pa.table({"frame_id": [1], "image": [b"x"], "caption": ["y"]}), source / "conflict.parquet")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, tiny_captioner_dir: Path) -> tuple[Path, dict[str, object]]:
    root = tmp_path_factory.mktemp("bad")
    plant(root / "in")
    with pytest.MonkeyPatch.context() as patch:
        skip_ray(patch)
        summary = caption(root / "in", root / "out", tiny_captioner_dir, fetch_retries=0)
    return root / "out", json.loads(summary.to_json())


def test_good_frames_are_captioned_and_bad_rows_carry_their_kind(
    planted: tuple[Path, dict[str, object]],
) -> None:
    rows = read_output(planted[0])["planted.parquet"]
    statuses = rows.column("caption_status").to_pylist()
    errors = rows.column("caption_error").to_pylist()
    assert {row: errors[row].split(":")[0] for row in BAD_ROWS} == BAD_ROWS
    assert [row for row in range(FRAMES) if statuses[row] == "error"] == sorted(BAD_ROWS)
    assert rows.column("caption").null_count == len(BAD_ROWS)


def test_pictures_are_fetched_by_uri_and_missing_ones_say_so(
    planted: tuple[Path, dict[str, object]],
) -> None:
    outputs = read_output(planted[0])
    by_uri = outputs["deep/er/uris.parquet"].column("caption_error").to_pylist()
    assert by_uri[:2] == [None, None]
    assert [error.split(":")[0] for error in by_uri[2:]] == ["missing", "not_allowed", "missing"]
    hugging = outputs["deep/hugging.parquet"].column("caption_error").to_pylist()
    assert [error is None for error in hugging] == [True, True, False]


def test_bad_shards_are_listed_and_the_exit_code_is_3(planted: tuple[Path, dict[str, object]]) -> None:
    _, summary = planted
    failed = summary["failed_shards"]
    assert isinstance(failed, dict)
    assert {name: text.split(":")[0] for name, text in failed.items()} == BAD_SHARDS
    assert summary["exit_code"] == 3
    assert summary["errors_by_kind"] == {
        "missing": 4, "not_allowed": 1, "not_an_image": 1, "empty": 1, "too_large": 1, "truncated": 1,
    }  # fmt: skip


def test_an_empty_shard_gives_an_empty_output(planted: tuple[Path, dict[str, object]]) -> None:
    assert len(read_output(planted[0])["zero.parquet"]) == 0


@pytest.mark.usefixtures("without_ray")
def test_only_failed_rows_are_taken_up_again_on_request(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    uris = [f"frame-{row}.jpg" for row in range(20)]
    for row in range(20):
        if row not in (3, 4, 11):
            (tmp_path / "in" / uris[row]).write_bytes(jpeg(row))
    table = pa.table({"frame_id": range(20), "image_uri": uris})
    pq.write_table(table, tmp_path / "in" / "uris.parquet")
    places = (tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    caption(*places)
    before = read_output(tmp_path / "out")["uris.parquet"]
    for row in (3, 11):
        (tmp_path / "in" / uris[row]).write_bytes(jpeg(row))
    assert caption(*places).rows_to_do == 0
    again = caption(*places, retry_errors=True)
    after = read_output(tmp_path / "out")["uris.parquet"]
    assert (again.captioned_rows, again.shards_by_reason) == (3, {"errors": 1})
    assert [row for row, s in enumerate(after.column("caption_status").to_pylist()) if s == "error"] == [4]
    kept = [row for row in range(20) if row not in (3, 4, 11)]
    assert after.take(kept).equals(before.take(kept))


@pytest.mark.usefixtures("without_ray")
def test_a_shard_with_a_doubled_column_is_listed(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    """Such a column has no one meaning; one that nobody reads or keeps does no harm."""
    (tmp_path / "in").mkdir()
    pictures = pa.array([jpeg(1), jpeg(2)])
    for name, column in (("kept", "k"), ("id", "frame_id")):
        columns = [pa.array(["a", "b"]), pictures, pa.array([1, 1]), pa.array([2, 2])]
        table = pa.table(columns, names=["frame_id" if column == "k" else "k", "image", column, column])
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    pq.write_table(shard_table("good", 2), tmp_path / "in" / "good.parquet")
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    assert (summary.exit_code, list(read_output(tmp_path / "out"))) == (3, ["good.parquet"])
    assert summary.failed_shards == {
        "kept.parquet": "column_conflict: it has 2 columns 'k'; rename or drop all but one",
        "id.parquet": "column_conflict: it has 2 columns 'frame_id'; rename or drop all but one",
    }
    few = caption(tmp_path / "in", tmp_path / "few", tiny_captioner_dir, keep_columns=("none",))
    assert list(few.failed_shards) == ["id.parquet"]


@pytest.mark.usefixtures("without_ray")
def test_retrying_errors_of_a_damaged_caption_shard_does_all_of_it_again(
    tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    (tmp_path / "in").mkdir()
    pictures = pa.array([jpeg(row) if row % 2 else b"" for row in range(40)])
    frames = shard_table("half", 40).set_column(3, "image", pictures)
    pq.write_table(frames, tmp_path / "in" / "half.parquet")
    places = (tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    caption(*places, max_error_rate=1)
    path = tmp_path / "out" / "half.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(frames.num_columns)  # caption_status
    assert column.path_in_schema == "caption_status"
    start = column.dictionary_page_offset or column.data_page_offset
    before, data = path.stat(), bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # not the ledger's but the disk's mistake
    again = caption(*places, max_error_rate=1, retry_errors=True)
    assert (again.captioned_rows, again.published_shards) == (40, 1)
    statuses = read_output(tmp_path / "out")["half.parquet"].column("caption_status").to_pylist()
    assert statuses == ["error", "truncated"] * 20


@pytest.mark.usefixtures("without_ray")
def test_a_run_that_fails_as_a_whole_stops(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"frame_id": range(2000), "image": [f"not {i}".encode() for i in range(2000)]})
    pq.write_table(table, tmp_path / "in" / "bad.parquet")
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, batch_size=50)
    assert summary.exit_code == 3
    assert "max-error-rate" in (summary.stopped or "")


UNREACHABLE = '{"endpoint_url": "http://127.0.0.1:9", "key": "a", "secret": "b"}'


def settings_mistakes(root: Path, captioner: Path) -> dict[str, list[str]]:
    """One command line per mistake; each must end with exit code 2 and write nothing."""
    good = ["--input-uri", f"{root}/in", "--output-uri", f"{root}/out", "--captioner", str(captioner)]
    damaged = root / "damaged"
    return {
        "unknown flag": [*good, "--num-beems", "3"],
        "wrong type": [*good, "--num-beams", "many"],
        "missing input": ["--input-uri", f"{root}/none", *good[2:]],
        "empty input": ["--input-uri", f"{root}/empty", *good[2:]],
        "output inside input": [*good[:3], f"{root}/in/out", *good[4:]],
        "output as input": ["--input-uri", f"{root}/captioned", *good[2:]],
        "output is input": [*good[:3], f"{root}/in", *good[4:]],
        "unwritable output": [*good[:3], f"{root}/file/out", *good[4:]],
        "options of which store?": [
            "--input-uri", "s3://b/in", "--output-uri", "gs://b/out", "--storage-options", UNREACHABLE,
        ],
        "damaged captioner": [*good[:5], str(damaged)],
        "missing captioner": [*good[:5], f"{root}/nothing"],
        "impossible options": [*good, "--num-return-sequences", "4"],
        "longer than the decoder": [*good, "--max-new-tokens", "5000"],
    }  # fmt: skip


MISTAKES = list(settings_mistakes(Path(), Path()))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_settings_mistake_ends_with_2_and_one_line_and_writes_nothing(
    mistake: str,
    tmp_path: Path,
    tiny_captioner_dir: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    monkeypatch.setenv("FRAMECAP_STORAGE_OPTIONS", "")  # the job sets it; put it back afterwards
    (tmp_path / "in").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    pq.write_table(shard_table("good", 2), tmp_path / "in" / "good.parquet")
    shutil.copytree(tmp_path / "in", tmp_path / "captioned")
    (tmp_path / "captioned" / "_framecap").mkdir()
    shutil.copytree(tiny_captioner_dir, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "bridge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = sorted(tmp_path.rglob("*"))
    assert main(settings_mistakes(tmp_path, tiny_captioner_dir)[mistake]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_endpoint_that_refuses_connections_may_be_back_later(
    tmp_path: Path, tiny_captioner_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAMECAP_STORAGE_OPTIONS", "")
    places = [
        "--input-uri",
        "s3://bucket/in",
        "--output-uri",
        f"{tmp_path}/out",
        "--captioner",
        str(tiny_captioner_dir),
    ]
    assert main([*places, "--storage-options", UNREACHABLE]) == 75
    assert "the endpoint http://127.0.0.1:9 cannot be reached" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_device_that_the_cluster_lacks_is_a_settings_mistake_too(
    tmp_path: Path, tiny_captioner_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(shard_table("good", 2), tmp_path / "in" / "good.parquet")
    places = ["--input-uri", f"{tmp_path}/in", "--output-uri", f"{tmp_path}/a/out"]
    assert main([*places, "--captioner", str(tiny_captioner_dir), "--device", "cuda", "--num-gpus", "0"]) == 2
    assert "--device cuda needs --num-gpus" in capfd.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("without_ray")
def test_rows_that_are_tried_again_do_not_hide_that_new_ones_fail(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    places = (tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    for name in ("old", "new"):
        table = pa.table({"frame_id": range(30), "image": [f"{name} {row}".encode() for row in range(30)]})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
        summary = caption(*places, retry_errors=True)
        assert summary.exit_code == 3, "all rows of a new shard failed"
    again = caption(*places, retry_errors=True)
    assert (again.captioned_rows, again.exit_code) == (60, 0)


@pytest.mark.usefixtures("without_ray")
def test_a_link_to_nothing_costs_only_its_shard(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(shard_table("good", 3), tmp_path / "in" / "good.parquet")
    (tmp_path / "in" / "link.parquet").symlink_to(tmp_path / "nowhere.parquet")
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    assert summary.exit_code == 3
    assert summary.failed_shards["link.parquet"].startswith("unreadable: ")
    assert list(read_output(tmp_path / "out")) == ["good.parquet"]


def test_an_unknown_flag_names_the_nearest_one() -> None:
    with pytest.raises(SettingsError, match="--num-beems; did you mean --num-beams"):
        CaptionSettings.from_command_line(["--num-beems", "3"])
