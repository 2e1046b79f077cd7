"""Equal bytes are captioned once in an actor, whichever of its calls they come with, and whenever."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from framecap.model.captioner import Caption
from framecap.model.decode_options import DecodeOptions
from framecap.pipeline import remembered
from framecap.pipeline.read import ChunkFrames
from framecap.pipeline.records import ActorOptions
from framecap.pipeline.remembered import Remembered
from framecap.pipeline.stages import CaptionActor
from framecap.schema import REUSED_IDENTICAL


class Meeting:
    """A captioner that names a frame by its first value, once two batches have come; it fails for ``poison``."""

    def __init__(self, poison: int = -1) -> None:
        self.poison, self.named = poison, list[int]()
        self._met, self._calls = threading.Event(), itertools.count(1)

    def caption_pixels(
        self, pixels: np.ndarray, options: object, seeds: Sequence[int], similarity: bool
    ) -> list[Caption]:
        values = [int(frame[0, 0, 0]) for frame in pixels]
        self.named += values
        if next(self._calls) > 1:
            self._met.set()
        self._met.wait(30)  # the first waits for the second, the others for nobody
        if self.poison in values:
            raise ValueError("this frame is poison")
        return [Caption(str(value)) for value in values]


def chunk(values: Sequence[int]) -> tuple[ChunkFrames, np.ndarray]:
    frames = ChunkFrames((), slots=list(range(len(values))), seeds=[0] * len(values))
    frames.digests = [bytes([value]) for value in values]
    frames.videos = [None] * len(values)
    return frames, np.stack([np.full((8, 8, 3), value, np.uint8) for value in values])


@pytest.fixture
def actor(tiny_captioner_dir: Path, tmp_path: Path) -> CaptionActor:
    return CaptionActor(ActorOptions(str(tiny_captioner_dir), str(tmp_path), "f", DecodeOptions(), batch_size=64))


def test_two_calls_at_once_caption_what_they_have_in_common_once(actor: CaptionActor) -> None:
    meeting = actor._captioner = Meeting()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(actor._captions, *chunk(range(start, start + 8))) for start in (0, 4)]
        (first, marks), (second, others) = (call.result(60) for call in calls)
    assert [caption.text for caption in first] == [str(value) for value in range(8)]
    assert [caption.text for caption in second] == [str(value) for value in range(4, 12)]
    assert sorted(meeting.named) == list(range(12))
    assert [*marks, *others].count(REUSED_IDENTICAL) == 4
    third, again = actor._captions(*chunk([3, 11, 20]))
    assert [caption.text for caption in third] == ["3", "11", "20"]
    assert again == [REUSED_IDENTICAL, REUSED_IDENTICAL, None]


def test_what_fails_in_one_call_is_tried_by_the_other_itself(actor: CaptionActor) -> None:
    meeting = actor._captioner = Meeting(poison=5)  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(actor._captions, *chunk(range(start, start + 8))) for start in (0, 4)]
        found = [captions for captions, _ in (call.result(60) for call in calls)]
    assert [[c.status for c in captions].count("error") for captions in found] == [1, 1]
    assert [captions[place].text for captions, place in zip(found, (6, 2), strict=True)] == ["6", "6"]
    assert meeting.named.count(5) > 1


def test_a_promise_is_kept_or_withdrawn_and_only_the_latest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 2)
    memory = Remembered()
    assert memory.claim(b"a") is None
    promised = memory.claim(b"a")
    assert isinstance(promised, Future)
    memory.settle([b"a"], {})
    assert promised.result(0) is None
    for name in (b"a", b"b", b"c"):
        assert memory.claim(name) is None
        memory.settle([name], {name: Caption(name.decode())})
    assert memory.claim(b"c") == Caption("c")
    assert memory.claim(b"a") is None
