"""The image transform: bit for bit Pillow's crop and resize, and every bad frame an error of its kind."""

from __future__ import annotations

import io
import pickle
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framecap.errors import FRAME_ERROR_KINDS, FrameError
from framecap.model import jpeg
from framecap.model.images import crop_and_resize, normalise, open_frame, preprocess
from framecap.model.jpeg import decoder_scale
from framecap.model.picture_limits import PictureLimits

DATA = Path(__file__).parent / "data" / "ruclip-vit-b32-tiny" / "images"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ODD_SIZES = [(1, 1), (1, 9), (9, 1), (2, 1), (7, 5), (96, 96), (97, 96), (31, 77), (333, 517), (640, 361)]


def reference(picture: Image.Image, resolution: int) -> np.ndarray:
    """ruCLIP's transform up to the division by 255, in Pillow's own calls."""
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((resolution, resolution), Image.Resampling.BILINEAR))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture with some noise in it, so that decoders and resizers have something to round."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (5 + 3 * c) + y / (7 + 2 * c)) for c in range(3)]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, fmt: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def kind_of(frame: object, **limits: int) -> str:
    with pytest.raises(FrameError) as caught:
        crop_and_resize(frame, 32, limits=PictureLimits(**limits))  # type: ignore[arg-type]
    assert caught.value.kind in FRAME_ERROR_KINDS
    return caught.value.kind


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.parametrize("resolution", [32, 70, 224])
def test_every_size_is_cropped_and_resized_as_pillow_does(size: tuple[int, int], resolution: int) -> None:
    image = picture(*size)
    want = reference(image, resolution)
    assert (crop_and_resize(encoded(image, "PNG"), resolution) == want).all()
    assert (crop_and_resize(np.asarray(image), resolution) == want).all()


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (255, 64), (640, 427)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_decodes_to_pillows_pixels(size: tuple[int, int], subsampling: str, progressive: bool, mode: str) -> None:
    data = encoded(picture(*size, mode), "JPEG", quality=85, subsampling=subsampling, progressive=progressive)
    assert (crop_and_resize(data, 70) == reference(Image.open(io.BytesIO(data)), 70)).all()


def test_jpeg_decodes_to_pillows_pixels_on_photographs(shared: Path) -> None:
    photographs = sorted((shared / "photos" / "ru98" / "images").iterdir())
    assert len(photographs) == 98
    for path in photographs:
        with Image.open(path) as image:
            assert (crop_and_resize(path, 224) == reference(image, 224)).all(), path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_every_mode_becomes_rgb_as_pillow_makes_it(mode: str) -> None:
    image = picture(50, 41, "I").convert("I;16") if mode == "I;16" else picture(50, 41).convert("RGB")
    image = (
        image if mode == "I;16" else image.convert("L").convert(mode) if mode in ("PA", "LA") else image.convert(mode)
    )
    assert (crop_and_resize(image, 32) == reference(image, 32)).all()


@pytest.mark.parametrize("name", ["05_RGBA_150x90.png", "06_P_129x64.png", "09_CMYK_64x91.jpg", "04_L_200x200.png"])
def test_files_of_other_modes_give_pillows_pixels(name: str) -> None:
    with Image.open(DATA / name) as image:
        assert (crop_and_resize(DATA / name, 96) == reference(image, 96)).all()


def test_sixteen_bit_pngs_follow_pillow() -> None:
    data = encoded(Image.fromarray((np.arange(40 * 30, dtype=np.uint16) * 50).reshape(30, 40)), "PNG")
    assert (crop_and_resize(data, 32) == reference(Image.open(io.BytesIO(data)), 32)).all()


def test_all_ways_to_give_a_frame_give_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(picture(60, 40), "PNG")
    path = tmp_path / "кадр.png"
    path.write_bytes(data)
    array = np.asarray(Image.open(io.BytesIO(data)))
    want = crop_and_resize(data, 32)
    for frame in (
        bytearray(data),
        memoryview(data),
        path,
        str(path),
        Image.open(path),
        array,
        np.asfortranarray(array),
    ):
        assert (crop_and_resize(frame, 32) == want).all(), type(frame)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = (encoded(picture(64, 40), "JPEG", **opts) for opts in ({}, {"exif": exif}))
    assert (crop_and_resize(turned, 32) == crop_and_resize(plain, 32)).all()


def test_preprocess_is_to_tensor_and_normalize() -> None:
    frames = [picture(50, 41), picture(64, 64, seed=1)]
    pixels = torch.from_numpy(np.stack([reference(frame, 32) for frame in frames])).permute(0, 3, 1, 2)
    want = (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(preprocess(frames, 32, MEAN, STD), want)


def test_preprocess_of_no_frames_is_empty() -> None:
    assert preprocess([], 32, MEAN, STD).shape == (0, 3, 32, 32)


def test_normalise_rounds_only_once_to_half_precision() -> None:
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(normalise(pixels, MEAN, STD, torch.float16), normalise(pixels, MEAN, STD).half())


def test_fast_decoding_stays_within_one_level_of_exact_on_average() -> None:
    for seed, (width, height) in enumerate([(1920, 1080), (1280, 720), (2560, 1440), (1080, 1920)]):
        small = picture(width // 3, height // 3, seed=seed)
        data = encoded(small.resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=85)
        for resolution in (224, 384):
            exact = crop_and_resize(data, resolution).astype(int)
            assert np.abs(crop_and_resize(data, resolution, "fast") - exact).mean() < 1, (width, resolution)


def test_fast_decoding_scales_by_powers_of_two_and_keeps_a_margin() -> None:
    assert [decoder_scale(side, 384) for side in (384, 720, 1080, 2160, 8640)] == [1, 1, 2, 4, 8]


def test_fast_equals_exact_where_there_is_nothing_to_scale() -> None:
    for data in (encoded(picture(300, 200), "JPEG"), encoded(picture(900, 800), "PNG")):
        assert (crop_and_resize(data, 224, "fast") == crop_and_resize(data, 224)).all()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_a_cut_file_is_truncated(fmt: str, share: float) -> None:
    data = encoded(picture(200, 150), fmt)
    assert kind_of(data[: max(12, int(len(data) * share))]) == "truncated"


@pytest.mark.parametrize("missing", [1, 2, 3, 50])
def test_a_jpeg_without_its_last_bytes_is_never_accepted_in_silence(missing: int) -> None:
    assert kind_of(encoded(picture(200, 150), "JPEG")[:-missing]) == "truncated"


def test_a_cut_jpeg_is_truncated_for_the_fast_decoder_too() -> None:
    data = encoded(picture(1000, 1000), "JPEG")
    with pytest.raises(FrameError) as caught:
        crop_and_resize(data[: len(data) // 2], 224, "fast")
    assert caught.value.kind == "truncated"


def test_a_jpeg_with_rubbish_inside_gives_what_pillow_gives() -> None:
    data = bytearray(encoded(picture(200, 150), "JPEG"))
    data[3000:3040] = bytes(range(40))
    assert (crop_and_resize(bytes(data), 70) == reference(Image.open(io.BytesIO(data)), 70)).all()


@pytest.mark.parametrize("data", [b"not a picture", b"\x00" * 1000, b"<html>404</html>", b"PAR1"])
def test_bytes_of_something_else_are_not_an_image(data: bytes) -> None:
    assert kind_of(data) == "not_an_image"


@pytest.mark.parametrize("frame", [b"", bytearray(), np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0, 3), np.uint8)])
def test_a_frame_of_nothing_is_empty(frame: object) -> None:
    assert kind_of(frame) == "empty"


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert kind_of(tmp_path / "a.jpg") == "empty"


@pytest.mark.parametrize("frame", [None, "/no/such/file.jpg", Path("/no/such/file.jpg"), "/", "nul\0byte"])
def test_a_frame_that_leads_nowhere_is_missing(frame: object) -> None:
    assert kind_of(frame) == "missing"


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        7,
        {"bytes": b""},
    ],
    ids=["2-D", "4 channels", "float", "int", "dict"],
)
def test_values_of_other_types_are_not_an_image_and_say_what_is(frame: object) -> None:
    with pytest.raises(FrameError, match="give ") as caught:
        crop_and_resize(frame, 32)  # type: ignore[arg-type]
    assert caught.value.kind == "not_an_image"


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header announces width x height and which holds no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_bomb(width: int, height: int) -> bytes:
    """A small JPEG whose header has been changed to announce width x height."""
    data = bytearray(encoded(picture(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("bomb", [png_bomb(60_000, 60_000), png_bomb(13_378, 13_378), jpeg_bomb(60_000, 60_000)])
def test_a_bomb_is_refused_from_its_header(bomb: bytes) -> None:
    assert kind_of(bomb) == "too_large"


def test_the_pixel_limit_holds_for_every_kind_of_frame() -> None:
    image = picture(20, 10)
    for frame in (encoded(image, "PNG"), encoded(image, "JPEG"), image, np.asarray(image)):
        assert kind_of(frame, max_pixels=199) == "too_large"
        assert crop_and_resize(frame, 32, limits=PictureLimits(max_pixels=200)).shape == (32, 32, 3)


def test_no_warning_reaches_the_caller() -> None:
    palette = picture(20, 10).convert("P")
    palette.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind_of(png_bomb(12_000, 12_000))  # above Pillow's warning limit, below its refusal
        crop_and_resize(encoded(palette, "PNG"), 32)


def test_open_frame_gives_an_rgb_picture(tmp_path: Path) -> None:
    image = picture(20, 10)
    image.save(tmp_path / "a.png")
    for frame in (image, np.asarray(image), tmp_path / "a.png", image.convert("RGBA"), encoded(image, "PNG")):
        opened = open_frame(frame)
        assert opened.mode == "RGB"
        assert (np.asarray(opened) == np.asarray(image)).all()


def test_a_frame_error_survives_pickling() -> None:
    with pytest.raises(FrameError) as caught:
        crop_and_resize(b"rubbish", 32)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.kind, again.message) == (caught.value.kind, caught.value.message)


def test_threads_decode_side_by_side() -> None:
    data = [encoded(picture(200, 150, seed=i), fmt) for i in range(4) for fmt in ("JPEG", "PNG", "GIF")]
    want = [crop_and_resize(frame, 70) for frame in data]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i, frame in enumerate(data) if not (crop_and_resize(frame, 70) == want[i]).all())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pillow_alone_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(300, 200), "JPEG")
    want = crop_and_resize(data, 96)
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert (crop_and_resize(data, 96) == want).all()
