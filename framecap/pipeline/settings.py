"""Settings of the caption job: every flag of ``jobs/caption_frames.py`` is a field here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from framecap.model.picture_limits import DEFAULT_LIMITS, PictureLimits
from framecap.schema import InputColumns
from framecap.settings import JobSettings, Seconds, StringList, Texts


def _none_is_a_word(value: object) -> object:
    return ("none",) if value is None else value


class CaptionSettings(JobSettings):
    """What to caption, with what, how fast, and when to stop."""

    repeatable: ClassVar[frozenset[str]] = frozenset({"query"})
    headings: ClassVar[dict[str, str]] = {
        "input_uri": "input and output",
        "id_column": "columns read and written",
        "num_beams": "decoding",
        "device": "devices, actors and readers",
        "dry_run": "this run",
        "lock_expiry": "lock and cluster",
    }

    input_uri: str = Field(description="frame shards: a Parquet file, a folder (recursive) or a glob")
    output_uri: str = Field(description="folder of the caption shards; state goes to its _framecap/")
    state_uri: str | None = Field(
        None, description="folder for the state instead, so that OUT is Parquet only (none: where OUT has it)"
    )
    input_moved_from: str | None = Field(
        None, description="the input that OUT belongs to, if it was moved to --input-uri (else OUT is refused)"
    )
    captioner: str | None = Field(None, description="captioner directory or URI (none: the bundled mini)")

    id_column: str = Field("frame_id", description="input column that names a frame")
    image_column: str = Field("image", description="input column with encoded bytes or struct{bytes, path}")
    image_uri_column: str = Field("image_uri", description="input column with URIs of the pictures")
    keep_columns: Annotated[StringList, BeforeValidator(_none_is_a_word)] = Field(
        ("all",), description="input columns to carry over: all (but the image), none, or a,b,c"
    )
    similarity: bool = Field(True, description="ruCLIP cosine between frame and caption, per row")
    image_embedding: bool = Field(False, description="add the frame's embedding as a column")
    caption_embedding: bool = Field(False, description="add the caption's embedding as a column")
    query: Texts = Field((), description="add the frame's cosine with this text as a column; may be repeated")
    reuse_similarity: float | None = Field(
        None, gt=0, le=1, description="share a caption between near frames of a video above this cosine"
    )
    video_column: str = Field("video_id", description="input column that --reuse-similarity groups by")

    num_beams: int = Field(1, ge=1, description="beams; 1 is greedy")
    length_penalty: float = Field(1.0, description="beam search: above 0 prefers longer captions")
    num_return_sequences: int = Field(1, ge=1, description="candidates per frame; more adds a column")
    do_sample: bool = Field(False, description="sample instead of taking the likeliest token")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_k: int = Field(50, ge=0, description="sampling: only the k likeliest tokens; 0 is all")
    top_p: float = Field(1.0, gt=0, le=1, description="sampling: the smallest set of this probability")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 discourages repeated tokens")
    no_repeat_ngram_size: int = Field(0, ge=0, description="no n-gram twice in a caption; 0 is off")
    max_new_tokens: int = Field(40, ge=1, description="longest caption in tokens")
    stop: StringList = Field((), description="strings that end a caption, in place of the captioner's own")
    seed: int = Field(0, description="sampling: each frame's seed follows from this and its id")
    rerank: bool = Field(False, description="choose among the candidates by similarity")

    device: str = Field("auto", description="auto, cpu or cuda")
    dtype: Literal["auto", "float16", "bfloat16", "float32", "int8"] = Field(
        "auto", description="auto (fp16 on a GPU, else fp32), float16, bfloat16, float32, int8 (weights; CPU only)"
    )
    num_gpus: float | None = Field(None, ge=0, description="GPUs per actor, may be a fraction (none: auto)")
    num_cpus: float | None = Field(None, gt=0, description="CPUs per actor (none: 1 with a GPU, else 0.75)")
    min_actors: int = Field(1, ge=1, description="caption actors to start with")
    max_actors: int | None = Field(None, ge=1, description="caption actors at most (none: all that fit)")
    threads: int = Field(1, ge=1, description="torch threads of an actor on the CPU")
    batch_size: int | None = Field(None, ge=1, description="frames per batch (none: 1024 GPU, 64 CPU)")
    decode: Literal["exact", "fast"] = Field("exact", description="exact pixels, or the JPEG decoder's scaling")
    max_pixels: int = Field(DEFAULT_LIMITS.max_pixels, ge=1, description="larger pictures are refused")
    max_image_bytes: int = Field(DEFAULT_LIMITS.max_bytes, ge=1, description="larger files of one picture are refused")
    max_decode_bytes: int = Field(
        DEFAULT_LIMITS.max_held_bytes, ge=1, description="pictures that take more memory to decode are refused"
    )
    decode_timeout: Seconds = Field(
        DEFAULT_LIMITS.seconds, gt=0, description="a picture that takes longer to decode is an error of its row"
    )
    image_uri_allow: StringList = Field(
        (), description="folders and s3://bucket/… that image_uri may name (none: where IN is, its folder or bucket)"
    )
    fetch_timeout: Seconds = Field(60.0, gt=0, description="seconds to fetch one picture, retries included")
    fetch_threads: int = Field(8, ge=1, description="parallel fetches of image_uri per reader")
    fetch_retries: int = Field(3, ge=0, description="repeated tries of a fetch that failed")

    dry_run: bool = Field(False, description="print the plan and an estimate, write nothing")
    limit: int | None = Field(None, ge=1, description="caption at most this many shards, in path order")
    retry_errors: bool = Field(False, description="retry the rows that failed in earlier runs")
    prune: bool = Field(False, description="delete caption shards whose frame shard is gone")
    time_budget: Seconds | None = Field(None, gt=0, description="shut down cleanly after 90, 30m or 7.5h")
    max_error_rate: float = Field(0.2, ge=0, le=1, description="stop when a larger share of the rows fails")
    lock_expiry: Seconds = Field(120.0, gt=1, description="a lock without a heartbeat for this long is stale")
    no_progress_timeout: Seconds = Field(900.0, gt=0, description="fail after this long without progress")
    ray_address: str | None = Field(
        None, description="cluster to join, or local (none: RAY_ADDRESS, else one of `ray start` here, else a new one)"
    )

    @model_validator(mode="after")
    def _check(self) -> CaptionSettings:
        if "all" in self.keep_columns and len(self.keep_columns) > 1:
            raise ValueError("--keep-columns is all, none, or a list of columns, not a mixture")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError("--num-return-sequences needs as many --num-beams, or --do-sample")
        if not all(text.strip() for text in self.query):
            raise ValueError("--query is empty; say what to look for")
        return self

    @property
    def columns(self) -> InputColumns:
        """The input columns by meaning."""
        keep = None if self.keep_columns == ("all",) else self.keep_columns
        keep = () if keep == ("none",) else keep
        video = self.video_column if self.reuse_similarity is not None else None
        return InputColumns(self.id_column, self.image_column, self.image_uri_column, keep, video)

    @property
    def limits(self) -> PictureLimits:
        """What one picture may cost."""
        return PictureLimits(self.max_pixels, self.max_image_bytes, self.max_decode_bytes, self.decode_timeout)
