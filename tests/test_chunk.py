"""Captions of a chunk: batches that break, frames that share a caption, chunks that are worked on at once."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from framecap.model.captioner import Caption, unit
from framecap.model.decode_options import DecodeOptions
from framecap.model.ruclip import ImageFeatures
from framecap.model.shared import Seconds
from framecap.pipeline.chunk import Captioned, ChunkCaptioner
from framecap.pipeline.read import ChunkFrames
from framecap.pipeline.records import ActorOptions
from framecap.schema import REUSED_IDENTICAL, ExtraColumns

EMBEDDED = ExtraColumns(image_embedding=1)


class Fragile:
    """A captioner whose memory holds ``most`` frames, and which fails on a picture that starts with 255 when it is
    encoded, and on one that starts with 254 when its caption is made."""

    has_text = False

    def __init__(self, most: int, poison: str = "this frame is poison") -> None:
        self.most, self.poison = most, poison
        self.encoded: list[int] = []
        self.captioned: list[int] = []

    def features(self, pixels: np.ndarray, seconds: Seconds) -> ImageFeatures:
        self.encoded.append(len(pixels))
        self._bear(pixels[:, 0, 0, :1], 255)
        first = torch.from_numpy(pixels[:, 0, 0, :1].astype(np.float32))
        return ImageFeatures(first, first[:0, None])

    def embeddings(self, features: Sequence[ImageFeatures], seconds: Seconds) -> np.ndarray:
        return unit(ImageFeatures.join(features).pooled)

    def caption_features(
        self, features: Sequence[ImageFeatures], seeds: Sequence[int], seconds: Seconds
    ) -> list[Caption]:
        self.captioned.append(len(seeds))
        values = ImageFeatures.join(features).pooled.numpy()
        self._bear(values, 254)
        return [Caption(str(int(value))) for value in values[:, 0]]

    def _bear(self, values: np.ndarray, poison: int) -> None:
        if len(values) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (values == poison).any():
            raise ValueError(self.poison)


def fragile(most: int = 100, poison: str = "this frame is poison", **options: Any) -> tuple[ChunkCaptioner, Fragile]:
    """A captioner of chunks with a ``Fragile`` captioner; ``options``: of ``ActorOptions``."""
    captioner = Fragile(most, poison)
    shared: Any = captioner
    return ChunkCaptioner(shared, ActorOptions("", "", "f", DecodeOptions(), batch_size=16, **options)), captioner


def caption(chunks: ChunkCaptioner, values: Sequence[int], group: str | None = None) -> Captioned:
    """What is made of a chunk with a picture for each of ``values``."""
    count = len(values)
    pixels = np.stack([np.full((8, 8, 3), value, np.uint8) for value in values])
    digests = [bytes([value]) for value in values]
    frames = ChunkFrames((), list(range(count)), [0] * count, digests, groups=[group] * count)
    return chunks.caption(frames, pixels, {})


def test_a_batch_that_does_not_fit_is_halved_and_later_ones_start_smaller() -> None:
    chunks, captioner = fragile(most=5, share_identical=False)
    captions = caption(chunks, range(16)).captions
    assert [caption.text for caption in captions] == [str(value) for value in range(16)]
    captioner.encoded.clear()
    caption(chunks, range(16))
    assert captioner.encoded == captioner.captioned[-4:] == [4, 4, 4, 4]


@pytest.mark.parametrize("poison", [254, 255], ids=["captioned", "encoded"])
@pytest.mark.parametrize("options", [{}, {"extra": EMBEDDED}, {"reuse_similarity": 1.0}], ids=str)
def test_a_frame_that_breaks_its_batch_is_found_and_becomes_an_error_row(poison: int, options: dict[str, Any]) -> None:
    chunks, _ = fragile(**options)
    captions, _, embeddings, *_ = caption(chunks, [*range(1, 12), poison, 12, 13])
    assert [caption.status for caption in captions] == ["ok"] * 11 + ["error"] + ["ok"] * 2
    assert captions[11].error is not None
    assert captions[11].error.startswith("model: ValueError: this frame is poison")
    if "extra" in options:
        without = [row for row, embedding in enumerate(embeddings) if embedding is None]
        assert without == ([11] if poison == 255 else [])


def test_near_frames_of_one_that_broke_its_batch_get_captions_of_their_own() -> None:
    chunks, _ = fragile(similarity=False, reuse_similarity=0.9)
    captions, reused, *_ = caption(chunks, [254, 1, 2], group="video")
    assert [caption.status for caption in captions] == ["error", "ok", "ok"]
    assert reused == [None] * 3


def test_a_chunk_is_encoded_once_whatever_is_asked_for() -> None:
    chunks, captioner = fragile(similarity=False, reuse_similarity=0.9, extra=EMBEDDED)
    caption(chunks, range(1, 9), group="video")
    assert (captioner.encoded, captioner.captioned) == ([8], [1])


def caption_on_a_lost_gpu() -> None:
    chunks, _ = fragile(poison="CUDA error: an illegal memory access was encountered")
    caption(chunks, [1, 255, 2])


def test_an_actor_whose_gpu_answers_no_more_gives_way(capfd: pytest.CaptureFixture[str]) -> None:
    """Its batch is then another actor's; no frame is blamed."""
    actor = multiprocessing.get_context("spawn").Process(target=caption_on_a_lost_gpu)
    actor.start()
    actor.join(timeout=120)
    assert actor.exitcode == 1
    said = capfd.readouterr().err
    assert "this GPU answers no more" in said
    assert "Traceback" not in said, "an exception would end the whole run"


class Gated(Fragile):
    """A ``Fragile`` captioner whose first call for captions waits until it is let go, and then fails if told so."""

    def __init__(self, fails: bool) -> None:
        super().__init__(100)
        self.fails = fails
        self.begun, self.let_go = threading.Event(), threading.Event()

    def caption_features(
        self, features: Sequence[ImageFeatures], seeds: Sequence[int], seconds: Seconds
    ) -> list[Caption]:
        if not self.begun.is_set():
            self.begun.set()
            assert self.let_go.wait(30)
            if self.fails:
                raise KeyboardInterrupt
        return super().caption_features(features, seeds, seconds)


@pytest.mark.parametrize("fails", [False, True], ids=["made", "not made"])
def test_a_frame_that_another_chunk_captions_at_the_moment_is_awaited(fails: bool) -> None:
    gated = Gated(fails)
    shared: Any = gated
    chunks = ChunkCaptioner(shared, ActorOptions("", "", "f", DecodeOptions(), batch_size=16))
    found: dict[str, Captioned] = {}

    def first() -> None:
        if fails:
            with pytest.raises(KeyboardInterrupt):
                caption(chunks, [1, 2, 3])
        else:
            found["first"] = caption(chunks, [1, 2, 3])

    def second() -> None:
        found["second"] = caption(chunks, [3, 4, 2])

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert gated.begun.wait(30)
    threads[1].start()
    while gated.captioned != [1]:  # the frame that is only in the second chunk
        assert threads[1].is_alive()
        threads[1].join(0.01)
    gated.let_go.set()
    for thread in threads:
        thread.join(30)
    captions, reused, *_ = found["second"]
    assert [one.text for one in captions] == ["3", "4", "2"]
    assert reused == ([None] * 3 if fails else [REUSED_IDENTICAL, None, REUSED_IDENTICAL])
    assert gated.captioned == ([1, 2] if fails else [1, 3])
