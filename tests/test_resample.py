"""The resize in C gives Pillow's bytes, with and without vector code."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from framecap.model import resample
from framecap.model.resample import resize_square

SIDES = [(1, 1), (1, 70), (2, 3), (3, 2), (5, 96), (96, 5), (97, 96), (96, 97), (383, 384), (720, 384), (1080, 224)]


def with_pillow(square: np.ndarray, resolution: int) -> np.ndarray:
    image = Image.fromarray(square)
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("plain", [False, True], ids=["vector", "plain"])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_noise_is_resized_to_pillows_bytes(sides: tuple[int, int], plain: bool) -> None:
    side, resolution = sides
    pixels = np.random.default_rng(side).integers(0, 256, (side + 3, side + 5, 3), dtype=np.uint8)
    want = with_pillow(pixels[1 : 1 + side, 2 : 2 + side], resolution)
    assert (resize_square(pixels, 2, 1, side, resolution, plain) == want).all()


@pytest.mark.parametrize("plain", [False, True], ids=["vector", "plain"])
def test_a_hundred_random_sizes_agree_with_pillow(plain: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        side, resolution = int(rng.integers(1, 500)), int(rng.integers(1, 300))
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        got = resize_square(pixels, 0, 0, side, resolution, plain)
        assert (got == with_pillow(pixels, resolution)).all(), (side, resolution)


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_an_even_surface_stays_even(level: int) -> None:
    pixels = np.full((733, 733, 3), level, np.uint8)
    assert (resize_square(pixels, 0, 0, 733, 384) == level).all()


def test_arrays_in_any_memory_order_are_read_right() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    want = with_pillow(pixels, 24)
    assert (resize_square(np.asfortranarray(pixels), 0, 0, 40, 24) == want).all()
    assert (resize_square(pixels[::-1].copy()[::-1], 0, 0, 40, 24) == want).all()


def test_the_result_is_a_writable_array_of_its_own() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    for resolution in (24, 40):
        result = resize_square(pixels, 0, 0, 40, resolution)
        assert result.flags.writeable
        assert not np.shares_memory(result, pixels)


@pytest.mark.parametrize("square", [(-1, 0, 5), (0, 0, 11), (6, 0, 5), (0, 6, 5), (0, 0, 0)], ids=str)
def test_a_square_outside_the_pixels_is_refused(square: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no square"):
        resize_square(np.zeros((10, 10, 3), np.uint8), *square, 8)


def test_without_the_compiled_part_pillow_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    want = resize_square(pixels, 10, 0, 50, 32)
    monkeypatch.setattr(resample, "_native", None)
    assert (resize_square(pixels, 10, 0, 50, 32) == want).all()
