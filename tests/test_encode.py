"""Frames and texts in passes of one shape: captured once, filled up, and the same features as one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framecap.errors import CaptionerError
from framecap.model.encode import ImageEncoder, TextEncoder
from framecap.model.images import normalise
from framecap.model.ruclip import RuClip
from framecap.model.ruclip_layout import RuClipConfig

B32 = Path(__file__).parent / "data" / "ruclip-vit-b32-tiny"
TEXTS = ["слово " * count for count in (1, 40, 8, 200, 3, 4, 2, 1, 41)]


class Operations(TorchDispatchMode):
    """Notes each operation with the tensors it read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, made))
        return made


@dataclass
class Tape:
    """Stands in for CUDA graphs: the first run of a shape runs as it is; later ones repeat its very operations on
    the same tensors, so that whatever Python worked out stays as it was."""

    captured: list[tuple[int, int]] = field(default_factory=list)
    replays: int = 0

    def __call__(self, run: Callable[[int, int], None]) -> Callable[[int, int], None]:
        known: dict[tuple[int, int], Operations] = {}

        def captured_run(rows: int, length: int) -> None:
            if (operations := known.get((rows, length))) is None:
                run(rows, length)  # warm-up
                known[rows, length] = operations = Operations()
                self.captured.append((rows, length))
                with operations:
                    run(rows, length)
                return
            self.replays += 1
            for func, args, keywords, made in operations.noted:
                again = func(*args, **keywords)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return captured_run


class OnlyOnTheDevice(TorchDispatchMode):
    """Fails where a tensor has values, when all that a pass should touch are on the meta device: where it reads one
    on the host, sends one over, or makes one whose shape follows from values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, made)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta, func
        return made


@pytest.fixture(scope="module")
def model() -> RuClip:
    return RuClip.from_pretrained(B32)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 96, 96, 3), np.uint8)


def one_by_one(model: RuClip, frames: np.ndarray) -> Any:
    values = normalise(torch.from_numpy(frames), model.config.mean, model.config.std)
    return model.image_features(values)


@pytest.mark.parametrize("with_patches", [False, True], ids=["pooled", "patches"])
@pytest.mark.parametrize("graphs", [None, Tape()], ids=["as many as there are", "filled up"])
def test_frames_in_passes_have_the_features_of_the_model(
    model: RuClip, frames: np.ndarray, graphs: Tape | None, with_patches: bool
) -> None:
    encode = ImageEncoder(model, with_patches, graphs, frames=4)
    for _ in range(2):
        found, want = encode(frames), one_by_one(model, frames)
        torch.testing.assert_close(found.pooled, want.pooled, atol=1e-5, rtol=1e-5)
        if with_patches:
            torch.testing.assert_close(found.patches, want.patches, atol=1e-4, rtol=1e-4)
        else:
            assert found.patches.shape == (0, *want.patches.shape[1:])


def test_passes_of_one_shape_are_captured_once_and_give_a_frame_the_same_bits_in_any_company(
    model: RuClip, frames: np.ndarray
) -> None:
    tape = Tape()
    encode = ImageEncoder(model, True, tape, frames=4)
    whole = encode(frames)
    for part in (slice(10, 11), slice(3, 10), slice(0, 2)):
        found = encode(frames[part])
        assert torch.equal(found.pooled, whole.pooled[part])
        assert torch.equal(found.patches, whole.patches[part])
    assert tape.captured == [(4, 0)]
    assert tape.replays == 3 + 1 + 2 + 1


def test_features_stay_as_they_are_when_other_frames_are_encoded(model: RuClip, frames: np.ndarray) -> None:
    encode = ImageEncoder(model, True, Tape(), frames=4)
    found = encode(frames[:4])
    kept = found.pooled.clone(), found.patches.clone()
    encode(frames[4:8])
    assert torch.equal(found.pooled, kept[0])
    assert torch.equal(found.patches, kept[1])


def test_new_weights_are_captured_anew(model: RuClip, frames: np.ndarray) -> None:
    changed, tape = copy.deepcopy(model), Tape()
    encode, texts = ImageEncoder(changed, False, tape, frames=4), TextEncoder(changed, tape, texts=2)
    ids = changed.tokenize(TEXTS)
    encode(frames), texts(ids)
    for tower in (changed.vision, changed.text):
        assert tower is not None
        tower.load_state_dict({name: 0.9 * tensor for name, tensor in tower.state_dict().items()}, assign=True)
    torch.testing.assert_close(encode(frames).pooled, one_by_one(changed, frames).pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(texts(ids), changed.encode_text(ids), atol=1e-5, rtol=1e-5)


def test_a_gpu_with_little_memory_encodes_fewer_frames_at_a_time(
    model: RuClip, frames: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    tape = Tape()

    def small(run: Callable[[int, int], None]) -> Callable[[int, int], None]:
        captured = tape(run)

        def bounded(rows: int, length: int) -> None:
            if rows > 16:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            captured(rows, length)

        return bounded

    found = ImageEncoder(model, False, small, frames=64)(frames)
    torch.testing.assert_close(found.pooled, one_by_one(model, frames).pooled, atol=1e-5, rtol=1e-5)
    assert tape.captured == [(16, 0)]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "out of memory; encoding 32 frames at a time from now on",
        "out of memory; encoding 16 frames at a time from now on",
    ]


def test_a_gpu_without_any_memory_says_so(model: RuClip, frames: np.ndarray) -> None:
    def full(run: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def fails(rows: int, length: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return fails

    encode = ImageEncoder(model, False, full, frames=32)
    for _ in range(2):  # the second time too: nothing of the first is left behind
        with pytest.raises(torch.OutOfMemoryError):
            encode(frames)


@pytest.mark.parametrize("graphs", [None, Tape()], ids=["as many as there are", "filled up"])
def test_texts_in_passes_have_the_embeddings_of_the_model(model: RuClip, graphs: Tape | None) -> None:
    ids = model.tokenize(TEXTS)
    encode = TextEncoder(model, graphs, texts=2)
    for _ in range(2):
        torch.testing.assert_close(encode(ids), model.encode_text(ids), atol=1e-5, rtol=1e-5)


def test_a_text_gets_the_same_bits_in_any_company(model: RuClip) -> None:
    ids, encode = model.tokenize(TEXTS), TextEncoder(model, Tape(), texts=2)
    whole = encode(ids)
    assert torch.equal(torch.cat([encode(row[None]) for row in ids]), whole)
    assert torch.equal(encode(ids.flip(0)), whole.flip(0))


def test_texts_without_an_end_are_refused(model: RuClip) -> None:
    with pytest.raises(CaptionerError, match="<eos>"):
        TextEncoder(model, Tape())(torch.tensor([[2, 5, 6]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@torch.inference_mode()
def test_a_pass_neither_asks_nor_tells_the_host(dtype: torch.dtype) -> None:
    config = RuClipConfig(48, 96, 2, 128, 32, 77, 300, 64, 2, 2)
    model = RuClip.from_config(config).to("meta", dtype)
    pixels = torch.empty(4, 96, 96, 3, dtype=torch.uint8, device="meta")
    ids, ends = torch.empty(4, 16, dtype=torch.long, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    model.vision(pixels, with_patches=True)  # folds the weights once
    assert model.text is not None
    with OnlyOnTheDevice():
        pooled, patches = model.vision(pixels, with_patches=True)
        texts = model.text(ids, ends)
    assert (pooled.shape, pooled.dtype, texts.shape, texts.dtype) == ((4, 48), dtype, (4, 48), dtype)
    assert patches is not None
    assert patches.shape == (4, 10, 128)
