"""Files by URI: whole or not at all, and checked after every copy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from framecap.errors import ChecksumError, MissingFileError, SettingsError, StorageError
from framecap.storage import (
    OPTIONS_VARIABLE,
    atomic_path,
    check_endpoint,
    is_local,
    join,
    local_copy,
    name_scheme,
    open_fs,
    options_for,
    read_bytes,
    storage_options,
    write_bytes_atomic,
)


def test_a_write_that_fails_leaves_neither_file_nor_temporary(tmp_path: Path) -> None:
    fs, path = open_fs(str(tmp_path / "shard.parquet"))

    def write_half() -> None:
        with atomic_path(fs, path) as target:
            Path(target).write_bytes(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a" / "b.json"), "memory://framecap-test/b.json"):
        write_bytes_atomic(uri, b"{}")
        assert read_bytes(uri) == b"{}"


def test_a_missing_file_names_its_uri() -> None:
    with pytest.raises(MissingFileError, match="memory://nothing/here"):
        read_bytes("memory://nothing/here")


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be written"):
        write_bytes_atomic(str(tmp_path / "file" / "below.json"), b"{}")


def test_an_unknown_scheme_says_what_is_known() -> None:
    with pytest.raises(StorageError, match="s3://"):
        open_fs("carrier-pigeon://coop/1")


@pytest.mark.parametrize("text", ["{secret: true}", '["secret"]'])
def test_storage_options_that_are_no_json_object_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPTIONS_VARIABLE, text)
    with pytest.raises(SettingsError, match=OPTIONS_VARIABLE) as caught:
        storage_options()
    assert "secret" not in str(caught.value)


class HiccupError(Exception):
    """What botocore raises is no OSError either."""


def test_errors_of_a_backends_own_kind_are_errors_of_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    def hiccup(self: object, *_: object, **__: object) -> None:
        raise HiccupError("slow down")

    write_bytes_atomic("memory://store/a.bin", b"abc")
    fs, path = open_fs("memory://store/a.bin")
    with fs.open(path) as file:
        assert file.read(2) == b"ab"
        monkeypatch.setattr(type(file._guarded), "read", hiccup)
        with pytest.raises(OSError, match="HiccupError: slow down"):
            file.read()
    monkeypatch.setattr(MemoryFileSystem, "cat_file", hiccup)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", hiccup)
    with pytest.raises(StorageError, match="HiccupError: slow down"):
        read_bytes("memory://store/a.bin")
    with pytest.raises(StorageError, match=r"a.bin cannot be written: HiccupError: slow down"):
        write_bytes_atomic("memory://store/a.bin", b"abc")


FLAT, BY_SCHEME = {"key": "a", "client_kwargs": {"x": 1}}, {"s3": {"key": "a"}, "gs": {"project": "p"}}


@pytest.mark.parametrize(
    ("options", "uri", "expected"),
    [
        (BY_SCHEME, "s3://b/x", {"key": "a"}),
        (BY_SCHEME, "s3a://b/x", {"key": "a"}),
        (BY_SCHEME, "gcs://b/x", {"project": "p"}),
        (BY_SCHEME, "https://host/x.jpg", {}),
        (BY_SCHEME, "/local/x", {}),
        (FLAT, "s3://b/x", FLAT),
        (FLAT, "https://host/x.jpg", {}),
        (FLAT, "file:///x", {}),
    ],
)
def test_options_reach_the_scheme_that_they_are_for(
    options: dict[str, object], uri: str, expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OPTIONS_VARIABLE, json.dumps(options))
    assert options_for(uri) == expected


def test_flat_options_belong_to_the_one_store_of_a_run() -> None:
    assert name_scheme(FLAT, ["s3://in", "/out", "https://host/captioner"]) == {"s3": FLAT}
    assert name_scheme(FLAT, ["sftp://host/in", "/out"]) == {"sftp": FLAT}
    assert name_scheme(FLAT, ["/in", "/out"]) == FLAT
    assert name_scheme(BY_SCHEME, ["s3://in", "gs://out"]) == BY_SCHEME


def test_flat_options_of_a_run_on_two_stores_are_refused() -> None:
    with pytest.raises(SettingsError, match=r'write them as \{"gs": \{…\}, "s3": \{…\}\}'):
        name_scheme(FLAT, ["s3://in", "gs://out"])


def test_options_by_scheme_and_flat_ones_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPTIONS_VARIABLE, json.dumps({"s3": {"key": "a"}, "anon": True}))
    with pytest.raises(SettingsError, match="'anon' stands beside 's3'"):
        options_for("s3://b/x")


def test_an_endpoint_that_nobody_answers_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"the endpoint http://127\.0\.0\.1:9 cannot be reached"):
        check_endpoint("s3://b/x")
    for elsewhere in ("gs://b/x", "/local/x"):
        check_endpoint(elsewhere)


@pytest.mark.parametrize(("uri", "package"), [("gs://b/x", "gcsfs"), ("abfs://c/x", "adlfs")])
def test_a_store_whose_package_is_missing_says_what_to_install(
    uri: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    with pytest.raises(StorageError, match=f"pip install {package}"):
        open_fs(uri)


def test_a_damaged_remote_copy_is_refused_and_not_kept(
    tiny_captioner_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = open_fs("memory://damaged")
    fs.put(str(tiny_captioner_dir), "/damaged/captioner", recursive=True)
    fs.pipe_file("/damaged/captioner/bridge.safetensors", b"short")
    monkeypatch.setenv("FRAMECAP_CACHE", str(tmp_path))
    with pytest.raises(ChecksumError, match=r"bridge\.safetensors"):
        local_copy("memory://damaged/captioner")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_uris_join_with_forward_slashes_and_know_whether_they_are_local() -> None:
    assert join("s3://bucket/out/", "day", "a.parquet") == "s3://bucket/out/day/a.parquet"
    assert [is_local(u) for u in ("/a", "file:///a", "s3://a/b")] == [True, True, False]
