"""Listing and naming of shards: what is one, what is left out and said so, what costs only itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shards import caption, read_output, shard_table, without_ray

from framecap.errors import SettingsError, ShardError, StorageError
from framecap.pipeline.run import main
from framecap.shards import fit_output, list_input, list_outputs, mark_of, open_shard
from framecap.storage import absolute_uri, is_local, join, open_fs, read_bytes
from framecap.verify import verify

__all__ = ["without_ray"]  # a fixture
here = pytest.mark.usefixtures("without_ray")
CP1251 = os.fsdecode("кадры".encode("cp1251"))


def put(path: Path, rows: int = 2, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # by its handle: pyarrow itself takes no name that is not UTF-8
        pq.write_table(shard_table("put", rows, seed), file)
    return path


@pytest.mark.parametrize("name", ["UP.PARQUET", "x.parq", "x.pq", "x.parquet.gzip", "_year=2024/p.parquet"])
def test_what_may_be_parquet_but_is_no_shard_by_its_name_is_named(tmp_path: Path, name: str) -> None:
    put(tmp_path / "ok.parquet")
    put(tmp_path / name)
    put(tmp_path / "_delta_log" / "1.checkpoint.parquet")
    (tmp_path / "notes.txt").write_text("no shard")
    listing = list_input(str(tmp_path))
    assert (list(listing.marks), listing.left_out, listing.failed) == (["ok.parquet"], (name,), {})


def test_only_files_that_are_left_out_are_named_in_the_error(tmp_path: Path) -> None:
    put(tmp_path / "x.parq")
    with pytest.raises(SettingsError, match=r"holds no \.parquet file; it holds 1 file that is no shard .*: x\.parq"):
        list_input(str(tmp_path))


@here
def test_what_is_left_out_is_in_log_summary_and_verify(
    tmp_path: Path, tiny_captioner_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ok.parquet", "x.parq", "_old/y.parquet"):
        put(tmp_path / "in" / name)
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    assert summary.exit_code == 0
    assert summary.left_out == ["_old/y.parquet", "x.parq"]
    assert "2 files that are no shards by their names" in summary.closing()
    caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, dry_run=True)
    assert "left out: 2 files that are no shards by their names: _old/y.parquet, x.parq" in capsys.readouterr().out


@here
@pytest.mark.parametrize("name", ["x.parq", "frames", "_x.parquet", "UP.PARQUET"])
def test_a_file_given_by_name_is_found_again(name: str, tmp_path: Path, tiny_captioner_dir: Path) -> None:
    source = put(tmp_path / "in" / name)
    runs = [caption(source, tmp_path / "out", tiny_captioner_dir) for _ in range(2)]
    assert [run.captioned_rows for run in runs] == [2, 0]
    assert runs[1].shards_done_before == 1
    assert verify(str(source), str(tmp_path / "out")).ok


def test_a_glob_with_an_ending_of_its_own_takes_what_it_names(tmp_path: Path) -> None:
    for name in ("a.parq", "b.parq", "c.parquet", "deep/d.parq"):
        put(tmp_path / name)
    assert list(list_input(f"{tmp_path}/*.parq").marks) == ["a.parq", "b.parq"]
    assert list(list_input(f"{tmp_path}/*").marks) == ["c.parquet"]
    assert list_input(f"{tmp_path}/*").left_out == ("a.parq", "b.parq")
    assert list(list_input(f"{tmp_path}/**/*.parq").marks) == ["a.parq", "b.parq", "deep/d.parq"]
    assert list(list_input(f"{tmp_path}/d*/?.parq").marks) == ["deep/d.parq"]


def test_brackets_stars_and_question_marks_in_names_that_exist_are_no_globs(tmp_path: Path) -> None:
    put(tmp_path / "b[1]" / "x.parquet")
    put(tmp_path / "b1" / "other.parquet")
    assert list(list_input(str(tmp_path / "b[1]")).marks) == ["x.parquet"]
    assert list(list_input(str(tmp_path / "b[1]" / "x.parquet")).marks) == ["x.parquet"]
    assert list(list_outputs(str(tmp_path / "b[1]"))) == ["x.parquet"]
    assert list(list_input(str(tmp_path / "b[1]" / "*.parquet")).marks) == ["x.parquet"]
    assert list(list_input(str(tmp_path / "b[0-9]" / "*.parquet")).marks) == ["b1/other.parquet"]


def test_two_colons_are_part_of_a_local_name(tmp_path: Path) -> None:
    names = ["::chain::x.parquet", "fe80::1/x.parquet", "s3::x.parquet"]
    for name in names:
        put(tmp_path / name)
    listing = list_input(str(tmp_path))
    assert list(listing.marks) == names
    for name in names:
        assert mark_of(join(listing.root, name)) == listing.marks[name]
        with open_shard(listing.root, name) as shard:
            assert shard.metadata.num_rows == 2


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("a/b", True), ("/a::b/c", True), ("a/http://b", True), ("file:///a", True), ("C::x", True),
        ("s3://b/k", False), ("s3://b/fe80::1", False), ("zip://a::s3://b/c", False), ("simplecache::s3://b", False),
    ],
)  # fmt: skip
def test_a_path_is_told_from_a_uri_by_its_beginning(uri: str, local: bool) -> None:
    assert is_local(uri) == local


def test_file_uris_are_decoded_unless_a_file_has_that_very_name(tmp_path: Path) -> None:
    (tmp_path / "demo output").write_bytes(b"decoded")
    (tmp_path / "50%25").write_bytes(b"as it stands")
    assert read_bytes(f"file://{tmp_path}/demo%20output") == b"decoded"
    assert read_bytes(f"file://localhost{tmp_path}/demo%20output") == b"decoded"
    assert read_bytes(f"file://{tmp_path}/50%25") == b"as it stands"
    assert read_bytes(str(tmp_path / "50%25")) == b"as it stands"
    assert read_bytes((tmp_path / "demo output").as_uri()) == b"decoded"


def test_a_local_path_is_made_absolute_and_a_uri_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("frames/*.parquet") == f"{tmp_path}/frames/*.parquet"
    assert absolute_uri("s3://archive/frames") == "s3://archive/frames"


@here
def test_a_name_that_is_not_utf8_costs_that_shard(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    put(tmp_path / "in" / "ok.parquet")
    put(tmp_path / "in" / CP1251 / "1.parquet")
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    assert summary.exit_code == 3
    name = "\\xea\\xe0\\xe4\\xf0\\xfb/1.parquet"
    assert summary.failed_shards == {name: "bad_name: its name is not UTF-8; rename it"}
    assert list(read_output(tmp_path / "out")) == ["ok.parquet"]
    assert [fault.kind for fault in verify(str(tmp_path / "in"), str(tmp_path / "out")).faults] == ["unreadable"]


def test_a_place_that_is_not_utf8_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in" / "ok.parquet")
    assert main(["--input-uri", str(tmp_path / "in"), "--output-uri", str(tmp_path / CP1251)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err
    assert main(["--input-uri", str(tmp_path / CP1251), "--output-uri", str(tmp_path / "out")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@here
@pytest.mark.parametrize("name", ["Й" * 123 + "1.parquet", "100% a%20b #1?.parquet"])
def test_long_and_odd_names_work(name: str, tmp_path: Path, tiny_captioner_dir: Path) -> None:
    assert len(name.encode()) in (255, 22)
    put(tmp_path / "in" / name)
    assert caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir).exit_code == 0
    assert caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir).shards_done_before == 1


def test_a_link_to_a_folder_above_ends_nowhere_and_is_named(tmp_path: Path) -> None:
    put(tmp_path / "s" / "d" / "x.parquet")
    put(tmp_path / "elsewhere" / "y.parquet")
    (tmp_path / "s" / "loop").symlink_to(".")
    (tmp_path / "s" / "d" / "up").symlink_to("../..")
    (tmp_path / "s" / "linked").symlink_to(tmp_path / "elsewhere")
    listing = list_input(str(tmp_path / "s"))
    assert {"d/x.parquet", "linked/y.parquet"} <= set(listing.marks)
    assert all("/up/" not in name or "elsewhere" in name for name in listing.marks)
    assert "loop (a link to a folder above it)" in listing.left_out


@here
def test_a_link_to_itself_costs_that_shard(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    put(tmp_path / "in" / "ok.parquet")
    (tmp_path / "in" / "self.parquet").symlink_to("self.parquet")
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    assert (summary.exit_code, list(summary.failed_shards)) == (3, ["self.parquet"])


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A folder that any user may enter."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_listed_costs_what_is_below_it(for_all: Path) -> None:
    put(for_all / "ok.parquet")
    put(for_all / "closed" / "x.parquet")
    (for_all / "closed").chmod(0)
    with as_nobody():
        listing = list_input(str(for_all))
        with pytest.raises(StorageError, match="cannot be listed"):
            list_outputs(str(for_all))
    (for_all / "closed").chmod(0o755)
    assert list(listing.marks) == ["ok.parquet"]
    assert str(listing.failed["closed/"]) == "unreadable: the folder cannot be listed: Permission denied"
    assert not listing.misses("closed/x.parquet"), "its captions must not be pruned"
    assert listing.misses("gone.parquet")


def test_keys_of_an_object_store_are_listed_as_they_are(bucket: str) -> None:
    names = ["//x.parquet", "/a//y.parquet", "/b[1]/q.parquet", "/fe80::1/w.parquet", "/u?.parquet", "/z.parquet"]
    root = f"{bucket}/keys"
    for name in names:
        fs, _ = open_fs(bucket)
        fs.pipe_file(f"{root.removeprefix('s3://')}{name}", b"content")
    listing = list_input(root)
    assert list(listing.marks) == [name[1:] for name in names]
    for name, mark in listing.marks.items():
        assert (read_bytes(join(root, name)), mark_of(join(root, name))) == (b"content", mark)
    assert fit_output(listing, f"{bucket}/out") is listing
    fitted = fit_output(listing, "/tmp/out")
    assert sorted(fitted.failed) == ["/x.parquet", "a//y.parquet"], "a folder would hold two of them under one name"
    assert isinstance(fitted.failed["/x.parquet"], ShardError)
    assert len(fitted.marks) == 4


@here
def test_relative_places_are_those_of_the_driver(
    tmp_path: Path, tiny_captioner_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "frames" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    summary = caption("frames", "captions", tiny_captioner_dir)
    assert summary.exit_code == 0
    assert (summary.settings["input_uri"], summary.settings["output_uri"]) == (
        str(tmp_path / "frames"), str(tmp_path / "captions"),
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["--output-uri", "--state-uri"])
def test_under_ray_job_submit_a_relative_output_is_refused(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    flags = {"--input-uri": "in", "--output-uri": str(tmp_path / "out"), flag: "relative"}
    assert main([part for pair in flags.items() for part in pair]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{flag} relative" in line
    assert "ray job submit" in line
    assert not list(tmp_path.rglob("_framecap"))
