"""Search: frames come by the cosine of their embedding, near-identical ones of a video once, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from framecap.cli import main
from framecap.demo import bundled_captioner
from framecap.demo.evaluate import draw_test_frames
from framecap.demo.query_training import query
from framecap.demo.russian import parse
from framecap.errors import SettingsError
from framecap.model.captioner import Captioner
from framecap.search import SearchOptions, search, text_embedding

SIZE = 16


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_shard(path: Path, embeddings: np.ndarray, column: str = "image_embedding", **columns: list[object]) -> None:
    """A caption shard with only what search reads."""
    names = [f"{path.stem}/{row}" for row in range(len(embeddings))]
    table = {
        "frame_id": names,
        "caption": [f"кадр {name}" for name in names],
        column: pa.array(list(embeddings.astype(np.float16)), pa.list_(pa.float16(), embeddings.shape[1])),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), path, row_group_size=1000)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return unit_rows(np.random.default_rng(11).normal(size=(300, SIZE)))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray) -> Path:
    out = tmp_path_factory.mktemp("search") / "captions"
    for shard in range(3):
        write_shard(out / f"part/s{shard}.parquet", rows[100 * shard : 100 * (shard + 1)])
    return out


def test_the_best_are_those_of_a_direct_computation(output: Path, rows: np.ndarray) -> None:
    query = rows[17] + 0.3 * rows[250]
    found = search(str(output), 5 * query, SearchOptions(top=10))
    scores = rows @ (query / np.linalg.norm(query))
    order = np.argsort(-scores)[:10]
    assert [match.frame_id for match in found.matches] == [f"s{row // 100}/{row % 100}" for row in order]
    np.testing.assert_allclose([match.score for match in found.matches], scores[order], atol=2e-3)
    assert found.rows == 300


def test_near_identical_frames_of_a_video_are_one_result(tmp_path: Path, rows: np.ndarray) -> None:
    near = unit_rows(rows[:1] + 0.01 * np.random.default_rng(0).normal(size=(40, SIZE)))
    both = np.concatenate([near, near])
    write_shard(tmp_path / "s.parquet", both, video_id=["a"] * 40 + ["b"] * 40)
    found = search(str(tmp_path), rows[0], SearchOptions(top=5))
    assert sorted(str(match.video_id) for match in found.matches) == ["a", "b"]
    assert [match.folded for match in found.matches] == [39, 39]
    best = {match.video_id: match.row for match in found.matches}
    scores = both.astype(np.float16).astype(np.float32) @ rows[0]
    assert best == {"a": scores[:40].argmax(), "b": 40 + scores[40:].argmax()}
    assert len(search(str(tmp_path), rows[0], SearchOptions(top=5, fold=1.1)).matches) == 5


def test_frames_without_an_embedding_are_passed_over(tmp_path: Path, rows: np.ndarray) -> None:
    column = pa.array([None, *rows[1:4].astype(np.float16)], pa.list_(pa.float16(), SIZE))
    table = pa.table({"frame_id": list("abcd"), "image_embedding": column})
    pq.write_table(table, tmp_path / "s.parquet")
    found = search(str(tmp_path), rows[2])
    assert (found.matches[0].frame_id, found.matches[0].row) == ("c", 2)
    assert len(found.matches) == 3


def test_an_output_without_the_column_says_how_to_get_it(output: Path, rows: np.ndarray) -> None:
    with pytest.raises(SettingsError, match="--caption-embedding"):
        search(str(output), rows[0], SearchOptions(by="caption"))


def test_an_embedding_of_another_captioner_is_refused(output: Path) -> None:
    with pytest.raises(SettingsError, match="--captioner"):
        search(str(output), np.ones(SIZE + 1))


def test_a_damaged_shard_is_named_and_the_others_are_searched(tmp_path: Path, rows: np.ndarray) -> None:
    write_shard(tmp_path / "good.parquet", rows[:10])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    found = search(str(tmp_path), rows[3], SearchOptions(top=1))
    assert found.matches[0].frame_id == "good/3"
    assert list(found.unreadable) == ["bad.parquet"]


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    def peak(shards: int) -> int:
        for shard in range(shards):
            write_shard(tmp_path / f"s{shard}.parquet", np.random.default_rng(shard).normal(size=(3000, 64)))
        tracemalloc.start()
        search(str(tmp_path), np.ones(64))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(8) < 1.5 * peak(1) + 2_000_000


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """Frame shards of 40 drawn scenes, an output with the bundled captioner's embeddings of them, descriptions."""
    folder = tmp_path_factory.mktemp("drawn")
    _, frames, texts = draw_test_frames(40, 5)
    embeddings = Captioner.from_pretrained(bundled_captioner()).embed_images(frames)
    names = [f"s/{row}" for row in range(len(frames))]
    (folder / "frames").mkdir()
    pq.write_table(pa.table({"frame_id": names, "image": frames}), folder / "frames" / "s.parquet")
    write_shard(folder / "captions" / "s.parquet", embeddings)
    return folder / "captions", folder / "frames", texts


def test_the_command_finds_the_frame_that_a_description_is_of(
    drawn: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, frames, texts = drawn
    page = tmp_path / "found.html"
    flags = ["--json", "--top", "3", "--frames", str(frames), "--report", str(page)]
    assert main(["search", str(captions), texts[7], *flags]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0]["frame_id"] == "s/7"
    assert page.read_text(encoding="utf-8").count("data:image/webp") == 3


def test_the_text_embedding_is_that_of_the_captioner() -> None:
    text = "белая кошка сидит в поле"
    expected = Captioner.from_pretrained(bundled_captioner()).embed_texts([text])[0]
    np.testing.assert_allclose(text_embedding(str(bundled_captioner()), text), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "hint"), [(["--report", "x.html"], "--frames"), (["--top", "0"], "1 or more")], ids=["report", "top"]
)
def test_a_mistake_is_one_line(output: Path, flags: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(output), "кошка", *flags]) == 2
    assert hint in capsys.readouterr().err


def fits(query: str, description: str) -> bool:
    """Whether the description says of the main thing all that the query says, by the drawn world's own parser."""
    asked, said = parse(query), parse(description)
    return (asked.kind, asked.colour, asked.count, asked.setting) == (said.kind, said.colour, said.count, said.setting)


def test_short_queries_find_frames_of_unseen_compositions_that_fit(tmp_path: Path) -> None:
    """«красный автобус на мосту»: of 50 queries at least 48 find a frame that fits."""
    scenes, frames, descriptions = draw_test_frames(150, seed=2026)
    captioner = Captioner.from_pretrained(bundled_captioner(), device="cpu")
    write_shard(tmp_path / "a.parquet", captioner.embed_images(frames), caption=list(descriptions))
    queries = [query(scene, 0) for scene in scenes[:50]]
    found = [search(str(tmp_path), text, SearchOptions(top=1)).matches[0] for text in captioner.embed_texts(queries)]
    right = [fits(text, match.caption or "") for text, match in zip(queries, found, strict=True)]
    assert sum(right) >= 48, [text for text, is_right in zip(queries, right, strict=True) if not is_right]
