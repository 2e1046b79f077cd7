"""Reading: rows of a chunk stay beside their pieces, whatever becomes of one shard."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from framecap.pipeline.listing import mark_of
from framecap.pipeline.plan import Piece
from framecap.pipeline.read import ReadOptions, read_chunks
from framecap.schema import InputColumns


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
