"""read_captions, show and the example notebook, on captions and frames as the job leaves them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from caption_data import Dataset, rewrite, write_dataset
from nbclient import NotebookClient
from PIL import Image

from framecap import Captioner, read_captions, show
from framecap.errors import SettingsError

NOTEBOOK = Path(__file__).parent.parent / "jobs/explore_captions.ipynb"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("notebook"), frames=90, per_video=30)


def test_all_rows_come_in_shard_order_without_the_state(data: Dataset) -> None:
    table = read_captions(str(data.captions))
    shards = [pq.read_table(path) for path in sorted(data.captions.rglob("day-*/*.parquet"))]
    assert table["frame_id"].to_pylist() == pa.concat_tables(shards)["frame_id"].to_pylist()
    assert table.num_rows == 90


def test_columns_and_filter_leave_only_what_is_asked_for(data: Dataset) -> None:
    table = read_captions(str(data.captions), columns=["frame_id"], filter=pc.field("caption_status") == "truncated")
    assert table.column_names == ["frame_id"]
    assert table.num_rows == read_captions(str(data.captions))["caption_status"].to_pylist().count("truncated") > 0


def test_pandas_and_polars_are_one_call_away(data: Dataset) -> None:
    table = read_captions(str(data.captions))
    assert isinstance(table.to_pandas(), pd.DataFrame)
    assert pl.from_arrow(table).shape[0] == 90


def test_an_unknown_column_is_named_beside_the_known_ones(data: Dataset) -> None:
    with pytest.raises(SettingsError, match=r"'captoin'.*caption_status"):
        read_captions(str(data.captions), columns=["captoin"])


def test_shards_with_and_without_candidates_are_read_together(tmp_path: Path) -> None:
    data = write_dataset(tmp_path)
    path = data.captions / "day-1/frames-00001.parquet"
    table = pq.read_table(path)
    values = pa.array([["а", "б"]] * table.num_rows, pa.list_(pa.string()))
    rewrite(path, table.append_column("caption_candidates", values))
    assert read_captions(str(data.captions))["caption_candidates"].null_count == 40


def test_frames_of_every_kind_are_shown_with_their_captions(data: Dataset, tmp_path: Path) -> None:
    encoded = read_captions(str(data.frames), columns=["image"])["image"][0].as_py()
    (tmp_path / "frame.jpg").write_bytes(encoded)
    picture = Image.new("RGB", (40, 30), "red")
    frames = [encoded, {"bytes": encoded}, str(tmp_path / "frame.jpg"), picture, np.asarray(picture), None, b"torn"]
    page = show(frames, ["а", "б", "в", "г", "д", "е", "<b>"], allow=[str(tmp_path)])._repr_html_()
    assert page.count("data:image/webp") == 5
    assert "&lt;b&gt;" in page


def test_columns_of_a_table_are_shown_as_they_are(data: Dataset) -> None:
    frames, captions = read_captions(str(data.frames)), read_captions(str(data.captions))
    grid = show(frames["image"][:3], captions["caption"][:3])
    assert (len(grid.pictures), list(grid.captions)) == (3, captions["caption"][:3].to_pylist())


def test_a_joined_table_is_shown_as_it_is(data: Dataset) -> None:
    frames = read_captions(str(data.frames), columns=["frame_id", "image"])
    joined = read_captions(str(data.captions)).join(frames, "frame_id").slice(0, 5)
    page = show(joined)._repr_html_()
    assert page.count("data:image/webp") == 5
    assert "similarity 0." in page


def test_captions_must_be_as_many_as_frames() -> None:
    with pytest.raises(SettingsError, match="1 frames and 2 captions"):
        show([None], ["а", "б"])


def run_notebook(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the notebook top to bottom; the text of all its outputs."""
    monkeypatch.setenv("NOTEBOOK_CAPTIONS", str(data.captions))
    monkeypatch.setenv("NOTEBOOK_FRAMES", str(data.frames))
    monkeypatch.setenv("NOTEBOOK_QUERY", "красный круг на траве")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    )
    client.execute()
    return str([output for cell in notebook.cells for output in cell.get("outputs", [])])


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel named python3 that is this interpreter, whatever the machine has installed."""
    spec = tmp_path / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    argv = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    spec.write_text(f'{{"argv": {argv}, "display_name": "Python 3", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))


@pytest.mark.usefixtures("kernel")
def test_the_example_notebook_runs_from_top_to_bottom(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FRAMECAP_CAPTIONER", raising=False)
    text = run_notebook(data, monkeypatch)
    assert "stderr" not in text
    assert "importance" in text
    assert "красный круг на траве" in text
    assert text.count("data:image/webp") == 8 + 8 + 3  # a sample, doubtful ones, the first of each video


@pytest.mark.usefixtures("kernel")
def test_the_example_notebook_ranks_frames_by_their_embeddings(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_captioner_dir: Path
) -> None:
    size = Captioner.from_pretrained(tiny_captioner_dir, device="cpu").encoder.config.embed_dim
    copy = Dataset(data.frames, tmp_path / "captions")
    shutil.copytree(data.captions, copy.captions)
    for path in sorted(p for p in copy.captions.rglob("*.parquet") if "_framecap" not in p.parts):
        table = pq.read_table(path)
        values = np.random.default_rng(1).normal(size=(len(table), size)).astype(np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size)
        rewrite(path, table.append_column("image_embedding", column))
    monkeypatch.setenv("FRAMECAP_CAPTIONER", str(tiny_captioner_dir))
    text = run_notebook(copy, monkeypatch)
    assert "representativeness" in text
    assert "relevance" in text


def test_the_example_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
