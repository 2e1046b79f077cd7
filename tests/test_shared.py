"""Several threads with one captioner: the same captions, no batch that drains alone, no harm from each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from shards import jpeg

from framecap import Captioner, DecodeOptions
from framecap.model.captioner import Caption
from framecap.model.generate import Generator
from framecap.model.images import crop_and_resize
from framecap.model.ruclip import ImageFeatures
from framecap.model.shared import SharedCaptioner

BATCH, CALLS, BATCHES = 8, 3, 6
OPTIONS = {
    "greedy": DecodeOptions(stop=("а", "о")),  # so that captions have different lengths
    "beams": DecodeOptions(num_beams=3, max_new_tokens=12),
    "samples": DecodeOptions(do_sample=True, num_return_sequences=2, stop=("а", "о"), max_new_tokens=20),
}
Batch = list[ImageFeatures]


@pytest.fixture(params=["tiny_captioner_dir", "tiny_cross_captioner_dir"])
def captioner(request: pytest.FixtureRequest) -> Iterator[Captioner]:
    """On one thread, as in an actor: there a row's sums do not depend on how many rows there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Captioner.from_pretrained(request.getfixturevalue(request.param), device="cpu")
    torch.set_num_threads(threads)


def encode(captioner: Captioner) -> list[Batch]:
    """Six batches of frames, as different as numbers are, so that captions of 1 to 40 tokens come of them."""
    pixels = np.zeros((BATCH * BATCHES, captioner.resolution, captioner.resolution, 3), np.uint8)
    shape = captioner.features(pixels)
    numbers = torch.Generator().manual_seed(1)
    features = ImageFeatures(
        torch.randn(shape.pooled.shape, generator=numbers) * 30,
        torch.randn(shape.patches.shape, generator=numbers) * 30,
    ).split()
    return [features[start : start + BATCH] for start in range(0, len(features), BATCH)]


def alone(captioner: Captioner, batch: Batch, options: DecodeOptions) -> list[Caption]:
    return captioner.caption_features(ImageFeatures.join(batch), options, range(len(batch)))


def together(captioner: Captioner, batches: list[Batch], options: DecodeOptions) -> list[list[Caption] | str]:
    """Captions of each batch, or its error, from threads whose calls are all there before the first is served."""
    shared = SharedCaptioner(captioner, options, similarity=True)
    with ThreadPoolExecutor(CALLS) as threads:
        waiting = threading.Event()
        shared._device.submit(waiting.wait, 30)

        def call(batch: Batch) -> list[Caption] | str:
            try:
                return shared.caption_features(batch, range(len(batch)), {})
            except ValueError as error:
                return str(error)

        calls = [threads.submit(call, batch) for batch in batches]
        while shared._device._work_queue.qsize() < min(CALLS, len(batches)):
            assert not any(call.done() for call in calls)
        waiting.set()
        return [call.result() for call in calls]


def same(found: list[Caption] | str, wanted: list[Caption] | str) -> bool:
    """The same texts, and scores within 1e-4; or the same error."""
    if isinstance(found, str) or isinstance(wanted, str):
        return found == wanted
    plain = [[replace(c, logprob=None, min_logprob=None, similarity=None) for c in each] for each in (found, wanted)]
    figures = [[(c.logprob, c.min_logprob, c.similarity) for c in each] for each in (found, wanted)]
    return plain[0] == plain[1] and np.array(figures[0]) == pytest.approx(np.array(figures[1]), abs=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captions_are_those_that_each_thread_would_get_alone(
    captioner: Captioner, options: DecodeOptions, static: bool
) -> None:
    captioner.generator = Generator(captioner.decoder, static=static)
    batches = encode(captioner)
    batches[2] = batches[2][:3]
    expected = [alone(captioner, batch, options) for batch in batches]
    assert len({caption.text for captions in expected for caption in captions}) > BATCH
    for found, wanted in zip(together(captioner, batches, options), expected, strict=True):
        assert same(found, wanted)


def test_slots_that_one_batch_leaves_are_taken_by_the_next(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    decode = captioner.decoder.decode_one_token

    def counted(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(ids))
        return decode(ids, *rest)

    batches = encode(captioner)
    monkeypatch.setattr(captioner.decoder, "decode_one_token", counted)
    for batch in batches:
        alone(captioner, batch, OPTIONS["greedy"])
    one_by_one = rows[:]
    rows.clear()
    together(captioner, batches, OPTIONS["greedy"])
    assert sum(rows) == sum(one_by_one), "each token once"
    assert max(rows) == BATCH, "no more slots than for one batch"
    assert len(rows) < 0.8 * len(one_by_one), "slots that are left are taken"


def test_a_frame_that_breaks_a_step_is_the_error_of_its_own_batch(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batches, options = encode(captioner)[:4], OPTIONS["greedy"]
    expected: list[list[Caption] | str] = [alone(captioner, batch, options) for batch in batches]
    poison = captioner.frame_batch(batches[1][5], [0])
    prefill = captioner.decoder.prefill

    def fragile(prefix: torch.Tensor, memory: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        given, bad = (prefix, poison.prefix) if memory is None else (memory, poison.memory)
        assert bad is not None
        if any(torch.allclose(row, bad[0], atol=1e-5) for row in given):
            raise ValueError("poison")
        return prefill(prefix, memory, *rest)

    monkeypatch.setattr(captioner.decoder, "prefill", fragile)
    expected[1] = "poison"
    found = together(captioner, batches, options)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    assert "batches failed together (poison)" in caplog.text


@pytest.mark.parametrize("stage", ["features", "frame_batch", "to_captions"])
def test_what_does_not_fit_beside_others_is_done_when_they_are_through(
    captioner: Captioner, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedCaptioner(captioner, OPTIONS["greedy"], similarity=True)
    first, second = encode(captioner)[:2]
    expected = [alone(captioner, batch, OPTIONS["greedy"]) for batch in (first, second)]
    work, failed = getattr(captioner, stage), []

    def narrow(*arguments: Any) -> Any:
        if shared._engine is not None and not failed:
            failed.append(stage)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*arguments)

    monkeypatch.setattr(captioner, stage, narrow)
    pixels = np.zeros((3, captioner.resolution, captioner.resolution, 3), np.uint8)
    with ThreadPoolExecutor(CALLS) as threads:
        waiting = threading.Event()
        shared._device.submit(waiting.wait, 30)
        calls = [threads.submit(shared.caption_features, batch, range(BATCH), {}) for batch in (first, second)]
        while shared._device._work_queue.qsize() < 2:
            assert not any(call.done() for call in calls)
        encoding = threads.submit(shared.features, pixels, {})
        while shared._device._work_queue.qsize() < 3:
            assert not encoding.done()
        waiting.set()
        assert all(same(call.result(), wanted) for call, wanted in zip(calls, expected, strict=True))
        assert len(encoding.result().pooled) == 3
    assert failed == [stage]


def test_the_time_of_the_device_is_told_by_what_it_did(captioner: Captioner) -> None:
    shared = SharedCaptioner(captioner, OPTIONS["greedy"], similarity=True)
    pixels = np.stack([crop_and_resize(jpeg(seed), captioner.resolution) for seed in range(4)])
    encoding: dict[str, float] = {}
    features = shared.features(pixels, encoding).split()
    captioning: dict[str, float] = {}
    shared.caption_features(features, range(4), captioning)
    assert set(encoding) == {"wait", "encode"}
    assert set(captioning) == {"wait", "generate"}
    assert min(*encoding.values(), *captioning.values()) > 0
