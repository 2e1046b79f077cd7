"""Reading: rows of a chunk stay beside their pieces, whatever becomes of one shard."""

import io
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from framecap.errors import FrameError
from framecap.image_uris import fetch
from framecap.pipeline.plan import Piece
from framecap.pipeline.read import ReadOptions, read_chunks
from framecap.schema import InputColumns
from framecap.shards import mark_of


def _picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(stream, "PNG")
    return stream.getvalue()


def _write(path: Path, shades: list[int]) -> None:
    table = pa.table({"frame_id": [str(s) for s in shades], "image": [_picture(s) for s in shades]})
    pq.write_table(table, path, row_group_size=2, compression="zstd", use_dictionary=False)


def test_a_shard_that_breaks_half_way_leaves_no_rows_for_its_neighbour(tmp_path: Path) -> None:
    _write(tmp_path / "bad.parquet", [10, 11, 12, 13, 14, 15])
    _write(tmp_path / "good.parquet", [20, 21])
    second = pq.ParquetFile(tmp_path / "bad.parquet").metadata.row_group(1).column(1)
    data = bytearray((tmp_path / "bad.parquet").read_bytes())
    start = second.data_page_offset
    data[start : start + second.total_compressed_size] = b"\xab" * second.total_compressed_size
    (tmp_path / "bad.parquet").write_bytes(data)
    rows = [("bad.parquet", 0, 1), ("bad.parquet", 2, 3), ("bad.parquet", 4, 5), ("good.parquet", 0, 2)]
    chunk = tuple(Piece(name, mark_of(str(tmp_path / name)), *span) for name, *span in rows)
    options = ReadOptions(str(tmp_path), InputColumns(), resolution=8, seed=0)

    [(frames, pixels)] = read_chunks((chunk,), options)

    assert list(frames.failed) == ["bad.parquet"]
    assert [int(pixels[slot, 0, 0, 0]) for slot in frames.slots] == [20, 21]


def test_nobody_waits_after_the_last_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("framecap.pipeline.read.time.sleep", waits.append)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no shard PAR1")
    chunk = (Piece("bad.parquet", mark_of(str(tmp_path / "bad.parquet")), 0, 2),)
    [(frames, _)] = read_chunks((chunk,), ReadOptions(str(tmp_path), InputColumns(), resolution=8, seed=0))
    assert list(frames.failed) == ["bad.parquet"]
    assert len(waits) == 2, "three tries"


def test_memory_follows_the_batch_and_not_the_row_group(tmp_path: Path) -> None:
    """One row group of 96 MB, in pages of 3 MB as a writer of large values leaves them."""
    rows, path = 480, tmp_path / "large.parquet"
    tail = random.Random(0).randbytes(200_000)  # decoders stop at the end of the picture
    table = pa.table({"frame_id": range(rows), "image": [_picture(row % 256) + tail for row in range(rows)]})
    pq.write_table(table, path, row_group_size=rows, write_batch_size=16, use_dictionary=False)
    del table
    chunks = tuple((Piece(path.name, mark_of(str(path)), start, start + 48),) for start in range(0, rows, 48))
    options = ReadOptions(str(tmp_path), InputColumns(), resolution=8, seed=0)

    pool, seen = pa.default_memory_pool(), 0
    before, most = pool.bytes_allocated(), 0
    for frames, _ in read_chunks(chunks, options):
        most = max(most, pool.bytes_allocated() - before)
        seen += frames.rows()

    assert seen == rows
    assert most < 30e6


class Flaky(MemoryFileSystem):
    """A store that answers every second request only."""

    protocol = "flaky"
    requests = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        Flaky.requests += 1
        if Flaky.requests % 2:
            raise ConnectionResetError("try again")
        return bytes(super().cat_file(path, start, end))


@pytest.mark.parametrize(("retries", "kind"), [(1, None), (0, "missing")])
def test_a_picture_is_fetched_again_when_its_store_fails(
    retries: int, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "requests", 0)
    Flaky().pipe_file("/store/a.png", _picture(7))
    found = fetch("flaky://store/a.png", "flaky://store", retries)
    assert (found.kind if isinstance(found, FrameError) else None) == kind
