"""For notebooks: caption shards as one table, frames with their captions as a grid.

Knows nothing of Ray or models.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image
from pyarrow.fs import FSSpecHandler, PyFileSystem

from framecap import schema
from framecap.errors import SettingsError
from framecap.shards import list_input
from framecap.storage import join, open_fs, read_bytes


def read_captions(uri: str, columns: Sequence[str] | None = None, filter: pc.Expression | None = None) -> pa.Table:
    """The rows of all shards at ``uri`` (folder, file or glob) in shard order; ``.to_pandas()`` is one call away.

    ``columns`` are the ones to read (default: all), ``filter`` is a pyarrow expression over any column, such as
    ``pc.field("caption_similarity") < 0.2``; both spare reading what is not wanted. Frame shards are read by
    the same call. Shards whose columns differ are read together: what a shard lacks is null.

    Raises:
        SettingsError: no shards at ``uri``, or a column that none of them has.
    """
    listing = list_input(uri, "the URI")
    fs, _ = open_fs(listing.root)
    paths = [open_fs(join(listing.root, shard))[1] for shard in listing.marks]
    fragments = ds.dataset(paths, format="parquet", filesystem=PyFileSystem(FSSpecHandler(fs)))
    unified = pa.unify_schemas([fragment.physical_schema for fragment in fragments.get_fragments()])
    data = fragments.replace_schema(unified.remove_metadata())
    if unknown := [name for name in columns or () if name not in unified.names]:
        raise SettingsError(f"no column {unknown[0]!r} in {uri}; it has {', '.join(unified.names)}")
    return data.to_table(columns=None if columns is None else list(columns), filter=filter)


_BOX = "aspect-ratio:16/9;background:#8883;border-radius:4px"  # of every picture: upright ones break no row


@dataclass(frozen=True)
class Grid:
    """Pictures with captions below, as Jupyter shows them."""

    pictures: tuple[str | None, ...]
    captions: tuple[str, ...]
    notes: tuple[str, ...]
    width: int

    def _repr_html_(self) -> str:
        """What Jupyter displays; pictures are within, so that a saved notebook keeps them."""
        return (
            f'<div style="display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax({self.width}px,1fr))">'
            + "".join(map(_cell, self.pictures, self.captions, self.notes))
            + "</div>"
        )

    def __repr__(self) -> str:
        return "\n".join(
            f"{caption}  [{note}]" if note else caption for caption, note in zip(self.captions, self.notes, strict=True)
        )


def show(frames: Iterable[Any] | pa.Table, captions: Iterable[Any] | pa.Table | None = None, width: int = 200) -> Grid:
    """A grid of ``frames`` with ``captions`` below them, ``width`` CSS pixels a cell at least.

    ``frames`` are encoded bytes, paths, URIs, PIL pictures or uint8 arrays ``[H, W, 3]``; ``captions`` strings or
    `framecap.Caption` objects; either may be a column of a table. Or one table of frames joined to captions, with
    columns ``image`` and ``caption``.

    Raises:
        SettingsError: as many captions as frames are needed, or a table lacks its columns.
    """
    if isinstance(frames, pa.Table):
        captions = frames if captions is None else captions
        frames = _column(frames, "image")
    notes: list[str] = []
    if isinstance(captions, pa.Table):
        notes = [_note(row) for row in captions.to_pylist()]
        captions = _column(captions, "caption")
    frames = frames.to_pylist() if isinstance(frames, pa.Array | pa.ChunkedArray) else frames
    captions = captions.to_pylist() if isinstance(captions, pa.Array | pa.ChunkedArray) else captions
    pictures = [_data_uri(frame, width * 2) for frame in frames]
    captions = [""] * len(pictures) if captions is None else captions
    words = [str(getattr(caption, "text", caption) or "") for caption in captions]
    if len(words) != len(pictures):
        raise SettingsError(f"{len(pictures)} frames and {len(words)} captions; give one caption per frame")
    return Grid(tuple(pictures), tuple(words), tuple(notes or [""] * len(words)), width)


def _column(table: pa.Table, name: str) -> list[Any]:
    if name not in table.column_names:
        raise SettingsError(f"no column {name!r} to show; the table has {', '.join(table.column_names)}")
    values: list[Any] = table[name].to_pylist()
    return values


def _note(row: dict[str, Any]) -> str:
    """Status where it is not ok, similarity, id."""
    status, similarity = row.get("caption_status"), row.get("caption_similarity")
    parts = [status if status not in (None, schema.STATUS_OK) else None, row.get("caption_error")]
    parts += [None if similarity is None else f"similarity {similarity:.2f}", row.get("frame_id")]
    return " · ".join(str(part) for part in parts if part is not None)


def _data_uri(frame: Any, side: int) -> str | None:
    """A small WebP of one frame; None for a null or what is no picture, which the grid shows as a gap."""
    if isinstance(frame, dict):
        frame = frame.get("bytes") or frame.get("path")
    if frame is None:
        return None
    try:
        if isinstance(frame, Image.Image):
            picture = frame.convert("RGB")
        elif hasattr(frame, "__array__"):
            picture = Image.fromarray(frame).convert("RGB")
        else:
            data = frame if isinstance(frame, bytes) else read_bytes(frame)
            picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None
    picture.thumbnail((side, side))
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=70)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def _cell(picture: str | None, caption: str, note: str) -> str:
    image = (
        f'<img src="{picture}" alt="" style="{_BOX};width:100%;object-fit:contain;display:block">'
        if picture
        else f'<div style="{_BOX}"></div>'
    )
    small = f'<div style="opacity:.65;font-size:85%">{html.escape(note)}</div>' if note else ""
    return f'<div>{image}<div lang="ru" style="margin-top:4px">{html.escape(caption)}</div>{small}</div>'
