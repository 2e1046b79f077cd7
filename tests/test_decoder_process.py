"""Hostile pictures: each is an error of its own kind, and the next one is decoded."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import (
    ENDLESS_EPS,
    encoded,
    huge_gif,
    jpeg_441,
    jpeg_of_many_scans,
    of_every_format,
    picture,
    tiff_of_large_tile,
)

from framecap.errors import FRAME_ERROR_KINDS, FrameError
from framecap.model.decoder_process import PictureDecoder
from framecap.model.images import crop_and_resize
from framecap.model.jpeg import decode_jpeg
from framecap.model.picture_limits import PictureLimits

FUZZED, FUZZED_IN_SOAK = 300, 20_000


def kind_of(decoder: PictureDecoder, data: bytes) -> str | None:
    try:
        decoder.crop_and_resize(data, 8)
    except FrameError as error:
        return error.kind if error.kind in FRAME_ERROR_KINDS else f"unknown kind {error.kind}"
    return None


@pytest.fixture(scope="module")
def decoder() -> PictureDecoder:
    return PictureDecoder()


@pytest.mark.parametrize("name", of_every_format())
def test_the_child_gives_the_same_pixels(name: str, decoder: PictureDecoder) -> None:
    data = of_every_format()[name]
    assert (decoder.crop_and_resize(data, 32) == crop_and_resize(data, 32)).all()


def test_size_and_reduced_picture_are_those_of_the_whole_picture(decoder: PictureDecoder) -> None:
    for data in of_every_format().values():
        assert decoder.size(data) == (48, 40)
        assert decoder.fit_within(data, 24).shape == (20, 24, 3)


def test_a_picture_that_takes_too_long_is_an_error_and_its_neighbours_go_on() -> None:
    decoder = PictureDecoder(PictureLimits(seconds=2))
    hostile = jpeg_of_many_scans(5000)  # a minute or more
    assert kind_of(decoder, hostile) == "too_slow"
    assert kind_of(decoder, encoded(picture(), "PNG")) is None


def test_a_child_that_was_killed_costs_no_picture() -> None:
    decoder, data = PictureDecoder(), encoded(picture(), "PNG")
    assert kind_of(decoder, data) is None
    assert decoder._child is not None
    os.kill(decoder._child.pid, signal.SIGKILL)
    assert kind_of(decoder, data) is None


def test_the_child_ends_with_its_parent() -> None:
    program = (
        "from framecap.model.decoder_process import PictureDecoder\n"
        "import io, os, signal\nfrom PIL import Image\nsink = io.BytesIO()\n"
        "Image.new('RGB', (9, 9)).save(sink, 'PNG')\ndecoder = PictureDecoder()\n"
        "decoder.crop_and_resize(sink.getvalue(), 8)\nprint(decoder._child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=120)
    child = int(done.stdout)
    for _ in range(600):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is still there a minute after its parent's death")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (ENDLESS_EPS, "not_an_image"),
        (huge_gif(), "too_large"),
        (tiff_of_large_tile(), "too_large"),
        (b"", "empty"),
        (b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF", "not_an_image"),
    ],
    ids=["endless EPS", "GIF canvas", "TIFF tile", "empty", "PDF"],
)
def test_hostile_pictures_are_refused_here_and_in_the_child(data: bytes, kind: str, decoder: PictureDecoder) -> None:
    assert kind_of(decoder, data) == kind
    with pytest.raises(FrameError) as caught:
        crop_and_resize(data, 8)
    assert caught.value.kind == kind


@pytest.mark.parametrize("limit", [{"max_pixels": 1919}, {"max_bytes": 500}, {"max_held_bytes": 5000}])
def test_limits_can_be_set(limit: dict[str, int], decoder: PictureDecoder) -> None:
    limited = PictureDecoder(PictureLimits(**limit))
    for name in ("PNG", "JPEG", "WEBP"):
        data = encoded(picture(), name)
        assert kind_of(decoder, data) is None
        assert kind_of(limited, data) == "too_large", name


def test_the_child_cannot_take_more_memory_than_allowed() -> None:
    """Where a header promises little and the decoder takes much: here the estimate is left out."""
    program = (
        "from framecap.model import decoder_process, picture_limits, pictures\n"
        "pictures.check_held = lambda *_: None\n"
        "decoder_process.serve({'max_held_bytes': 1 << 20, 'max_bytes': 1 << 20})"
    )
    data = encoded(picture(9000, 9000), "WEBP", quality=1, method=0)
    request = b'{"do": "size", "bytes": %d}\n' % len(data)
    done = subprocess.run([sys.executable, "-c", program], input=request + data, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert b'"kind"' in done.stdout


def test_plain_jpegs_need_no_child_and_those_of_other_samplings_are_left_to_pillow() -> None:
    decoder = PictureDecoder()
    assert kind_of(decoder, encoded(picture(), "JPEG")) is None
    assert kind_of(decoder, encoded(picture(), "JPEG", progressive=True)) is None
    assert decoder._child is None
    assert decode_jpeg(jpeg_441(), None) is None
    assert crop_and_resize(jpeg_441(), 32).shape == (32, 32, 3)


def test_the_files_that_ended_describe_with_a_traceback(shared: Path) -> None:
    folder = shared / "cases" / "pictures_and_videos"
    assert crop_and_resize(folder / "06_jpeg_441.jpg", 96).std() > 1
    with pytest.raises(FrameError):
        crop_and_resize(folder / "07_damaged_avif.jpg", 96)


def test_a_device_and_a_pipe_are_no_frames(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in ("/dev/zero", tmp_path / "pipe.jpg"):
        with pytest.raises(FrameError, match="no regular file"):
            crop_and_resize(path, 8)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated or moved; more often near the head, where the structure is."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(changed), rng.choice((64, 256, len(changed))))) if changed else 0
        how = rng.randrange(6)
        if how == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            changed[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        elif how == 2:
            del changed[at : at + rng.randrange(1, 64)]
        elif how == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 256)] * rng.choice((1, 2, 64))
        elif how == 4:
            del changed[max(1, at) :]
        else:
            other = rng.randrange(len(changed)) if changed else 0
            changed[at : at + 8] = changed[other : other + 8]
    return bytes(changed)


def fuzz(count: int, seed: int) -> tuple[dict[str | None, int], int]:
    """Kinds of error of ``count`` mutated pictures of all formats, and by how many KiB this process grew."""
    decoder, rng = PictureDecoder(PictureLimits(max_held_bytes=64 << 20, seconds=20)), random.Random(seed)
    sources = list(of_every_format(seed).values())
    kinds: dict[str | None, int] = {}
    before = 0
    for number in range(count):
        kind = kind_of(decoder, mutate(rng.choice(sources), rng))
        kinds[kind] = kinds.get(kind, 0) + 1
        if number == 99:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return kinds, grown


def test_mutated_pictures_raise_nothing_but_frame_errors() -> None:
    kinds, _ = fuzz(FUZZED, 1)
    assert {None, "truncated", "not_an_image"} <= set(kinds) <= {None, *FRAME_ERROR_KINDS}, kinds


@pytest.mark.soak
def test_twenty_thousand_mutated_pictures_cause_no_hang_and_no_growth() -> None:
    kinds, grown = fuzz(FUZZED_IN_SOAK, 2)
    print(kinds, f"{grown} KiB")
    assert {None, "truncated", "not_an_image"} <= set(kinds) <= {None, *FRAME_ERROR_KINDS}, kinds
    assert grown < 64 << 10
