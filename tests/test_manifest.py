"""A captioner is what its manifest says: nothing unlisted is loaded, nothing listed is missing, no path leads out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_captioner
from fsspec.implementations.memory import MemoryFileSystem
from shards import write_shards

from framecap.cli import main
from framecap.errors import CaptionerChangedError, ChecksumError, WeightsError
from framecap.manifest import MANIFEST, manifest_files, write_manifest
from framecap.model.captioner import Captioner
from framecap.model.convert import CHECKPOINT_FILES, assemble
from framecap.model.weights import find_weights
from framecap.pipeline import caption, run
from framecap.pipeline.job import Resources
from framecap.pipeline.settings import CaptionSettings
from framecap.ray_cluster import RayStart
from framecap.storage import local_copy, verified_copy


@pytest.fixture
def folder(tiny_captioner_dir: Path, tmp_path: Path) -> Path:
    """A captioner to break."""
    return shutil.copytree(tiny_captioner_dir, tmp_path / "captioner")


def edit(folder: Path, **files: Any) -> bytes:
    """The manifest with ``files`` replaced by name; None takes one out."""
    listed = json.loads((folder / MANIFEST).read_text())["files"] | files
    data = json.dumps({"files": {name: entry for name, entry in listed.items() if entry is not None}}).encode()
    (folder / MANIFEST).write_bytes(data)
    return data


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../x", "a/../b", "./config.json", "a//b", "a/..\\..\\x", "", "x\0y", "encoder/"]
)
def test_a_manifest_cannot_reach_outside_its_folder(name: str, folder: Path) -> None:
    data = edit(folder, **{name: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(ChecksumError, match="lies outside its folder"):
        manifest_files(data, "manifest.json")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"files": 3}', b'{"files": {"a": {"size": 1e999, "sha256": ""}}}', b"\xff"]
)
def test_a_damaged_manifest_is_an_error_of_the_captioner(data: bytes) -> None:
    with pytest.raises(ChecksumError, match="is not a captioner manifest"):
        manifest_files(data, "manifest.json")


@pytest.mark.parametrize("name", ["config.json", "bridge.safetensors", "encoder/config.json", "decoder/config.json"])
def test_a_manifest_without_a_needed_file_is_refused(name: str, folder: Path) -> None:
    edit(folder, **{name: None})
    with pytest.raises(ChecksumError, match=f"does not list {name}"):
        local_copy(folder)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_manifest_without_weights_is_refused(part: str, folder: Path) -> None:
    [weights] = find_weights(folder / part)
    edit(folder, **{f"{part}/{weights.name}": None})
    with pytest.raises(ChecksumError, match=f"lists no weights in {part}/"):
        local_copy(folder)


UNLISTED = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", *sorted(CHECKPOINT_FILES)]


@pytest.mark.parametrize("name", UNLISTED)
def test_a_file_that_would_be_loaded_must_be_listed(name: str, folder: Path) -> None:
    path = folder / "decoder" / name
    path.unlink(missing_ok=True)
    write_manifest(folder)
    path.write_bytes(b"{}")
    with pytest.raises(ChecksumError, match=r"is not listed in manifest.json|does not list|no weights"):
        local_copy(folder)


def test_files_that_nobody_loads_may_lie_beside_a_captioner(folder: Path) -> None:
    (folder / "README.md").write_text("Ours.")
    (folder / "encoder" / ".gitattributes").write_text("")
    assert local_copy(folder) == folder


def test_weights_behind_a_link_to_a_folder_are_listed_and_checked(folder: Path) -> None:
    (folder / "decoder").rename(folder.parent / "decoder")
    (folder / "decoder").symlink_to(folder.parent / "decoder")
    write_manifest(folder)
    assert local_copy(folder) == folder
    (folder / "decoder" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ChecksumError, match=r"decoder/pytorch_model.bin is not listed"):
        local_copy(folder)


@pytest.mark.parametrize(
    "shard", ["../../secret.safetensors", "/etc/passwd", "/dev/zero", 5, None, [], "weights.dat", ""]
)
def test_an_index_names_only_weight_files_beside_it(shard: object, folder: Path, tmp_path: Path) -> None:
    (folder / "decoder" / "model.safetensors").unlink()
    (folder / "decoder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    write_manifest(folder)
    with pytest.raises(WeightsError, match=r"index.json names .* as a shard"):
        Captioner.from_pretrained(folder, "cpu")
    with pytest.raises(WeightsError, match=r"index.json names .* as a shard"):
        assemble(folder / "encoder", folder / "decoder", folder / "bridge.safetensors", tmp_path / "out")


def test_check_says_what_is_wrong_with_a_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(folder / "decoder" / "model.safetensors", folder / "encoder" / "model.safetensors")
    assert main(["check", str(folder)]) == 2
    assert "encoder/model.safetensors is not listed in manifest.json" in capsys.readouterr().err
    (folder / MANIFEST).write_text('{"files": {}}')
    assert main(["check", str(folder)]) == 2
    assert "does not list config.json" in capsys.readouterr().err


def test_a_cached_copy_is_compared_with_its_checksums_at_every_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAMECAP_CACHE", str(tmp_path / "cache"))
    MemoryFileSystem().put(f"{folder}/", "/checked/captioner/", recursive=True)
    copy = local_copy("memory://checked/captioner")
    weights = copy / "decoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ChecksumError, match=rf"memory://checked/captioner .* was changed .* delete {copy}"):
        Captioner.from_pretrained("memory://checked/captioner", "cpu")
    shutil.copyfile(folder / "decoder" / "model.safetensors", weights)
    edit(copy)
    with pytest.raises(ChecksumError, match="is not the one at memory://checked/captioner"):
        local_copy("memory://checked/captioner")


def test_what_a_killed_download_left_is_deleted_by_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FRAMECAP_CACHE", str(cache))
    MemoryFileSystem().put(f"{folder}/", "/again/captioner/", recursive=True)
    copy = local_copy("memory://again/captioner")
    shutil.rmtree(copy)
    for left in (cache / f"copy-{copy.name}-killed", cache / "copy-another-running"):
        left.mkdir()
    assert local_copy("memory://again/captioner") == copy
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == sorted([copy.name, "copy-another-running"])


def test_a_captioner_other_than_expected_is_not_loaded(folder: Path) -> None:
    loaded = Captioner.from_pretrained(folder, "cpu")
    assert Captioner.from_pretrained(folder, "cpu", expected=loaded.fingerprint).manifest == loaded.manifest
    (folder / "README.json").write_text("{}")
    write_manifest(folder)
    with pytest.raises(CaptionerChangedError, match=f"the captioner at {folder} was replaced"):
        Captioner.from_pretrained(folder, "cpu", expected=loaded.fingerprint)


def test_a_captioner_that_is_replaced_while_it_loads_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(uri: object) -> object:
        copy = verified_copy(folder)
        (folder / "README.json").write_text("{}")
        write_manifest(folder)
        return copy

    monkeypatch.setattr("framecap.model.captioner.verified_copy", replaced)
    with pytest.raises(CaptionerChangedError):
        Captioner.from_pretrained(folder, "cpu")


def test_a_captioner_swapped_between_plan_and_actor_stops_the_run_and_nothing_is_published(
    ray_cluster: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_captioner(tmp_path / "other", "mlp", seed=3)
    write_shards(tmp_path / "in", 2, 6)
    start = caption.start_ray

    def swapped(settings: CaptionSettings, ray: RayStart, check: Callable[[], None]) -> Resources:
        folder.rename(tmp_path / "old")
        other.rename(folder)
        return start(settings, ray, check)

    monkeypatch.setattr(caption, "start_ray", swapped)
    flags = ["--input-uri", str(tmp_path / "in"), "--output-uri", str(tmp_path / "out"), "--captioner", str(folder)]
    assert run.main([*flags, "--max-actors", "1", "--max-new-tokens", "4"]) == 75
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: the captioner at {folder} was replaced")
    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert not list((tmp_path / "out").rglob("*.fragment"))
