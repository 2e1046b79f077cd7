"""The job on a local cluster: what goes in comes out, once, in order; only what changed is done again."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import caption, jpeg, read_output, shard_table, state_files, without_ray, write_shards

from framecap.model.captioner import Captioner
from framecap.model.decode_options import DecodeOptions
from framecap.pipeline.plan import Piece, ShardPlan, make_chunks, make_units, subtract
from framecap.pipeline.settings import CaptionSettings
from framecap.schema import META_FINGERPRINT, META_SIGNATURE, META_SOURCE, META_VERSION, InputColumns
from framecap.verify import schema_faults

__all__ = ["without_ray"]  # a fixture

here = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def dataset(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, tiny_captioner_dir: Path) -> tuple[Path, Path]:
    """Four shards of 20 frames, captioned once; tests that change things copy or add their own."""
    root = tmp_path_factory.mktemp("dataset")
    write_shards(root / "in", 4, 20)
    summary = caption(root / "in", root / "out", tiny_captioner_dir)
    assert summary.exit_code == 0
    return root / "in", root / "out"


def test_every_frame_comes_out_once_in_order_with_its_own_columns(dataset: tuple[Path, Path]) -> None:
    source, out = dataset
    outputs = read_output(out)
    assert sorted(outputs) == sorted(p.relative_to(source).as_posix() for p in source.rglob("*.parquet"))
    for name, table in outputs.items():
        given = pq.read_table(source / name).drop_columns("image")
        assert table.select(given.column_names).equals(given)


def test_captions_are_those_of_the_captioner_itself(dataset: tuple[Path, Path], tiny_captioner_dir: Path) -> None:
    source, out = dataset
    name = "s000.parquet"
    frames = pq.read_table(source / name).column("image").to_pylist()
    expected = Captioner.from_pretrained(tiny_captioner_dir).caption(frames, DecodeOptions(max_new_tokens=4))
    table = read_output(out)[name]
    assert table.column("caption").to_pylist() == [c.text for c in expected]
    assert table.column("caption_status").to_pylist() == [c.status for c in expected]
    assert table.column("caption_tokens").to_pylist() == [c.tokens for c in expected]
    np.testing.assert_allclose(table.column("caption_logprob"), [c.logprob for c in expected], rtol=1e-4)
    np.testing.assert_allclose(table.column("caption_similarity"), [c.similarity for c in expected], atol=1e-5)


def test_file_metadata_says_where_a_caption_shard_comes_from(dataset: tuple[Path, Path]) -> None:
    metadata = pq.ParquetFile(dataset[1] / "s000.parquet").metadata.metadata
    assert metadata[META_VERSION] == b"1"
    assert metadata[META_SOURCE] == b"s000.parquet"
    assert len(metadata[META_FINGERPRINT]) == 64
    assert metadata[META_SIGNATURE].startswith(str((dataset[0] / "s000.parquet").stat().st_size).encode())


def test_nothing_is_left_behind_but_ledger_and_summaries(dataset: tuple[Path, Path]) -> None:
    assert state_files(dataset[1]) == []


def test_a_second_run_does_nothing_and_starts_no_actor(dataset: tuple[Path, Path], tiny_captioner_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset[1].rglob("*.parquet")}
    begun = time.monotonic()
    summary = caption(*dataset, tiny_captioner_dir)
    assert time.monotonic() - begun < 5
    assert (summary.exit_code, summary.captioned_rows, summary.shards_done_before) == (0, 0, 4)
    assert before == {path: path.stat().st_mtime_ns for path in dataset[1].rglob("*.parquet")}


def test_a_lost_ledger_costs_footers_and_no_captions(dataset: tuple[Path, Path], tiny_captioner_dir: Path) -> None:
    (dataset[1] / "_framecap" / "ledger.jsonl").unlink()
    summary = caption(*dataset, tiny_captioner_dir)
    assert (summary.captioned_rows, summary.shards_done_before) == (0, 4)


def test_another_decode_option_makes_all_shards_stale(dataset: tuple[Path, Path], tiny_captioner_dir: Path) -> None:
    summary = caption(*dataset, tiny_captioner_dir, num_beams=2, dry_run=True)
    assert summary.shards_by_reason == {"stale": 4}


@here
def test_exactly_the_replaced_added_and_removed_shards_are_acted_upon(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_shards(source, 4, 6)
    caption(source, out, tiny_captioner_dir)
    kept = (out / "s000.parquet").stat().st_mtime_ns
    pq.write_table(shard_table("replaced", 7, 77), source / "s002.parquet")
    pq.write_table(shard_table("added", 5, 88), source / "added.parquet")
    (source / "day" / "s001.parquet").unlink()
    summary = caption(source, out, tiny_captioner_dir, prune=True)
    assert summary.shards_by_reason == {"changed": 1, "new": 1}
    assert summary.captioned_rows == 12
    assert summary.pruned == ["day/s001.parquet"]
    assert sorted(read_output(out)) == ["added.parquet", "day/s003.parquet", "s000.parquet", "s002.parquet"]
    assert (out / "s000.parquet").stat().st_mtime_ns == kept


@here
def test_a_dry_run_writes_nothing(tmp_path: Path, tiny_captioner_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "in", 2, 3)
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, dry_run=True)
    assert summary.exit_code == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert "2 shards, 6 rows (2 new)" in printed
    names = sorted(path.relative_to(tmp_path / "in").as_posix() for path in (tmp_path / "in").rglob("*.parquet"))
    assert [line.split() for line in printed.splitlines()[1:3]] == [["new", "3", "rows", name] for name in names]
    assert "estimate: 6 frames" in printed


@here
def test_limit_takes_the_first_shards_and_leaves_the_rest(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    names = write_shards(tmp_path / "in", 3, 3)
    caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, limit=1)
    assert list(read_output(tmp_path / "out")) == names[:1]


@here
def test_an_empty_shard_gives_an_empty_output_without_any_actor(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(shard_table("none", 0), tmp_path / "in" / "none.parquet")
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    assert summary.exit_code == 0
    table = read_output(tmp_path / "out")["none.parquet"]
    assert len(table) == 0
    assert "caption" in table.column_names


@here
def test_identical_frames_are_captioned_once_and_say_so(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    images = [jpeg(1), jpeg(2), jpeg(1), jpeg(2), jpeg(3)]
    table = pa.table({"frame_id": list("abcde"), "image": images})
    pq.write_table(table, tmp_path / "in" / "twice.parquet")
    summary = caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    rows = read_output(tmp_path / "out")["twice.parquet"]
    assert summary.reused_rows == 2
    assert rows.column("caption_reused").to_pylist() == [None, None, "identical", "identical", None]
    captions = rows.column("caption").to_pylist()
    assert captions[0] == captions[2]


@here
def test_near_frames_of_one_video_share_a_caption_only_on_request(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table(
        {
            "frame_id": list("abcd"),
            "video_id": ["v", "v", "w", "w"],
            "image": [jpeg(1), jpeg(1, (49, 41)), jpeg(1, (50, 42)), jpeg(1, (51, 43))],
        }
    )
    pq.write_table(table, tmp_path / "in" / "near.parquet")
    caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, reuse_similarity=0.9)
    rows = read_output(tmp_path / "out")["near.parquet"]
    assert rows.column("caption_reused").to_pylist() == [None, "similar", None, "similar"]
    assert rows.column("caption_similarity").null_count == 0


@pytest.mark.parametrize("way", ["flag", "environment", "file"])
def test_no_columns_are_kept_however_it_is_said(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--input-uri", "in", "--output-uri", "out"]
    if way == "flag":
        argv += ["--keep-columns", "none"]
    elif way == "environment":
        monkeypatch.setenv("FRAMECAP_KEEP_COLUMNS", "none")
    else:
        (tmp_path / "job.yaml").write_text("keep_columns: none")
        argv += ["--config", str(tmp_path / "job.yaml")]
    assert CaptionSettings.from_command_line(argv).columns.keep == ()


@here
def test_what_near_frames_share_does_not_depend_on_the_cut(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    images = [jpeg(row // 7, (48 + row % 7, 40)) for row in range(150)]
    images[70] = images[3]  # the same bytes in another block of rows
    videos = [f"v{row % 2}" for row in range(150)]
    table = pa.table({"frame_id": range(150), "video_id": videos, "image": images})
    pq.write_table(table, tmp_path / "in" / "near.parquet", row_group_size=41)
    columns = ["caption", "caption_status", "caption_reused"]
    found = []
    for size in (16, 64, 150):
        out = tmp_path / f"out{size}"
        caption(tmp_path / "in", out, tiny_captioner_dir, reuse_similarity=0.95, batch_size=size)
        found.append(read_output(out)["near.parquet"].select(columns))
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])
    shared = found[0].column("caption_reused").to_pylist()
    assert 20 < shared.count("similar") < 148
    assert shared[64:66] == [None, None], "a new block, so each video starts with a caption of its own"


@here
def test_a_video_column_that_is_not_there_is_said_of_the_shard(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    write_shards(tmp_path / "in", 1, 3)
    places = (tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    summary = caption(*places, reuse_similarity=0.9, video_column="clip")
    assert summary.exit_code == 3
    assert summary.failed_shards["s000.parquet"].startswith("missing_column: no --video-column 'clip' to group by")


@here
def test_samples_do_not_depend_on_the_batch_size(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    write_shards(tmp_path / "in", 1, 12)
    outputs = []
    for size in (5, 12):
        caption(tmp_path / "in", tmp_path / f"out{size}", tiny_captioner_dir, do_sample=True, batch_size=size)
        outputs.append(read_output(tmp_path / f"out{size}")["s000.parquet"].column("caption"))
    assert outputs[0].equals(outputs[1])


@here
def test_candidates_and_embeddings_become_columns(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    write_shards(tmp_path / "in", 1, 4)
    options = {"num_beams": 3, "num_return_sequences": 3, "image_embedding": True}
    caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, **options)
    rows = read_output(tmp_path / "out")["s000.parquet"]
    assert [len(texts) for texts in rows.column("caption_candidates").to_pylist()] == [3] * 4
    embeddings = np.array(rows.column("image_embedding").to_pylist(), np.float32)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)


@here
def test_embeddings_of_captions_and_cosines_with_queries_are_those_of_the_captioner(
    tmp_path: Path, tiny_captioner_dir: Path
) -> None:
    source, out, queries = tmp_path / "in", tmp_path / "out", ("красный автобус, слева дерево", "кошка")
    write_shards(source, 1, 4)
    asked = {"image_embedding": True, "caption_embedding": True, "query": queries}
    assert caption(source, out, tiny_captioner_dir, **asked).exit_code == 0
    rows = read_output(out)["s000.parquet"]
    captioner = Captioner.from_pretrained(tiny_captioner_dir)
    images = captioner.embed_images(pq.read_table(source / "s000.parquet")["image"].to_pylist())
    texts = captioner.embed_texts(rows["caption"].to_pylist())
    cosines = images @ captioner.embed_texts(queries).T
    for name, expected in (("image_embedding", images), ("caption_embedding", texts), ("query_similarity", cosines)):
        np.testing.assert_allclose(np.array(rows[name].to_pylist(), np.float32), expected, atol=1e-3)
    metadata = pq.read_schema(out / "s000.parquet").metadata
    assert json.loads(metadata[b"framecap.queries"]) == list(queries)
    files = pq.ParquetFile(source / "s000.parquet"), pq.ParquetFile(out / "s000.parquet")
    assert list(schema_faults(*files, InputColumns())) == []
    again = caption(source, out, tiny_captioner_dir, **asked | {"query": queries[:1]})
    assert (again.captioned_rows, again.shards_by_reason) == (4, {"stale": 1})


@here
@pytest.mark.parametrize(
    ("keep", "columns"),
    [(("none",), ["frame_id"]), (("timestamp_ms",), ["frame_id", "timestamp_ms"])],
)
def test_only_the_columns_asked_for_are_kept(
    tmp_path: Path, tiny_captioner_dir: Path, keep: tuple[str, ...], columns: list[str]
) -> None:
    write_shards(tmp_path / "in", 1, 3)
    caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir, keep_columns=keep)
    rows = read_output(tmp_path / "out")["s000.parquet"]
    assert [name for name in rows.column_names if not name.startswith("caption")] == columns


@here
def test_columns_of_every_type_come_back_unchanged(tmp_path: Path, tiny_captioner_dir: Path) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    given = pa.table(
        {
            "frame_id": pa.array([1, 2, 3], pa.uint16()),
            "label": pa.array(["a", None, "a"]).dictionary_encode(),
            "when": pa.array([moment, None, moment], pa.timestamp("us", "Asia/Yekaterinburg")),
            "boxes": pa.array([[[1.5, 2.0]], [], None], pa.list_(pa.list_(pa.float32()))),
            "meta": pa.array([{"k": 1, "t": "ж"}, None, {"k": None, "t": ""}]),
            "tags": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int8())),
            "price": pa.array([Decimal("1.20"), None, Decimal("-3.00")], pa.decimal128(7, 2)),
            "nothing": pa.nulls(3),
            "raw": pa.array([b"\0\xff", b"", None], pa.large_binary()),
            "half": pa.array(np.array([0.5, -1, 2], np.float16)),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(given.append_column("image", [[jpeg(row) for row in range(3)]]), tmp_path / "in" / "types.parquet")
    written = pq.read_table(tmp_path / "in" / "types.parquet").drop_columns("image")
    caption(tmp_path / "in", tmp_path / "out", tiny_captioner_dir)
    kept = read_output(tmp_path / "out")["types.parquet"].select(written.column_names)
    assert kept.schema.equals(written.schema)
    assert kept.equals(written)


def test_the_output_opens_as_the_readme_says(dataset: tuple[Path, Path]) -> None:
    """pandas and DuckDB by the folder alone; Polars by a pattern, since it looks into ``_framecap/`` as well (by the
    folder with ``--state-uri``: tests/test_state.py)."""
    import duckdb
    import pandas as pd
    import polars as pl

    out = dataset[1]
    assert (out / "_framecap" / "ledger.jsonl").is_file()
    assert len(pd.read_parquet(out)) == 80
    for place in (f"read_parquet('{out}/')", f"'{out}/**/*.parquet'"):
        assert duckdb.sql(f"select count(caption) from {place}").fetchall() == [(80,)]
    assert pl.read_parquet(f"{out}/**/*.parquet").height == 80
    assert pl.scan_parquet(f"{out}/**/*.parquet").collect().height == 80


def test_chunks_cut_at_the_same_rows_after_an_interruption() -> None:
    shard = ShardPlan("s", "sig", 100, "new", ((0, 100),))
    whole = list(make_chunks([(shard, ((0, 100),))], 32))
    rest = list(make_chunks([(shard, subtract([(0, 100)], [(32, 64)]))], 32))
    assert [(p.start, p.stop) for c in whole for p in c] == [(0, 32), (32, 64), (64, 96), (96, 100)]
    assert rest == [c for c in whole if c[0].start != 32]


def test_tiny_shards_share_a_chunk() -> None:
    shards = [ShardPlan(f"s{i}", "sig", 4, "new", ((0, 4),)) for i in range(10)]
    chunks = list(make_chunks([(shard, shard.todo) for shard in shards], 16))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert all(isinstance(piece, Piece) for chunk in chunks for piece in chunk)


def test_units_never_mix_large_shards() -> None:
    shards = [ShardPlan(n, "sig", 64, "new", ((0, 64),)) for n in "ab"]
    units = make_units(make_chunks([(shard, shard.todo) for shard in shards], 16), 3)
    assert [[chunk[0].shard for chunk in unit] for unit in units] == [["a"] * 3, ["a"], ["b"] * 3, ["b"]]
