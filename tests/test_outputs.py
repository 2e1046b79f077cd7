"""An output is only ever framecap's own, and belongs to one input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from shards import caption, caption_in_process, read_output, shard_table, without_ray, write_shards

from framecap.errors import SettingsError
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.run import main
from framecap.pipeline.summary import Summary
from framecap.status import status_of

__all__ = ["without_ray"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_ray")
NAMES = ["day/s001.parquet", "s000.parquet", "s002.parquet"]


class Places:
    """Three frame shards (of which one is in ``day``), and an output for them."""

    def __init__(self, root: Path, captioner: Path) -> None:
        self.root, self.frames, self.out, self._captioner = root, root / "in", root / "out", captioner
        write_shards(self.frames, 3, 4)

    @property
    def record(self) -> Path:
        return self.out / "_framecap" / "input.json"

    def run(self, source: Path | str | None = None, **settings: Any) -> Summary:
        return caption(source or self.frames, self.out, self._captioner, **settings)

    def flags(self, *more: str) -> list[str]:
        places = ["--input-uri", str(self.frames), "--output-uri", str(self.out), "--captioner", str(self._captioner)]
        return [*places, "--max-new-tokens", "4", *more]


@pytest.fixture
def places(tmp_path: Path, tiny_captioner_dir: Path) -> Places:
    return Places(tmp_path, tiny_captioner_dir)


def other_frames(folder: Path, name: str = "s000.parquet") -> Path:
    """A folder with other frames under the name of a shard."""
    folder.mkdir(parents=True)
    pq.write_table(shard_table("other", 4, 77), folder / name)
    return folder


# What framecap did not write.


def test_a_file_of_somebody_else_in_the_place_of_a_caption_shard_stops_the_run(
    places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    other_frames(places.out)
    before = (places.out / "s000.parquet").read_bytes()
    for flags in (places.flags(), places.flags("--dry-run"), places.flags("--limit", "1")):
        assert main(flags) == 2
        [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"{places.out}/s000.parquet would be replaced, but framecap did not write it" in line
    assert (places.out / "s000.parquet").read_bytes() == before
    assert [path.name for path in places.out.iterdir()] == ["s000.parquet"]


def test_a_file_that_is_no_parquet_and_that_no_ledger_knows_is_not_replaced(places: Places) -> None:
    places.out.mkdir()
    (places.out / "s000.parquet").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"s000.parquet would be replaced"):
        places.run()


def test_a_caption_shard_that_was_damaged_is_made_again(places: Places) -> None:
    places.run()
    shard = places.out / "s000.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    assert places.run().shards_by_reason == {"new": 1}


def test_a_caption_shard_that_another_tool_wrote_anew_is_not_replaced(places: Places) -> None:
    places.run()
    table = pq.read_table(places.out / "s000.parquet").replace_schema_metadata(None)
    pq.write_table(table, places.out / "s000.parquet")
    with pytest.raises(SettingsError, match=r"s000.parquet would be replaced"):
        places.run()


def test_a_file_that_appears_while_the_run_is_under_way_is_not_replaced(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(*run: Any) -> Iterator[ChunkRecord]:
        other_frames(places.out / "day", "s001.parquet")
        yield from caption_in_process(*run)

    monkeypatch.setattr("framecap.pipeline.caption.caption_units", disturbed)
    summary = places.run()
    assert (summary.exit_code, summary.published_shards, list(summary.failed_shards)) == (3, 2, ["day/s001.parquet"])
    assert summary.failed_shards["day/s001.parquet"].startswith("foreign: ")
    assert "image" in pq.read_schema(places.out / "day" / "s001.parquet").names


def test_pruning_deletes_nothing_that_framecap_did_not_write(places: Places) -> None:
    places.run()
    other_frames(places.out / "mine", "x.parquet")
    for name in ("s000.parquet", "s002.parquet"):
        (places.frames / name).unlink()
    shutil.copyfile(places.out / "mine" / "x.parquet", places.out / "s000.parquet")  # the ledger knows this name
    assert places.run(prune=True).pruned == ["s002.parquet"]
    assert sorted(read_output(places.out)) == ["day/s001.parquet", "mine/x.parquet", "s000.parquet"]


def test_sweeping_deletes_nothing_that_framecap_did_not_write(places: Places) -> None:
    key = "0" * 32
    state = places.out / "_framecap"
    theirs = [f".notes.{key}.tmp", f"lock.{key}", f"day/.x.parquet.{key}.tmp", "_framecap/ledger/theirs.txt",
              "_framecap/fragments/theirs.bin"]  # fmt: skip
    ours = [f".framecap.{key}.tmp", f"day/.s001.parquet.{key}.tmp", f"_framecap/lock.{key}.void",
            f"_framecap/.ledger.jsonl.{key}.tmp", f"_framecap/fragments/{key}.fragment"]  # fmt: skip
    for name in (*theirs, *ours):
        (places.out / name).parent.mkdir(parents=True, exist_ok=True)
        (places.out / name).write_text("x")
    assert places.run().exit_code == 0
    assert [name for name in theirs if not (places.out / name).is_file()] == []
    assert [name for name in ours if (places.out / name).exists()] == []
    assert (state / "ledger.jsonl").is_file()


# The input that an output belongs to.


def test_another_input_with_shards_named_alike_is_refused_with_both_names(
    places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    places.run()
    before = read_output(places.out)
    other = other_frames(places.root / "other")
    assert main(places.flags("--input-uri", str(other))) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{places.out} belongs to the input {places.frames}, not to {other}" in line
    assert f"--input-moved-from {places.frames}" in line
    assert read_output(places.out) == before


def test_the_same_input_may_be_named_in_any_way(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.run()
    monkeypatch.chdir(places.root)
    Path("link").symlink_to(places.frames)
    spellings = [f"{places.frames}/", "in", "./in//", "in/../in", "in/**/*.parquet", "link", f"file://{places.frames}"]
    for spelling in spellings:
        again = places.run(spelling)
        assert (spelling, again.exit_code, again.shards_done_before) == (spelling, 0, 3)
    for file in ("in/s000.parquet", "link/s002.parquet", "in/day/s001.parquet"):
        again = places.run(file)
        assert (file, again.shards_done_before, again.rows_to_do) == (file, 1, 0)


@pytest.mark.parametrize("part", ["day", "day/s001.parquet", "day/*.parquet", "d*/*.parquet"])
def test_a_part_of_the_input_keeps_its_names_in_the_whole(part: str, places: Places) -> None:
    places.run(f"{places.frames}/s000.parquet")
    assert places.run(f"{places.frames}/{part}").published_shards == 1
    assert sorted(read_output(places.out)) == ["day/s001.parquet", "s000.parquet"]
    assert places.run().shards_by_reason == {"new": 1}
    assert sorted(read_output(places.out)) == NAMES
    assert status_of(str(places.out)).left == {}


def test_a_part_of_the_input_cannot_be_pruned(places: Places) -> None:
    places.run()
    with pytest.raises(SettingsError, match="--prune needs a whole folder"):
        places.run(places.frames / "day", prune=True)


def test_a_link_that_leads_elsewhere_by_now_is_the_same_input(places: Places) -> None:
    current = places.root / "current"
    current.symlink_to(places.frames)
    places.run(current)
    shutil.copytree(places.frames, places.root / "next")
    current.unlink()
    current.symlink_to(places.root / "next")
    assert places.run(current).exit_code == 0


def test_an_input_that_was_moved_is_said_once(places: Places) -> None:
    places.run()
    moved = places.frames.rename(places.root / "moved")
    with pytest.raises(SettingsError, match="belongs to the input"):
        places.run(moved, input_moved_from=str(places.root / "elsewhere"))
    assert places.run(moved, input_moved_from=f"{places.frames}/").shards_done_before == 3
    assert json.loads(places.record.read_text())["uri"] == str(moved)
    assert places.run(moved, input_moved_from=str(places.frames)).shards_done_before == 3
    with pytest.raises(SettingsError, match=f"belongs to the input {moved}"):
        places.run(other_frames(places.root / "other"))


def test_an_input_that_nothing_was_captioned_of_claims_no_output(places: Places) -> None:
    places.out.mkdir()
    places.run(other_frames(places.root / "other"), max_new_tokens=4, limit=1)
    (places.out / "s000.parquet").unlink()
    assert places.run().published_shards == 3


def test_a_dry_run_records_nothing(places: Places) -> None:
    places.run(dry_run=True)
    assert not places.out.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"uri": "x"}'])
def test_a_damaged_record_is_one_line(content: str, places: Places, capfd: pytest.CaptureFixture[str]) -> None:
    places.run()
    places.record.write_text(content)
    assert main(places.flags()) == 2
    assert f"error: {places.record} does not say to which input" in capfd.readouterr().err


def test_an_output_of_the_last_version_is_taken_over(places: Places) -> None:
    places.run()
    places.record.unlink()
    with pytest.raises(SettingsError, match=f"belongs to the input {places.frames}, not to"):
        places.run(other_frames(places.root / "other"))
    assert places.run(places.frames / "day").shards_done_before == 1
    assert json.loads(places.record.read_text()) == {"uri": str(places.frames), "place": str(places.frames)}


def test_an_output_without_state_is_known_by_the_frames_it_was_made_of(places: Places) -> None:
    places.run()
    shutil.rmtree(places.out / "_framecap")
    other = other_frames(places.root / "other")
    with pytest.raises(SettingsError, match="belongs to another input, not to"):
        places.run(other)
    assert places.run().shards_done_before == 3
    shutil.rmtree(places.out / "_framecap")
    assert places.run(other, input_moved_from="unknown").shards_by_reason == {"changed": 1}


def test_spellings_of_a_store_are_the_same_input(places: Places) -> None:
    MemoryFileSystem().put(f"{places.frames}/", "/bound/in/", recursive=True)
    places.run("memory://bound/in")
    assert places.run("memory://bound/in/").shards_done_before == 3
    assert places.run("memory:///bound/in/day/*.parquet").shards_done_before == 1
    with pytest.raises(SettingsError, match="belongs to the input memory://bound/in, not to"):
        places.run(places.frames)
