"""Everything a run needs to know before it starts, checked on the driver before any actor exists."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

import framecap
from framecap.errors import FramecapError, SettingsError, StorageError, StoreUnavailableError
from framecap.image_uris import FetchRules, allowed_places
from framecap.model.captioner_config import CONFIG_NAME, CaptionerConfig, check_options
from framecap.model.decode_options import DecodeOptions
from framecap.model.pictures import IMAGE_TRANSFORM_VERSION
from framecap.model.ruclip_layout import RuClipConfig
from framecap.pipeline.binding import bind_input
from framecap.pipeline.fragments import FOLDER
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.plan import fingerprint
from framecap.pipeline.publish import Places
from framecap.pipeline.read import ReadOptions
from framecap.pipeline.records import ActorOptions
from framecap.pipeline.settings import CaptionSettings
from framecap.pipeline.state import check_state, place_state
from framecap.ray_cluster import check_place_of_job
from framecap.schema import REUSE_ROWS, SCHEMA_VERSION, STATE_FOLDER, ExtraColumns, InputColumns, caption_schema
from framecap.settings import flag
from framecap.shards import Listing, check_places, fit_output, list_input, printable
from framecap.storage import (
    OPTIONS_VARIABLE,
    CaptionerCopy,
    absolute_uri,
    check_endpoint,
    exists,
    is_local,
    join,
    name_scheme,
    open_fs,
    storage_options,
    verified_copy,
)

_PLACES = ("input_uri", "output_uri", "state_uri", "input_moved_from", "captioner")


@dataclass(frozen=True)
class Resources:
    """What one actor takes, how many there may be, and how large its batches are. ``notice``: what the reader of the
    captions should know of the captioner, if anything."""

    num_gpus: float
    num_cpus: float
    reader_cpus: float
    actors: int
    min_actors: int
    batch_size: int
    notice: str | None = None


@dataclass(frozen=True)
class Job:
    """A checked run: settings, places, fingerprint, and the options of both stages."""

    settings: CaptionSettings
    run_id: str
    source: Listing
    captioner: str
    captioner_copy: CaptionerCopy
    resolution: int
    extra: ExtraColumns
    decode: DecodeOptions
    fingerprint: str
    state_uri: str
    storage: dict[str, object]
    image_places: tuple[str, ...] = ()
    batch_size: int = 64
    host: Host = THIS_HOST

    @property
    def output_uri(self) -> str:
        return self.settings.output_uri

    @property
    def lock_uri(self) -> str:
        return join(self.state_uri, "lock")

    @property
    def columns(self) -> InputColumns:
        return self.settings.columns

    @property
    def added(self) -> pa.Schema:
        return caption_schema(self.extra)

    @property
    def places(self) -> Places:
        return Places(
            self.source.root,
            self.output_uri,
            join(self.state_uri, FOLDER),
            self.columns,
            self.added,
            self.fingerprint,
        )

    @property
    def share_identical(self) -> bool:
        return not self.settings.do_sample  # samples differ from frame to frame, also of equal frames

    def check_captioner(self) -> str | None:
        """What the reader of the captions should know of the captioner, if anything (``CaptionerConfig.notice``).

        Raises ``CaptionerError`` or ``SettingsError`` if its config does not allow these options."""
        check_options(self.captioner_copy.folder, self.decode)
        return CaptionerConfig.from_file(self.captioner_copy.folder / CONFIG_NAME).notice

    def sized_for(self, resources: Resources) -> Job:
        return replace(self, batch_size=resources.batch_size)

    @property
    def chunk_rows(self) -> int:
        """Rows captioned together; whole blocks of ``REUSE_ROWS`` where captions are shared within such."""
        if self.settings.reuse_similarity is None:
            return self.batch_size
        return max(1, self.batch_size // REUSE_ROWS) * REUSE_ROWS

    def read_options(self) -> ReadOptions:
        s = self.settings
        return ReadOptions(
            root=self.source.root,
            columns=self.columns,
            resolution=self.resolution,
            seed=s.seed,
            decode=s.decode,
            limits=s.limits,
            fetch=FetchRules(self.image_places, s.max_image_bytes, s.fetch_timeout, s.fetch_retries),
            fetch_threads=s.fetch_threads,
            share_identical=self.share_identical,
        )

    def actor_options(self) -> ActorOptions:
        s = self.settings
        return ActorOptions(
            captioner=self.captioner,
            folder=self.places.fragments,
            fingerprint=self.fingerprint,
            decode=self.decode,
            device=s.device,
            dtype=s.dtype,
            threads=s.threads,
            batch_size=self.batch_size,
            similarity=s.similarity,
            extra=self.extra,
            share_identical=self.share_identical,
            reuse_similarity=s.reuse_similarity,
            manifest=hashlib.sha256(self.captioner_copy.manifest).hexdigest(),
        )


def prepare(settings: CaptionSettings, host: Host = THIS_HOST) -> Job:
    """Check everything that can be checked without work.

    Raises ``SettingsError``, ``CaptionerError`` or ``StorageError`` with one line that says the fix.
    """
    settings = with_absolute_places(settings)
    captioner = settings.captioner or str(Path(framecap.__file__).parent / "demo" / "mini")
    places = [settings.input_uri, settings.output_uri, captioner, *filter(None, [settings.state_uri])]
    if settings.storage_options:
        named = name_scheme(settings.storage_options, [*places, *settings.image_uri_allow])
        os.environ[OPTIONS_VARIABLE] = json.dumps(named)
    for place in places:
        check_endpoint(place)
    copy = _local_captioner(captioner)
    encoder = RuClipConfig.from_file(copy.folder / "encoder" / "config.json")
    _check_text_tower(settings, encoder, captioner)
    source = fit_output(list_input(settings.input_uri), settings.output_uri)
    check_places(source, settings.input_uri, settings.output_uri)
    if exists(join(source.root, STATE_FOLDER)):
        raise SettingsError(f"--input-uri {settings.input_uri} is an output of this job: it holds {STATE_FOLDER}/")
    _check_writable("--output-uri", settings.output_uri)
    state_uri = place_state(settings.output_uri, settings.state_uri, source)
    if state_uri != join(settings.output_uri, STATE_FOLDER):
        check_endpoint(state_uri)
        _check_writable("--state-uri", state_uri)
    check_state(settings.output_uri, state_uri)
    source = bind_input(source, settings.output_uri, state_uri, settings.input_moved_from)
    if settings.prune and not source.whole:
        raise SettingsError(f"--prune needs a whole folder as --input-uri; {settings.input_uri} is a part of one")
    decode = decode_options(settings)
    return Job(
        settings=settings,
        run_id=f"{host.date():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}",
        source=source,
        captioner=captioner,
        captioner_copy=copy,
        resolution=encoder.image_resolution,
        extra=_extra_columns(settings, encoder),
        decode=decode,
        fingerprint=fingerprint(copy.manifest, _deciding(settings, decode)),
        state_uri=state_uri,
        storage=storage_options(),
        image_places=allowed_places(source.root, settings.image_uri_allow),
        host=host,
    )


def with_absolute_places(settings: CaptionSettings) -> CaptionSettings:
    """The same settings with local places as paths that mean the same in a worker's folder.

    Raises ``SettingsError`` for an output below Ray's copy of the working directory, which Ray deletes.
    """
    for name in ("output_uri", "state_uri"):
        check_place_of_job(flag(name), getattr(settings, name))
    named = {name: getattr(settings, name) for name in _PLACES}
    places = {name: absolute_uri(uri) for name, uri in named.items() if uri}
    for name, uri in places.items():
        if printable(uri) != uri:
            raise SettingsError(f"{flag(name)} {printable(uri)} is not UTF-8; rename it, or give it through a link")
    return settings.model_copy(update=places)


def decode_options(settings: CaptionSettings) -> DecodeOptions:
    """The decode options among the settings; the names are the same."""
    return DecodeOptions(**{name: getattr(settings, name) for name in DecodeOptions.__dataclass_fields__})


def _deciding(settings: CaptionSettings, decode: DecodeOptions) -> dict[str, object]:
    """What decides the content of a caption shard, beside the captioner and the frames."""
    names = ("similarity", "image_embedding", "reuse_similarity", "decode", "max_pixels", "keep_columns")
    columns = ["id_column", "image_column", "image_uri_column"]
    if settings.reuse_similarity is not None:
        columns.append("video_column")
    special: dict[str, object] = {} if settings.reuse_similarity is None else {"reuse_rows": REUSE_ROWS}
    # Only where they are set: an output made before these settings existed keeps its fingerprint.
    special |= {name: value for name in ("caption_embedding", "query") if (value := getattr(settings, name))}
    if settings.dtype == "int8":  # the others give the same captions, to rounding
        special["dtype"] = "int8"
    return {
        **special,
        "schema": SCHEMA_VERSION,
        "image_transform": IMAGE_TRANSFORM_VERSION,
        "decode_options": decode.to_dict(),
        **{name: getattr(settings, name) for name in (*names, *columns)},
    }


def _extra_columns(settings: CaptionSettings, encoder: RuClipConfig) -> ExtraColumns:
    return ExtraColumns(
        candidates=settings.num_return_sequences > 1,
        image_embedding=encoder.embed_dim if settings.image_embedding else None,
        caption_embedding=encoder.embed_dim if settings.caption_embedding else None,
        queries=settings.query,
    )


def _check_text_tower(settings: CaptionSettings, encoder: RuClipConfig, captioner: str) -> None:
    """Raise ``SettingsError`` if texts are to be embedded by an encoder that cannot."""
    asked = "--caption-embedding" if settings.caption_embedding else "--query" if settings.query else None
    if asked and not encoder.transformer_layers:
        raise SettingsError(f"{asked} needs a ruCLIP with a text tower; the encoder of {captioner} has none")


def _local_captioner(captioner: str) -> CaptionerCopy:
    try:
        return verified_copy(captioner)
    except (FramecapError, FileNotFoundError):
        raise
    except Exception as error:  # every backend has errors of its own; the operator needs one line
        raise StorageError(f"--captioner {captioner} cannot be read: {error}") from error


def _check_writable(flag: str, uri: str) -> None:
    """Raise ``SettingsError`` if the folder cannot be written; writes nothing itself."""
    fs, path = open_fs(uri)
    if is_local(uri):
        place = Path(path)
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            what = "is not a folder" if not place.is_dir() else "is not writable"
            raise SettingsError(f"{flag} {uri} cannot be written: {place} {what}")
        return
    try:
        fs.ls(path)
    except FileNotFoundError:
        return
    except StoreUnavailableError:
        raise
    except Exception as error:  # see above
        raise SettingsError(f"{flag} {uri} cannot be reached: {error}") from error
