"""For notebooks: caption shards as one table, frames with their captions as a grid.

Knows nothing of Ray or models.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image
from pyarrow.fs import FSSpecHandler, PyFileSystem

from framecap import schema
from framecap.errors import FrameError, SettingsError
from framecap.image_uris import FetchRules, allowed_places, fetch
from framecap.model.decoder_process import shared_decoder
from framecap.model.pictures import open_frame
from framecap.row_values import rows_of, values_of
from framecap.shards import list_input
from framecap.storage import join, open_fs


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
    arrow_fs = PyFileSystem(FSSpecHandler(fs))
    paths = {open_fs(join(listing.root, shard))[1]: shard for shard in listing.marks}
    fragments = ds.dataset(list(paths), format="parquet", filesystem=arrow_fs).get_fragments()
    schemas = {fragment.path: fragment.physical_schema.remove_metadata() for fragment in fragments}
    known = list(dict.fromkeys(name for own in schemas.values() for name in own.names))
    if unknown := [name for name in columns or () if name not in known]:
        raise SettingsError(f"no column {unknown[0]!r} in {uri}; it has {', '.join(known)}")
    wanted = known if columns is None else list(columns)
    unified = pa.schema([_common_field(name, {paths[path]: own for path, own in schemas.items()}) for name in wanted])
    tables = []
    for own, group in groupby(schemas, key=lambda path: schemas[path]):
        lacking = [_first_field(name, schemas.values()) for name in known if name not in own.names]
        data = ds.dataset(list(group), pa.schema([*own, *lacking]), format="parquet", filesystem=arrow_fs)
        if filter is not None and _without_views(own) != own:  # Arrow filters no views
            whole = data.to_table()
            tables.append(whole.cast(_without_views(whole.schema)).filter(filter).select(wanted).cast(unified))
        else:
            tables.append(data.to_table(columns=wanted, filter=filter).cast(unified))
    return pa.concat_tables(tables)


def _without_views(own: pa.Schema) -> pa.Schema:
    kinds = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return pa.schema([field.with_type(kinds.get(field.type, field.type)) for field in own])


def _first_field(name: str, schemas: Iterable[pa.Schema]) -> pa.Field:
    return next(own.field(name) for own in schemas if name in own.names).with_nullable(True)


def _common_field(name: str, schemas: dict[str, pa.Schema]) -> pa.Field:
    """A type that holds column ``name`` of every shard: writers differ in text (string, large_string, string_view,
    dictionaries), binaries and widths. Raises ``SettingsError`` if there is none."""
    kinds = {own.field(name).type: shard for shard, own in schemas.items() if name in own.names}
    there = [kind for kind in kinds if not pa.types.is_null(kind)]
    if len(there) < 2:
        return pa.field(name, there[0] if there else pa.null())
    if all(map(schema.is_text, there)):
        return pa.field(name, pa.large_string())
    if all(map(schema.is_binary, there)):
        return pa.field(name, pa.large_binary())
    try:
        alone = [pa.schema([pa.field(name, kind)]) for kind in there]
        return pa.unify_schemas(alone, promote_options="permissive").field(0)
    except pa.ArrowException:
        named = " and ".join(f"{kind} in {kinds[kind]}" for kind in there[:2])
        raise SettingsError(
            f"column {name!r} is {named}; leave it out of columns=[…], or read these shards apart"
        ) from None


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


def show(
    frames: Iterable[Any] | pa.Table,
    captions: Iterable[Any] | pa.Table | None = None,
    width: int = 200,
    allow: Sequence[str] = (),
) -> Grid:
    """A grid of ``frames`` with ``captions`` below them, ``width`` CSS pixels a cell at least.

    ``frames`` are encoded bytes, paths, URIs, PIL pictures or uint8 arrays ``[H, W, 3]``; ``captions`` strings or
    `framecap.Caption` objects; either may be a column of a table. Or one table of frames joined to captions, with
    columns ``image`` and ``caption``. Strings may come out of somebody's table, so they name pictures below the
    current folder, or below the folders and prefixes of ``allow`` (``["s3://archive/"]``) instead; a `pathlib.Path`
    may be anywhere. What cannot be shown is a gap with the reason below it.

    Raises:
        SettingsError: as many captions as frames are needed, or a table lacks its columns.
    """
    if isinstance(frames, pa.Table):
        captions = frames if captions is None else captions
        frames = _column(frames, "image")
    notes: list[str] = []
    if isinstance(captions, pa.Table):
        notes = [_note(row) for row in rows_of(captions)]
        captions = _column(captions, "caption")
    frames = values_of(frames) if isinstance(frames, pa.Array | pa.ChunkedArray) else frames
    captions = values_of(captions) if isinstance(captions, pa.Array | pa.ChunkedArray) else captions
    rules = FetchRules(allowed_places(".", allow, "allow"), retries=0)
    shown = [_data_uri(frame, width * 2, rules) for frame in frames]
    pictures = [picture for picture, _ in shown]
    captions = [""] * len(pictures) if captions is None else captions
    words = [str(getattr(caption, "text", caption) or "") for caption in captions]
    if len(words) != len(pictures):
        raise SettingsError(f"{len(pictures)} frames and {len(words)} captions; give one caption per frame")
    notes = notes or [""] * len(words)
    reasons = [" · ".join(filter(None, pair)) for pair in zip((reason for _, reason in shown), notes, strict=True)]
    return Grid(tuple(pictures), tuple(words), tuple(reasons), width)


def _column(table: pa.Table, name: str) -> list[Any]:
    if name not in table.column_names:
        raise SettingsError(f"no column {name!r} to show; the table has {', '.join(table.column_names)}")
    return values_of(table[name])


def _note(row: dict[str, Any]) -> str:
    """Status where it is not ok, similarity, id."""
    status, similarity = row.get("caption_status"), row.get("caption_similarity")
    parts = [status if status not in (None, schema.STATUS_OK) else None, row.get("caption_error")]
    parts += [None if similarity is None else f"similarity {similarity:.2f}", row.get("frame_id")]
    return " · ".join(str(part) for part in parts if part is not None)


def _data_uri(frame: Any, side: int, rules: FetchRules) -> tuple[str | None, str]:
    """(a small WebP of one frame, nothing), or (None, why not: nothing for a null), which the grid shows as a gap."""
    if isinstance(frame, dict):
        frame = frame.get("bytes") or frame.get("path")
    if frame is None:
        return None, ""
    if isinstance(frame, str):
        frame = fetch(frame, str(Path.cwd()), rules=rules)
    try:
        if isinstance(frame, FrameError):
            raise frame
        if isinstance(frame, Image.Image):
            picture = frame.convert("RGB")
        elif isinstance(frame, bytes):
            picture = Image.fromarray(shared_decoder().fit_within(frame, side))
        else:
            picture = open_frame(frame if isinstance(frame, Path) else np.asarray(frame))
    except FrameError as error:
        return None, str(error)
    picture.thumbnail((side, side))
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=70)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode(), ""


def _cell(picture: str | None, caption: str, note: str) -> str:
    image = (
        f'<img src="{picture}" alt="" style="{_BOX};width:100%;object-fit:contain;display:block">'
        if picture
        else f'<div style="{_BOX}"></div>'
    )
    small = f'<div style="opacity:.65;font-size:85%">{html.escape(note)}</div>' if note else ""
    return f'<div>{image}<div lang="ru" style="margin-top:4px">{html.escape(caption)}</div>{small}</div>'
