"""--state-uri: OUT holds nothing but caption shards and an empty pointer; the state is one folder of one output."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import caption, caption_in_process, jpeg, read_output, shard_table, start_nothing, without_ray, write_shards

from framecap.errors import SettingsError
from framecap.pipeline.lock import OutputLock
from framecap.pipeline.records import ChunkRecord
from framecap.pipeline.run import main
from framecap.pipeline.state import claim_state, state_of
from framecap.report.report import run_summaries
from framecap.storage import open_fs, write_bytes_atomic
from framecap.verify import verify

__all__ = ["without_ray"]  # a fixture
pytestmark = pytest.mark.usefixtures("without_ray")
ROWS = {"day/s001.parquet": 20, "s000.parquet": 20, "s002.parquet": 20}


class Places:
    """IN with three shards, OUT, the folder of its state, and the captioner."""

    def __init__(self, root: Path, captioner: Path) -> None:
        self.frames, self.out, self.state = root / "in", root / "out", root / "state"
        self.captioner = captioner
        write_shards(self.frames, 3, 20)

    def run(self, **settings: Any) -> Any:
        return caption(self.frames, self.out, self.captioner, **settings)

    def run_apart(self, **settings: Any) -> Any:
        return self.run(state_uri=str(self.state), **settings)

    def flags(self, *more: str) -> list[str]:
        places = ["--input-uri", str(self.frames), "--output-uri", str(self.out), "--captioner", str(self.captioner)]
        return [*places, *more]

    def marker(self, state: Path | str | None = None) -> Path:
        return self.out / "_framecap" / f"state-at.{quote(str(state or self.state), safe='')}"


@pytest.fixture
def places(tmp_path: Path, tiny_captioner_dir: Path) -> Places:
    return Places(tmp_path, tiny_captioner_dir)


def tree(root: Path) -> dict[str, bytes | None]:
    """Every folder and file below ``root``, with its content."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def with_bytes(out: Path) -> list[str]:
    """What in OUT holds a byte, but for the short-lived files of publishing."""
    files = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(out).as_posix() for path in files if path.stat().st_size)


def files_of(state: Path) -> list[str]:
    """Files of the state, run ids left away."""
    names = (path.relative_to(state).as_posix() for path in state.rglob("*") if path.is_file())
    return sorted("runs/summary.json" if name.startswith("runs/") else name for name in names)


def test_the_output_opens_by_its_folder_alone_in_pandas_duckdb_and_polars(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: set[str] = set()

    def watched(*run: Any) -> Iterator[ChunkRecord]:
        for record in caption_in_process(*run):
            during.update(with_bytes(places.out))
            yield record

    monkeypatch.setattr("framecap.pipeline.caption.caption_units", watched)
    assert places.run_apart().exit_code == 0
    assert with_bytes(places.out) == sorted(ROWS)
    assert during <= set(ROWS)
    assert [path.name for path in (places.out / "_framecap").iterdir()] == [places.marker().name]
    expected = pa.concat_tables(read_output(places.out).values()).select(["frame_id", "caption"]).to_pylist()
    columns = ["frame_id", "caption"]
    assert len(expected) == 60
    found = [
        pd.read_parquet(places.out)[columns].to_dict("records"),
        pl.read_parquet(str(places.out)).select(columns).to_dicts(),
        pl.scan_parquet(str(places.out)).select(columns).collect().to_dicts(),
        duckdb.sql(f"select frame_id, caption from read_parquet('{places.out}/')").df().to_dict("records"),
    ]
    for rows in found:
        assert sorted(rows, key=lambda row: row["frame_id"]) == sorted(expected, key=lambda row: row["frame_id"])


def test_the_state_holds_ledger_summaries_and_its_outputs_name(places: Places) -> None:
    places.run_apart()
    assert files_of(places.state) == ["input.json", "ledger.jsonl", "output", "runs/summary.json"]
    assert (places.state / "output").read_text() == str(places.out)


@pytest.mark.parametrize("flag", [True, False], ids=["with the flag", "without it"])
def test_a_second_run_finds_the_state_and_does_nothing(places: Places, flag: bool) -> None:
    places.run_apart()
    before = places.out / "s000.parquet", (places.out / "s000.parquet").stat().st_mtime_ns
    again = places.run_apart() if flag else places.run()
    assert (again.exit_code, again.captioned_rows, again.shards_done_before) == (0, 0, 3)
    assert before[0].stat().st_mtime_ns == before[1]
    assert files_of(places.state) == ["input.json", "ledger.jsonl", "output", "runs/summary.json", "runs/summary.json"]
    assert with_bytes(places.out) == sorted(ROWS)


def test_a_relative_folder_and_a_link_are_the_same_state(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.run_apart()
    monkeypatch.chdir(places.state.parent)
    Path("link").symlink_to(places.state)
    for spelling in ("state", "./state/", "link", f"file://{places.state}"):
        assert places.run(state_uri=spelling).shards_done_before == 3


def test_the_default_place_may_be_given_too(places: Places) -> None:
    places.run(state_uri=f"{places.out}/_framecap/")
    assert files_of(places.out / "_framecap") == ["input.json", "ledger.jsonl", "runs/summary.json"]
    assert places.run().shards_done_before == 3


def test_fragments_of_an_interrupted_run_are_used(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # killed between the last fragment and its publication
        patch.setattr("framecap.pipeline.publish.delete_fragment", lambda folder, name: None)
        places.run_apart()
    for path in [*places.out.rglob("*.parquet"), places.state / "ledger.jsonl"]:
        path.unlink()
    assert list((places.state / "fragments").glob("*.fragment"))
    again = places.run_apart()
    assert (again.recovered_rows, again.captioned_rows, again.published_shards) == (60, 0, 3)
    assert files_of(places.state) == ["input.json", "ledger.jsonl", "output", "runs/summary.json", "runs/summary.json"]


def test_a_run_that_holds_the_state_is_respected(places: Places, capfd: pytest.CaptureFixture[str]) -> None:
    places.run_apart()
    with OutputLock(str(places.state / "lock"), "night-run", 60):
        assert main(places.flags("--state-uri", str(places.state))) == 75
        assert main(places.flags()) == 75
    assert capfd.readouterr().err.count("held by run night-run") == 2


def test_a_dry_run_writes_nothing(places: Places) -> None:
    before = tree(places.frames.parent)
    assert places.run_apart(dry_run=True).rows_to_do == 60
    assert tree(places.frames.parent) == before
    places.run_apart()
    before = tree(places.frames.parent)
    assert places.run(dry_run=True).shards_done_before == 3
    assert tree(places.frames.parent) == before


def test_pruning_retries_and_sweeping_reach_the_state(places: Places) -> None:
    uris = pa.table({"frame_id": range(4), "image_uri": [f"{row}.jpg" for row in range(4)]})
    pq.write_table(uris, places.frames / "uris.parquet")
    settings = {"fetch_retries": 0, "max_error_rate": 1.0}
    places.run_apart(**settings)
    (places.frames / "2.jpg").write_bytes(jpeg(2))
    (places.frames / "s000.parquet").unlink()
    for name in (f".ledger.jsonl.{'0' * 32}.tmp", f"lock.{'0' * 32}", f"runs/.summary.json.{'0' * 32}.tmp"):
        (places.state / name).write_text("cut sho")
    (places.out / f".s002.parquet.{'0' * 32}.tmp").write_text("cut sho")
    again = places.run_apart(retry_errors=True, prune=True, **settings)
    assert (again.captioned_rows, again.shards_by_reason, again.pruned) == (4, {"errors": 1}, ["s000.parquet"])
    statuses = read_output(places.out)["uris.parquet"].column("caption_status").to_pylist()
    assert statuses == ["error", "error", "truncated", "error"]
    assert files_of(places.state) == ["input.json", "ledger.jsonl", "output", "runs/summary.json", "runs/summary.json"]
    assert sorted(read_output(places.out)) == with_bytes(places.out)
    assert not list(places.out.rglob(".*"))


def test_verify_and_report_follow_the_pointer(places: Places) -> None:
    run_id = places.run_apart().run_id
    assert [summary["run_id"] for summary in run_summaries(str(places.out))] == [run_id]
    frames, out = str(places.frames), str(places.out)
    assert verify(frames, out).faults == ()
    (places.state / "fragments").mkdir(exist_ok=True)
    for name in ("lock", "fragments/a.fragment"):
        (places.state / name).write_text("{}")
    faults = verify(frames, out).faults
    assert [(fault.kind, fault.where) for fault in faults] == [
        ("unfinished", f"{places.state}/fragments/a.fragment"), ("unfinished", f"{places.state}/lock"),
    ]  # fmt: skip


def test_without_access_to_the_state_captions_are_verified_and_shown(places: Places, caplog: Any) -> None:
    places.run_apart()
    places.marker().rename(places.marker("nowhere://state"))
    assert run_summaries(str(places.out)) == []
    assert "no storage backend" in caplog.text or "nowhere" in caplog.text
    caplog.clear()
    assert verify(str(places.frames), str(places.out)).faults == ()
    assert "the state of this output cannot be looked through: nowhere://state" in caplog.text


def test_state_that_was_moved_is_taken_up(places: Places, caplog: pytest.LogCaptureFixture) -> None:
    places.run()
    (places.out / "_framecap").rename(places.state)
    assert places.run_apart().shards_done_before == 3
    moved = places.state.with_name("moved")
    places.state.rename(moved)
    assert verify(str(places.frames), str(places.out)).faults == ()
    assert f"the state of this output is not at {places.state}" in caplog.text
    for settings in ({}, {"state_uri": str(places.state)}, {"state_uri": str(moved)}):
        with pytest.raises(SettingsError, match=f"delete {places.marker()}"):
            places.run(**settings)
    places.marker().unlink()
    again = places.run(state_uri=str(moved))
    assert (again.captioned_rows, again.shards_done_before) == (0, 3)
    assert state_of(str(places.out)) == str(moved)


def test_an_output_that_was_moved_keeps_its_state_when_told_so(places: Places) -> None:
    places.run_apart()
    places.out = places.out.rename(places.out.with_name("moved"))
    with pytest.raises(SettingsError, match=f"write {places.out} into {places.state}/output"):
        places.run()
    (places.state / "output").write_text(f"{places.out}\n")
    assert places.run().shards_done_before == 3


def state_of_a_run(places: Places) -> None:
    places.run_apart()


def ordinary_state(places: Places) -> None:
    places.run()


def lock_of_a_killed_run(places: Places) -> None:
    (places.out / "_framecap").mkdir(parents=True)
    (places.out / "_framecap" / "lock").write_text("{}")


def state_of_another(places: Places) -> None:
    caption(places.frames, places.out.with_name("other"), places.captioner, state_uri=str(places.state))


def ordinary_output_beside(places: Places) -> None:
    caption(places.frames, places.out.with_name("other"), places.captioner)


def lost_state(places: Places) -> None:
    places.run_apart()
    shutil.rmtree(places.state)


def somebodys_files(places: Places) -> None:
    (places.state / "ledger").mkdir(parents=True)
    (places.state / "accounts.ods").write_text("years of work")


def both(places: Places) -> None:
    places.run_apart()
    (places.out / "_framecap" / "ledger.jsonl").write_text("")


def two_pointers(places: Places) -> None:
    places.run_apart()
    places.marker("/somewhere/else").touch()


def a_file(places: Places) -> None:
    places.state.write_text("")


def nothing(places: Places) -> None:
    """Nothing was there before."""


# What was there → --state-uri (None: not given) → what the one line says, {…} filled in.
REFUSALS: dict[str, tuple[Callable[[Places], None], str | None, str]] = {
    "another place": (state_of_a_run, "{root}/else", "give --state-uri {state}, or"),
    "the default place": (state_of_a_run, "{out}/_framecap", "give --state-uri {state}, or"),
    "ordinary state": (ordinary_state, "{state}", "move it to {state} first, or leave --state-uri away"),
    "a killed run's lock": (lock_of_a_killed_run, "{state}", "move it to {state} first"),
    "another output's": (state_of_another, "{state}", "is the state of {root}/other; choose another folder"),
    "another output": (ordinary_output_beside, "{root}/other", "holds other files (_framecap)"),
    "another output's _framecap": (ordinary_output_beside, "{root}/other/_framecap", "choose another name"),
    "lost": (lost_state, "{state}", "bring it back, or, to begin without it, delete {out}/_framecap/state-at."),
    "lost, not given": (lost_state, None, "bring it back, or"),
    "state in both places": (both, "{state}", "move it to {state} first, or delete {out}/_framecap/state-at."),
    "two pointers": (two_pointers, "{state}", "give --state-uri /somewhere/else"),
    "two pointers, not given": (two_pointers, None, "or, if that folder was moved, delete"),
    "somebody's files": (somebodys_files, "{state}", "holds other files (accounts.ods)"),
    "OUT": (nothing, "{out}", "overlaps with --output-uri"),
    "inside OUT": (nothing, "{out}/state", "overlaps with --output-uri"),
    "inside OUT's own": (nothing, "{out}/_framecap/deeper", "overlaps with --output-uri"),
    "above OUT": (nothing, "{root}/", "overlaps with --output-uri"),
    "IN": (nothing, "{root}/in", "overlaps with --input-uri"),
    "inside IN": (nothing, "{root}/in/state", "overlaps with --input-uri"),
    "too long": (nothing, "{state}" + 200 * "x", "bytes too long to be the name of a file"),
    "below a file": (a_file, "{state}/deeper", "is not a folder"),
    "a file": (a_file, "{state}", "is not a folder"),
    "unknown scheme": (nothing, "nowhere://state", "use a path, s3://"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_state_that_cannot_be_this_outputs_is_refused_and_nothing_written(
    case: str, places: Places, capfd: pytest.CaptureFixture[str]
) -> None:
    before, state, said = REFUSALS[case]
    before(places)
    names = {"root": places.out.parent, "out": places.out, "state": places.state}
    flags = [] if state is None else ["--state-uri", state.format(**names)]
    files = tree(places.out.parent)
    capfd.readouterr()
    assert main(places.flags(*flags, "--batch-size", "8")) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said.format(**names) in line
    assert tree(places.out.parent) == files


def test_a_name_as_long_as_the_file_system_takes_serves(places: Places) -> None:
    spare = 255 - len(places.marker().name)
    places.state = places.state.with_name("state" + spare * "x")
    assert places.run_apart().exit_code == 0
    assert state_of(str(places.out)) == str(places.state)
    with pytest.raises(SettingsError, match="is 1 bytes too long"):
        places.run(state_uri=f"{places.state}x")


def test_beside_frames_that_are_a_glob_there_is_room_for_the_state(places: Places) -> None:
    places.run_apart()
    shutil.rmtree(places.out)
    summary = caption(f"{places.frames}/*.parquet", places.out, places.captioner, state_uri=f"{places.frames}/state")
    assert (summary.exit_code, summary.captioned_rows) == (0, 40)


def plant_lock(places: Places) -> None:
    (places.out / "_framecap").mkdir(parents=True)
    (places.out / "_framecap" / "lock").write_text("{}")


def plant_pointer(places: Places) -> None:
    places.marker("/somewhere/else").parent.mkdir(parents=True, exist_ok=True)
    places.marker("/somewhere/else").touch()


@pytest.mark.parametrize(
    ("plant", "settings"),
    [(plant_lock, {"state_uri": True}), (plant_pointer, {"state_uri": True}), (plant_pointer, {})],
)
def test_a_rival_that_came_since_the_first_look_is_noticed(
    plant: Callable[[Places], None], settings: dict[str, Any], places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(settings: Any, *_: object) -> Any:
        plant(places)
        return start_nothing(settings)

    monkeypatch.setattr("framecap.pipeline.caption.start_ray", start)
    with pytest.raises(SettingsError):
        places.run_apart() if settings else places.run()
    assert not places.state.exists()
    assert len(list(places.out.rglob("*"))) == 2, "the rival's own file and its folder"


def test_a_rival_that_comes_while_the_pointer_is_written_is_noticed(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is taken back, so that the rival is not disturbed for good."""

    def write(uri: str, data: bytes) -> None:
        write_bytes_atomic(uri, data)
        if "state-at." in uri:
            (places.out / "_framecap" / "lock").write_text("{}")

    monkeypatch.setattr("framecap.pipeline.state.write_bytes_atomic", write)
    with pytest.raises(SettingsError, match=r"holds state of its own \(lock\)"):
        claim_state(str(places.out), str(places.state))
    assert list(tree(places.out)) == ["_framecap", "_framecap/lock"]
    assert files_of(places.state) == []


def put_shard(uri: str, name: str, rows: int, seed: int) -> None:
    sink = io.BytesIO()
    pq.write_table(shard_table(name, rows, seed), sink, row_group_size=4)
    write_bytes_atomic(uri, sink.getvalue())


def s3_options() -> dict[str, str]:
    options = json.loads(os.environ["FRAMECAP_STORAGE_OPTIONS"])
    return options.get("s3", options)


def test_state_and_output_may_both_be_on_s3(bucket: str, tiny_captioner_dir: Path) -> None:
    put_shard(f"{bucket}/apart/in/a.parquet", "a", 10, 1)
    put_shard(f"{bucket}/apart/in/deep/b.parquet", "b", 3, 50)
    where = (f"{bucket}/apart/in", f"{bucket}/apart/out", tiny_captioner_dir)
    first = caption(*where, state_uri=f"{bucket}/apart/state/")
    again = caption(*where)
    assert (first.exit_code, first.captioned_rows, again.captioned_rows, again.shards_done_before) == (0, 13, 0, 2)
    fs, root = open_fs(f"{bucket}/apart")
    sizes = {
        name.removeprefix(f"{root}/out/"): info["size"] for name, info in fs.find(f"{root}/out", detail=True).items()
    }
    marker = f"_framecap/state-at.{quote(f'{bucket}/apart/state', safe='')}"
    assert {name: size > 0 for name, size in sizes.items()} == {
        marker: False, "a.parquet": True, "deep/b.parquet": True,
    }  # fmt: skip
    left = sorted(name.removeprefix(f"{root}/state/") for name in fs.find(f"{root}/state"))
    assert [name for name in left if not name.endswith("/summary.json")] == ["input.json", "ledger.jsonl", "output"]
    assert len(run_summaries(f"{bucket}/apart/out")) == 2
    assert verify(f"{bucket}/apart/in", f"{bucket}/apart/out").faults == ()
    given = s3_options()
    options = {
        "aws_endpoint_url": given["endpoint_url"], "aws_access_key_id": given["key"],
        "aws_secret_access_key": given["secret"], "aws_allow_http": "true", "aws_region": "us-east-1",
    }  # fmt: skip
    assert pl.read_parquet(f"{bucket}/apart/out/", storage_options=options).height == 13
    with pytest.raises(SettingsError, match=f"give --state-uri {bucket}/apart/state, or"):
        caption(*where, state_uri=f"{bucket}/apart/other")
    assert not fs.exists(f"{root}/other")


def test_storage_options_are_the_states_too(bucket: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    options = s3_options()
    monkeypatch.setenv("FRAMECAP_STORAGE_OPTIONS", "")
    places.run(state_uri=f"{bucket}/local/state", storage_options=options)
    assert json.loads(os.environ["FRAMECAP_STORAGE_OPTIONS"]) == {"s3": options}
    assert open_fs(bucket)[0].cat_file("frames/local/state/output").decode() == str(places.out)
    assert pl.read_parquet(str(places.out)).height == 60
    monkeypatch.setenv("FRAMECAP_STORAGE_OPTIONS", "")  # the job set it
    assert places.run(storage_options=options).shards_done_before == 3
    monkeypatch.setenv("FRAMECAP_STORAGE_OPTIONS", "")
    with pytest.raises(SettingsError, match=r'write them as \{"gs": {…}, "s3": {…}\}'):
        caption(f"{bucket}/in", places.out, places.captioner, state_uri="gs://b/state", storage_options=options)
