"""Frames out of video files: every n-th second, the stream's key frames, or scene changes.

A frame's index and timestamp are those of the video, whichever way it was chosen, so that the same picture
has the same id in every selection. Knows nothing of shards or captions.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from framecap.errors import FrameError, SettingsError

SELECTIONS = ("every", "key", "scene")
_THUMBNAIL = (64, 36)
_TOLERANCE_S = 0.5  # by which a header's duration may exceed what is there
# Demuxers that read one file and open no other, by FFmpeg's names. Playlists (hls, dash, concat), session descriptions
# (sdp) and the like are not among them, whatever a file's name says.
CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "asf", "flv", "ogg", "mxf"),
    *("mpegvideo", "m4v", "h264", "hevc"),
)
_OPTIONS = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"}
_TRANSPORT_PACKETS = {188: 0, 192: 4, 204: 0}  # bytes of a packet: where in it the sync byte stands


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

    ``file`` is a seekable binary file. Damage ends the frames with an error, after all that could be decoded
    were given.

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


def _open(av: Any, file: BinaryIO) -> Any:
    """The container, whatever the encoding of its titles: PyAV 19 knows no ``metadata_errors``, and fails on none."""
    old = int(av.__version__.partition(".")[0]) < 19
    return av.open(file, options=_OPTIONS, **({"metadata_errors": "ignore"} if old else {}))


def _decoded(av: Any, file: BinaryIO, selection: Selection) -> Iterator[tuple[int, float, Any]]:
    """(index, seconds, frame) of every decoded frame; only key frames are decoded where they suffice.

    Ends with a FrameError if something of the video is missing.
    """
    times, damage = _read_packets(av, file)
    file.seek(0)
    with _open(av, file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if selection.how == "key" and times:
            stream.codec_context.skip_frame = "NONKEY"
        decoded = whole = 0
        for frame in container.decode(stream):
            if times and frame.pts is not None:
                index = bisect_left(times, frame.pts)
                seconds = float((frame.pts - times[0]) * stream.time_base)
            else:
                index = decoded
                seconds = decoded / float(stream.average_rate or 25)
            decoded += 1
            # A recording may begin between two key frames: what comes before the first is never whole.
            if frame.is_corrupt and whole and damage is None:
                damage = f"damaged at {seconds:.1f} s"
            whole += not frame.is_corrupt
            yield index, seconds, frame
    if not decoded:
        raise FrameError("truncated", "the video holds no frame that can be decoded")
    if damage is not None:
        raise FrameError("truncated", f"the video is {damage}; what could be decoded was kept")


def _read_packets(av: Any, file: BinaryIO) -> tuple[list[int], str | None]:
    """What the packets tell without decoding: the presentation times of all frames, sorted (none if a frame has
    none), and what is missing (None: nothing)."""
    if not file.seek(0, io.SEEK_END):
        raise FrameError("empty", "zero bytes")
    file.seek(0)
    try:
        container = _open(av, file)
    except av.error.ArgumentError as error:  # not on the list, or a header that makes no sense
        raise FrameError("not_an_image", f"the file is none of {', '.join(CONTAINERS)}, or is damaged") from error
    except (av.error.FFmpegError, OSError) as error:
        raise FrameError("not_an_image", f"the file is not a video that can be read: {error}") from error
    with container:
        if not container.streams.video:
            raise FrameError("not_an_image", "the file holds no video stream")
        packets = _Packets(container.streams.video[0])
        try:
            for packet in container.demux():
                packets.add(packet)
        except (av.error.FFmpegError, OSError) as error:
            packets.damage = packets.damage or f"not readable to its end: {error}"
        times = sorted(packets.times) if packets.timed else []
        damage = packets.damage
        if damage is None and times:
            promised = (container.duration or 0) / av.time_base
            damage = _cut_short(promised, packets.end - (container.start_time or 0) / av.time_base, packets)
        if damage is None and container.format.name == "mpegts" and _ends_within_packet(file):
            damage = "cut short: its last transport packet is not whole"
    return times, damage


class _Packets:
    """Presentation times of ``video``'s packets, and where the last packet of any stream ends, in seconds."""

    def __init__(self, video: Any) -> None:
        self.video = video
        self.times: set[int] = set()
        self.timed = True
        self.damage: str | None = None
        self.end = 0.0

    def add(self, packet: Any) -> None:
        if packet.pts is not None:  # of any stream: sound may go on after the last picture
            self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not self.video or not packet.size:
            return
        if packet.is_corrupt:
            self.damage = self.damage or "damaged: not all of its packets are whole"
        if packet.pts is None:
            self.timed = False
        elif not packet.is_discard:
            self.times.add(packet.pts)


def _cut_short(promised: float, end: float, packets: _Packets) -> str | None:
    """What to say if the packets end well before the seconds that the file's header promises."""
    # The last frame of a screen recording may last for seconds, and its packet does not say so.
    longest = max((after - before for before, after in pairwise(sorted(packets.times))), default=0)
    if promised - end <= max(_TOLERANCE_S, float(longest * packets.video.time_base)):
        return None
    return f"cut short: {end:.1f} of {promised:.1f} s are there"


def _ends_within_packet(file: BinaryIO) -> bool:
    """Whether a transport stream is no whole number of packets; it has no header that promises a length."""
    file.seek(0)
    head = file.read(3 * max(_TRANSPORT_PACKETS))
    for size, sync in _TRANSPORT_PACKETS.items():
        if head[sync::size][:3] == b"\x47\x47\x47":
            return file.seek(0, io.SEEK_END) % size != 0
    return False


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
