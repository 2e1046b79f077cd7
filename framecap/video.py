"""Frames out of video files: every n-th second, the stream's key frames, or scene changes.

A frame's index and timestamp are those of the video, whichever way it was chosen, so that the same picture
has the same id in every selection. Knows nothing of shards or captions.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from framecap.errors import FrameError, SettingsError

SELECTIONS = ("every", "key", "scene")
_THUMBNAIL = (64, 36)
# Sound may go on for a while after the last picture.
_SLACK_SECONDS, _SLACK_SHARE = 2.0, 0.05


@dataclass(frozen=True)
class Selection:
    """Which frames of a video are taken.

    ``every``: the first frame at or after 0, n, 2n … seconds. ``key``: the frames the encoder stored whole.
    ``scene``: the first frame, and each that differs from the one before by more than ``scene_threshold``.
    """

    how: Literal["every", "key", "scene"] = "every"
    every_seconds: float = 1.0
    scene_threshold: float = 0.3

    def __post_init__(self) -> None:
        if self.how not in SELECTIONS:
            raise SettingsError(f"selection {self.how!r} is unknown; use one of {', '.join(SELECTIONS)}")
        if not self.every_seconds > 0:
            raise SettingsError(f"every={self.every_seconds} seconds is impossible; give a number above 0")
        if not 0 < self.scene_threshold < 1:
            raise SettingsError(f"scene threshold {self.scene_threshold} is outside (0, 1); 0.3 suits most films")


@dataclass(frozen=True)
class VideoFrame:
    """One chosen frame: its place among the video's frames in display order, its time, its RGB picture."""

    index: int
    timestamp_ms: int
    picture: Image.Image


def read_video(file: BinaryIO, selection: Selection) -> Iterator[VideoFrame]:
    """The chosen frames of one video, in display order; timestamps count from the video's first frame.

    ``file`` is a seekable binary file. Damage in the middle ends the frames with an error, after
    those before it were given.

    Raises:
        SettingsError: PyAV is not installed.
        FrameError: ``empty`` when there are no bytes, ``not_an_image`` when there is no readable video stream,
            ``truncated`` on damage or when the file cannot be read on.
    """
    try:
        import av
    except ImportError as error:
        raise SettingsError("reading video needs PyAV; pip install av (framecap's extra 'video')") from error
    try:
        yield from _chosen(_decoded(av, file, selection), selection)
    except (av.error.FFmpegError, OSError) as error:
        raise FrameError("truncated", f"the video cannot be decoded: {error}") from error


def _decoded(av: Any, file: BinaryIO, selection: Selection) -> Iterator[tuple[int, float, Any]]:
    """(index, seconds, frame) of every decoded frame; only key frames are decoded where they suffice."""
    times = _display_times(av, file)
    file.seek(0)
    with av.open(file, metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if selection.how == "key" and times:
            stream.codec_context.skip_frame = "NONKEY"
        decoded, corrupt = 0, 0
        for frame in container.decode(stream):
            corrupt += frame.is_corrupt
            if times and frame.pts is not None:
                index = bisect_left(times, frame.pts)
                seconds = float((frame.pts - times[0]) * stream.time_base)
            else:
                index = decoded
                seconds = decoded / float(stream.average_rate or 25)
            decoded += 1
            yield index, seconds, frame
        if not decoded:
            raise FrameError("truncated", "the video holds no frame that can be decoded")
        if corrupt:
            raise FrameError("truncated", f"the decoder calls {corrupt} of {decoded} frames corrupt")
        end = float((times[-1] - times[0]) * stream.time_base) if times else seconds
        if end < (promised := _promised_seconds(container)) - max(_SLACK_SECONDS, _SLACK_SHARE * promised):
            raise FrameError("truncated", f"its frames end after {end:.1f} s, its header promises {promised:.1f} s")


def _promised_seconds(container: Any) -> float:
    """How long the file says it is; 0 if it does not say (of a transport stream FFmpeg only sees what is there)."""
    stream = container.streams.video[0]
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1_000_000


def _display_times(av: Any, file: BinaryIO) -> list[int]:
    """The presentation times of all frames, sorted, read without decoding; empty if the file has none."""
    if not file.seek(0, io.SEEK_END):
        raise FrameError("empty", "zero bytes")
    file.seek(0)
    try:
        container = av.open(file, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        raise FrameError("not_an_image", f"the file is not a video that can be read: {error}") from error
    with container:
        if not container.streams.video:
            raise FrameError("not_an_image", "the file holds no video stream")
        times: set[int] = set()
        for packet in container.demux(container.streams.video[0]):
            if packet.size and packet.pts is None:
                return []
            if packet.size and not packet.is_discard:
                times.add(packet.pts)
    return sorted(times)


def _chosen(frames: Iterator[tuple[int, float, Any]], selection: Selection) -> Iterator[VideoFrame]:
    next_time = 0.0
    scenes = SceneDetector(selection.scene_threshold)
    for index, seconds, frame in frames:
        if selection.how == "every":
            # A frame due at 2 s may carry 1.9999 s: time bases are fractions.
            if seconds < next_time - 1e-6:
                continue
            next_time = ((seconds + 1e-6) // selection.every_seconds + 1) * selection.every_seconds
        elif selection.how == "key":
            if not frame.key_frame:
                continue
        elif not scenes.starts_scene(_luma(frame)):
            continue
        yield VideoFrame(index, round(seconds * 1000), _upright(frame))


class SceneDetector:
    """FFmpeg's ``select='gt(scene,t)'`` score (libavfilter/f_select.c) on luma scaled to 64 x 36."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._previous: np.ndarray | None = None
        self._previous_difference = 0.0

    def starts_scene(self, luma: np.ndarray) -> bool:
        """Whether this picture, uint8 ``[36, 64]``, begins a scene; the first one always does."""
        previous, self._previous = self._previous, luma
        if previous is None:
            return True
        difference = float(np.abs(luma.astype(np.int16) - previous).mean())
        # A flicker raises the difference of two pictures in a row; a cut raises it once.
        score = min(difference, abs(difference - self._previous_difference)) / 100
        self._previous_difference = difference
        return score > self._threshold


def _luma(frame: Any) -> np.ndarray:
    width, height = _THUMBNAIL
    return np.asarray(frame.to_ndarray(width=width, height=height, format="gray"))


def _upright(frame: Any) -> Image.Image:
    """The picture as a player shows it: a phone's recording carries its rotation beside the pixels."""
    picture: Image.Image = frame.to_image()
    rotation = int(frame.rotation or 0)
    return picture.rotate(rotation, expand=True) if rotation else picture
