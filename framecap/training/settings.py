"""Settings of the training job and of the evaluation job (flags, ``FRAMECAP_*``, YAML)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from framecap.model.bridge import BRIDGES
from framecap.settings import JobSettings, Seconds, StringList


class TrainSettings(JobSettings):
    """What ``jobs/train_captioner.py`` needs; ``out`` receives the captioner and, below it, nothing else."""

    encoder: str = Field(description="ruCLIP checkpoint: folder or URI of one")
    decoder: str = Field(description="ruGPT3 checkpoint in the transformers layout: folder or URI")
    pairs: str = Field(
        description="Parquet file, folder or glob with image, caption and optional split; with --train-on text also "
        "text files, one sentence a line"
    )
    out: str = Field(description="captioner directory to write, a folder or URI that does not exist yet")
    work_dir: str = Field(
        "", description="folder on a disk that all nodes see, for features, checkpoints and curves; default OUT.run"
    )

    image_column: str = Field("image", description="column of encoded images: bytes, {bytes, path}, or URIs")
    caption_column: str = Field("caption", description="column of captions, text or list of texts; a.b is field b")
    split_column: str = Field("split", description="column that says train or validation, if it is there")
    train_split: str = Field("train", description="value of split for training")
    validation_split: str = Field("validation", description="value of split for validation (val and dev too)")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="without a split column: share of images held out for validation"
    )
    image_uri_allow: StringList = Field(
        (), description="folders and s3://bucket/… where image may name pictures (none: beside and below its file)"
    )
    fetch_timeout: Seconds = Field(60.0, gt=0, description="seconds to fetch one picture that is named")
    max_bad_pairs: float = Field(
        0.05, ge=0, le=1, description="largest share of pairs without caption or decodable image"
    )

    train_on: Literal["pairs", "text"] = Field(
        "pairs", description="text: captions alone; the encoder's text tower gives the features (CapDec)"
    )
    noise_variance: float | None = Field(
        None,
        ge=0,
        description="text: variance of each feature's noise; default: from --gap-pairs, else CapDec's 0.016",
    )
    gap_pairs: str = Field("", description="text: a few pairs (Parquet) that show how far images lie from their texts")
    center: bool = Field(False, description="text: subtract the mean of images and of texts; needs --gap-pairs")

    bridge: Literal["mlp", "linear", "transformer", "cross_attention"] = Field("mlp", description="kind of bridge")
    prefix_length: int = Field(10, ge=1, description="prefix embeddings (all bridges but cross_attention)")
    clip_length: int = Field(10, ge=1, description="transformer bridge: tokens made of the features")
    bridge_layers: int = Field(8, ge=1, description="transformer bridge: layers")
    bridge_heads: int = Field(8, ge=1, description="transformer bridge: attention heads")
    normalize_features: bool = Field(False, description="scale features to length 1 first")
    train: Literal["bridge", "bridge+decoder"] = Field("bridge", description="what is trained")

    epochs: float = Field(10, gt=0, description="passes over the pairs, unless steps is given")
    steps: int = Field(0, ge=0, description="optimiser steps; 0: from epochs")
    batch_size: int = Field(64, ge=1, description="captions per optimiser step, all workers together")
    accumulate: int = Field(1, ge=1, description="passes that make up one batch, per worker")
    learning_rate: float = Field(2e-4, gt=0, description="of the bridge, at the end of warm-up")
    decoder_learning_rate: float = Field(0.0, ge=0, description="of the decoder; 0: same as the bridge")
    min_learning_rate: float = Field(0.0, ge=0, le=1, description="where the cosine ends, as share of the peak")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on matrices only")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    max_tokens: int = Field(0, ge=0, description="where captions are cut; 0: the decoder's positions")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 or fp16 on a GPU")
    seed: int = Field(0, description="of weights, order and choice of caption")

    validate_every: int = Field(0, ge=0, description="steps between validations; 0: an epoch, 50 at least")
    patience: int = Field(5, ge=0, description="validations without gain before stopping; 0: never")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints; 0: an epoch, 50 at least")
    log_every: int = Field(10, ge=1, description="steps between progress lines and rows of the curve")

    workers: int = Field(1, ge=1, description="Ray Train workers")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs per worker")
    max_failures: int = Field(2, ge=0, description="times that lost workers are replaced before giving up")
    node_timeout: float = Field(900, gt=0, description="seconds that an autoscaler gets to add the nodes for workers")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where training runs; say cuda where GPU nodes are yet to be added"
    )
    encode_batch_size: int = Field(64, ge=1, description="images per pass through the frozen encoder")
    ray_address: str = Field("", description="Ray cluster; default: the one we are in, else a local one")

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.bridge not in BRIDGES:
            raise ValueError(f"bridge {self.bridge!r} is unknown; known: {', '.join(BRIDGES)}")
        if self.train_on == "text" and self.bridge == "cross_attention":
            raise ValueError("--train-on text needs a bridge over pooled features: mlp, linear or transformer")
        if self.train_on == "pairs" and (self.noise_variance is not None or self.gap_pairs or self.center):
            raise ValueError("--noise-variance, --gap-pairs and --center need --train-on text; add it or drop them")
        if self.center and not self.gap_pairs:
            raise ValueError("--center needs --gap-pairs, from which the means are measured")
        share = self.workers * self.accumulate
        if self.batch_size % share:
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of workers x accumulate = {share}")
        return self

    @property
    def run_dir(self) -> str:
        """Where features, checkpoints and curves go."""
        return self.work_dir or self.out.rstrip("/") + ".run"


class EvaluateSettings(JobSettings):
    """What ``jobs/evaluate_captions.py`` needs."""

    captions: str = Field(description="caption dataset: Parquet file, folder or glob")
    references: str = Field(description="references: Parquet or JSONL with frame_id and one or several texts")
    against: str = Field("", description="second caption dataset on the same references, to compare with")
    captioner: str = Field("", description="captioner whose ruCLIP scores captions against references and frames")
    frames: str = Field("", description="frame shards: with --captioner, similarity is computed anew")
    output: str = Field("", description="JSON report to write")

    id_column: str = Field("frame_id", description="column that names the frame")
    caption_column: str = Field("caption", description="column of captions; a.b is field b of column a")
    reference_column: str = Field("", description="default: references, reference, captions or caption; a.b is field b")
    image_column: str = Field("image", description="column of frames with encoded images")

    examples: int = Field(5, ge=0, description="worst and best captions shown")
    bootstrap_samples: int = Field(1000, ge=1, description="resamples of the frames for --against")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the interval for --against")
    seed: int = Field(0, description="of the resampling")
    device: str = Field("auto", description="device of --captioner")
    batch_size: int = Field(64, ge=1, description="frames or texts per pass of --captioner")

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSettings:
        if self.frames and not self.captioner:
            raise ValueError("--frames needs --captioner, whose ruCLIP compares them with the captions")
        return self
