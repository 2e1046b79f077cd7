"""``framecap pairs``: image–caption pairs in the forms people have → the Parquet that training reads.

Knows COCO's captions JSON, CSV and TSV with a path column, img2dataset's output (Parquet, webdataset tars) and
Parquet as Hugging Face's ``datasets`` writes it. Nothing is left out in silence: what is, is counted by reason.
Knows nothing of models or Ray.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import posixpath
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from framecap.errors import FrameError, SettingsError
from framecap.image_uris import fetch
from framecap.storage import join, open_fs, write_bytes_atomic

SCHEMA = pa.schema([("image", pa.binary()), ("caption", pa.list_(pa.string())), ("split", pa.string())])
# Where a form has no fixed names: the first of these that is there.
IMAGE_COLUMNS = (
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "path",
    "image_path",
    "file_name",
    "filename",
    "filepath",
    "file",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences", "raw", "translation")
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
_READ_ROWS = 64


@dataclass(frozen=True)
class PairOptions:
    """How the source is read.

    ``images``: folder that relative paths are below (None: the source's own). ``image_column``, ``caption_column``:
    None for the usual names. ``caption_field``: which value of a caption that is a struct, such as ``ru``.
    ``split``: written for all pairs (None: the source's own ``split`` column, if it has one).
    """

    images: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    caption_field: str | None = None
    split: str | None = None
    shard_mb: float = 256


@dataclass(frozen=True)
class RawPair:
    """One pair as a source holds it; ``problem`` says why it is left out, else None."""

    image: bytes | None
    captions: list[str]
    split: str | None = None
    problem: str | None = None


@dataclass
class PairsResult:
    """``pairs`` written to ``shards``; ``left_out``: reason → how many."""

    pairs: int = 0
    shards: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def write_pairs(source: str, out: str, options: PairOptions | None = None, progress: bool | None = None) -> PairsResult:
    """Read the pairs at ``source`` and write them as Parquet shards (``image``, ``caption``, ``split``) below ``out``.

    Raises:
        SettingsError: an unknown form, a missing column, a caption that is a struct without ``caption_field``, or
            ``out`` already holds shards.
    """
    options = options or PairOptions()
    fs, path = open_fs(out)
    if fs.exists(path) and any(name.endswith(".parquet") for name in fs.find(path)):
        raise SettingsError(f"--out {out} already holds shards; choose a new folder")
    result, rows, held = PairsResult(), [], 0
    silent = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(read_pairs(source, options), unit="pair", disable=silent) as pairs:
        for pair in pairs:
            problem = pair.problem or ("no caption" if not pair.captions else "no image" if not pair.image else None)
            if problem is not None:
                result.left_out[problem] += 1
                continue
            rows.append({"image": pair.image, "caption": pair.captions, "split": options.split or pair.split})
            held += len(pair.image or b"")
            result.pairs += 1
            if held >= options.shard_mb * 1_000_000:
                result.shards.append(_write_shard(out, len(result.shards), rows))
                rows, held = [], 0
    if rows:
        result.shards.append(_write_shard(out, len(result.shards), rows))
    return result


def _write_shard(out: str, number: int, rows: list[dict[str, Any]]) -> str:
    schema = SCHEMA if any(row["split"] for row in rows) else SCHEMA.remove(2)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, row_group_size=1000, compression="zstd")
    uri = join(out, f"pairs-{number:05d}.parquet")
    write_bytes_atomic(uri, sink.getvalue())
    return uri


def read_pairs(source: str, options: PairOptions) -> Iterator[RawPair]:
    """The pairs at ``source``, whichever form it has; see the module's docstring."""
    fs, path = open_fs(source)
    if not fs.exists(path):
        raise SettingsError(f"{source} does not exist")
    if fs.isfile(path):
        files = [path]
    else:
        files = sorted(name for name in fs.find(path) if not posixpath.basename(name).startswith((".", "_")))
        tars = [name for name in files if name.endswith(".tar")]  # img2dataset writes Parquet without pictures beside
        files = tars or [name for name in files if name.endswith(tuple(_FORMS))]
    if not files or not files[0].endswith(tuple(_FORMS)):
        raise SettingsError(f"{source} holds no pairs in a known form; known endings: {', '.join(_FORMS)}")
    base = source if fs.isdir(path) else posixpath.dirname(source)
    pictures = _Pictures(options.images or base or ".")
    for name in files:
        read = next(form for ending, form in _FORMS.items() if name.endswith(ending))
        try:
            with fs.open(name, "rb") as stream:
                yield from read(stream, name, options, pictures)
        except (pa.ArrowException, tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
            raise SettingsError(f"{name} cannot be read: {' '.join(str(error).split())[:300]}") from error


class _Pictures:
    """Pictures by a path below one folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def read(self, path: object) -> tuple[bytes | None, str | None]:
        """(bytes, None), or (None, why not)."""
        if not isinstance(path, str) or not path.strip():
            return None, "no image"
        found = fetch(path.strip().replace("\\", "/"), self.folder)
        if not isinstance(found, FrameError):
            return found, None
        reasons = {"not_allowed": "path outside the image folder", "missing": "image file is missing"}
        return None, reasons.get(found.kind, f"image file is {found.kind}")


def _read_coco(stream: Any, name: str, options: PairOptions, pictures: _Pictures) -> Iterator[RawPair]:
    """COCO's captions JSON: ``images`` with id and file_name, ``annotations`` with image_id and caption."""
    content = json.loads(stream.read().decode("utf-8-sig"))
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise SettingsError(f"{name} is not COCO's captions JSON: it lacks 'images' or 'annotations'")
    captions: dict[object, list[str]] = {}
    for annotation in content["annotations"]:
        found = captions_of(annotation.get("caption"), options.caption_field, name)
        captions.setdefault(annotation.get("image_id"), []).extend(found)
    for image in content["images"]:
        texts = captions.pop(image.get("id"), [])
        data, problem = pictures.read(image.get("file_name")) if texts else (None, None)
        yield RawPair(data, texts, problem=problem)
    for texts in captions.values():
        yield RawPair(None, texts, problem="captions of an image that is not listed")


def _read_table(stream: Any, name: str, options: PairOptions, pictures: _Pictures) -> Iterator[RawPair]:
    """CSV, or TSV by its ending, with a header; rows of one path are one pair."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    with io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter="\t" if name.lower().endswith(".tsv") else ",")
        image, caption = _columns(list(reader.fieldnames or ()), options, name)
        for row in reader:
            path = row[image] or ""
            captions.setdefault(path, []).extend(captions_of(row[caption], None, name))
            splits.setdefault(path, row.get("split"))
    for path, texts in captions.items():
        data, problem = pictures.read(path)
        yield RawPair(data, texts, splits[path], problem if texts else None)


def _read_parquet(stream: Any, name: str, options: PairOptions, pictures: _Pictures) -> Iterator[RawPair]:
    """img2dataset's and Hugging Face's Parquet: bytes, struct{bytes, path}, or a path."""
    file = pq.ParquetFile(stream)
    names = file.schema_arrow.names
    image, caption = _columns(names, options, name)
    wanted = [image, caption, *(column for column in ("split", "status") if column in names)]
    for batch in file.iter_batches(_READ_ROWS, columns=wanted):
        for row in batch.to_pylist():
            texts = captions_of(row[caption], options.caption_field, name)
            status = row.get("status")
            if isinstance(status, str) and status != "success":  # img2dataset's own
                yield RawPair(None, texts, problem=f"img2dataset: {status}")
                continue
            value = row[image]
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            data, problem = (value, None) if isinstance(value, bytes) else pictures.read(value)
            yield RawPair(data, texts, row.get("split"), problem if texts else None)


def _read_tar(stream: Any, name: str, options: PairOptions, pictures: _Pictures) -> Iterator[RawPair]:
    """A webdataset tar: members of one sample follow each other and share the name up to the first dot."""
    sample: dict[str, bytes] = {}
    key = None
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            if (folder, stem) != key and sample:
                yield _sample(sample, options, name)
                sample = {}
            key = (folder, stem)
            content = archive.extractfile(member)
            sample[ending.lower()] = content.read() if content is not None else b""
    if sample:
        yield _sample(sample, options, name)


def _sample(sample: dict[str, bytes], options: PairOptions, name: str) -> RawPair:
    """One sample of a webdataset: a picture, and its caption in ``txt`` or in ``json``."""
    image = next((sample[ending] for ending in _PICTURES if ending in sample), None)
    fields = json.loads(sample["json"]) if "json" in sample else {}
    value: object = sample["txt"].decode() if "txt" in sample and options.caption_column is None else None
    if value is None:
        column = next((c for c in _wanted(options.caption_column, CAPTION_COLUMNS) if c in fields), None)
        value = fields[column] if column is not None else None
    return RawPair(image, captions_of(value, options.caption_field, name), fields.get("split"))


def captions_of(value: object, caption_field: str | None, name: str) -> list[str]:
    """The captions that one value holds: a string, a list, a struct (its ``caption_field``), or a list of structs.

    Raises:
        SettingsError: a struct, and no ``caption_field`` or one that it lacks; ``name`` is the file in the message.
    """
    if isinstance(value, dict):
        if caption_field is None or caption_field not in value:
            known = ", ".join(sorted(map(str, value)))
            raise SettingsError(f"captions in {name} are structs of {known}; say which with --caption-field")
        value = value[caption_field]
    if isinstance(value, str):
        text = " ".join(value.split())
        return [text] if text else []
    if isinstance(value, list):
        return [text for part in value for text in captions_of(part, caption_field, name)]
    return []


def _columns(names: list[str], options: PairOptions, name: str) -> tuple[str, str]:
    """The image and the caption column. Raises SettingsError, with the columns there are."""
    found = []
    for kind, given, usual in (
        ("image", options.image_column, IMAGE_COLUMNS),
        ("caption", options.caption_column, CAPTION_COLUMNS),
    ):
        column = next((column for column in _wanted(given, usual) if column in names), None)
        if column is None:
            what = f"no column {given!r}" if given else f"no {kind} column that is known"
            raise SettingsError(f"{name} has {what}; give --{kind}-column, one of {', '.join(names)}")
        found.append(column)
    return found[0], found[1]


def _wanted(given: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    return usual if given is None else (given,)


Form = Callable[[Any, str, PairOptions, _Pictures], Iterator[RawPair]]
_FORMS: dict[str, Form] = {
    ".json": _read_coco,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``framecap pairs``."""
    parser.description = "Image-caption pairs in the forms people have become the Parquet that training reads."
    parser.epilog = "Exit code: 0 all pairs are written, 2 a place or setting is wrong, 3 some were left out (counted)."
    parser.add_argument(
        "source", metavar="SRC", help="COCO JSON, CSV, TSV, Parquet, webdataset tar, or a folder of Parquet or tars"
    )
    parser.add_argument("--out", required=True, metavar="URI", help="folder for the pairs")
    parser.add_argument("--images", metavar="DIR", help="folder that relative paths are below (default: beside SRC)")
    parser.add_argument("--image-column", metavar="NAME", help="column of bytes or paths (default: the usual names)")
    parser.add_argument("--caption-column", metavar="NAME", help="column of captions (default: the usual names)")
    parser.add_argument("--caption-field", metavar="NAME", help="where captions are structs: which value, such as ru")
    parser.add_argument("--split", metavar="NAME", help="split of all pairs (default: the split column, if there)")
    parser.add_argument("--shard-mb", type=float, default=256, metavar="MB", help="size of a shard (default: 256)")


def run(args: argparse.Namespace) -> int:
    """``framecap pairs``; 0, or 3 if pairs were left out."""
    options = PairOptions(
        args.images, args.image_column, args.caption_column, args.caption_field, args.split, args.shard_mb
    )
    result = write_pairs(args.source, args.out, options)
    print(f"{result.pairs:,} pairs in {len(result.shards):,} shard(s) under {args.out}")
    for reason, count in result.left_out.most_common():
        print(f"left out: {count:,} ({reason})", file=sys.stderr)
    return 3 if result.left_out else 0
