"""A decoding step comes in few shapes, is captured once for each, and never asks the host."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framecap.model.beam import BeamSearch
from framecap.model.cuda_graphs import MOST_GRAPHS, CudaGraphs, Run
from framecap.model.decode_options import DecodeOptions
from framecap.model.engine import decode_step, row_sizes
from framecap.model.generate import Generator
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.search import FINISHED, Stepwise, StopRule

NEW, SLOTS = 20, 48
CPU = torch.device("cpu")
STRATEGIES = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"do_sample": True, "top_p": 0.8, "top_k": 0},
    {"do_sample": True},
    {"num_beams": 4, "no_repeat_ngram_size": 2},
]


@dataclass
class Tape:
    """Captures as CUDA graphs do: what is captured runs once before, and then only when it is replayed."""

    captured: list[Callable[[], None]] = field(default_factory=list)
    refuses: bool = False

    def graphs(self, step: Run) -> CudaGraphs:
        return CudaGraphs(step, functools.partial(self.capture, step))

    def capture(self, step: Any, run: Callable[[], None]) -> Callable[[], None]:
        run()
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured.append(run)
        return run


class OnlyOnTheDevice(TorchDispatchMode):
    """Fails where a tensor has values, when all that a step should touch are on the meta device: where it reads one
    on the host, sends one over, or makes one whose shape follows from values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, made)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta, func
        return made


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
class OperationTape(Tape):
    """Replays the very operations that were captured, on the same tensors, as a CUDA graph does: whatever Python
    worked out at capture stays as it was."""

    def capture(self, step: Any, run: Callable[[], None]) -> Callable[[], None]:
        run()
        _, cache, search, *_ = step.args
        blocks = [cache.keys, cache.values]
        kept = [*search.state(), *blocks]
        before = [tensor.clone() for tensor in kept]
        with Operations() as operations:
            run()
        for tensor, values in zip(kept, before, strict=True):  # a capture does not run
            tensor.copy_(values)

        def replay() -> None:
            for func, args, keywords, made in operations.noted:
                again = func(*args, **keywords)
                for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        self.captured.append(replay)
        return replay


@pytest.fixture(scope="module")
def decoder() -> RuGpt:
    torch.manual_seed(2)
    model = RuGpt.from_config(RuGptConfig(97, 64, 32, 2, 4, eos_token_id=84))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30 if name == "wte.weight" else 20) if parameter.dim() > 1 else parameter.add_(0.1)
    return model


@pytest.fixture(scope="module")
def prefixes() -> torch.Tensor:
    return torch.randn(100, 5, 32, generator=torch.Generator().manual_seed(3))


def prepared(decoder: RuGpt, prefixes: torch.Tensor, strategy: dict[str, float]) -> tuple[Any, Callable[..., None]]:
    """A search whose first 30 of 48 slots have read their prefix, and its step."""
    options = DecodeOptions.from_dict(strategy | {"max_new_tokens": NEW})
    kind = BeamSearch if options.num_beams > 1 else Stepwise
    search: Any = kind(SLOTS, options, StopRule(None, 84, (), 97, decoder.device), decoder.device)
    cache = decoder.new_cache(SLOTS, 5 + NEW * search.beams)
    rows = slice(0, 30)
    if not prefixes.is_meta:
        search.admit(rows, [(row, 0) for row in range(30)])
    search.advance(decoder.prefill(prefixes[rows], None, cache, 0)[:, None], rows)
    return search, lambda size, tokens: decode_step(decoder, cache, search, 5, size, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@torch.inference_mode()
def test_a_step_neither_asks_nor_tells_the_host(strategy: dict[str, float], dtype: torch.dtype) -> None:
    decoder = RuGpt.from_config(RuGptConfig(97, 64, 32, 2, 4, eos_token_id=84)).to("meta", dtype)
    search, step = prepared(decoder, torch.empty(30, 5, 32, device="meta", dtype=dtype), strategy)
    assert not search.asks_host
    with OnlyOnTheDevice():
        for _ in range(3):
            step(32, 16)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@torch.inference_mode()
def test_finished_and_empty_slots_stay_as_they_are(
    decoder: RuGpt, prefixes: torch.Tensor, strategy: dict[str, float]
) -> None:
    search, step = prepared(decoder, prefixes, strategy)
    for _ in range(NEW + 5):
        before = [values.clone() for values in search.collect(torch.arange(SLOTS))]
        done = search.flags == FINISHED
        step(32, NEW)
        after = search.collect(torch.arange(SLOTS))
        for old, new in zip(before, after, strict=True):
            width = NEW if old.dim() > 1 and old.shape[-1] > NEW else None  # without the spare column
            assert torch.equal(old[done][..., :width], new[done][..., :width])
    assert (search.flags == FINISHED).all()
    assert int(search.steps.max()) <= NEW


def test_shapes_are_few_and_waste_at_most_a_third() -> None:
    sizes = row_sizes(1024)
    assert sizes == (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    for live in range(16, 1025):
        assert next(size for size in sizes if size >= live) <= 1.5 * live
    assert row_sizes(20) == (16, 20)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_replaying_the_captured_operations_gives_the_same_captions(
    decoder: RuGpt, prefixes: torch.Tensor, strategy: dict[str, float]
) -> None:
    options, seeds = DecodeOptions.from_dict(strategy | {"max_new_tokens": NEW}), list(range(100))
    expected = Generator(decoder).generate(prefixes, None, options, seeds)
    tape = OperationTape()
    generator = Generator(decoder, SLOTS, static=True, graphs=tape.graphs)
    for _ in range(2):
        found = generator.generate(prefixes, None, options, seeds)
        assert [c.tokens for [c] in found] == [c.tokens for [c] in expected]
    assert len(tape.captured) > 1


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize("spoilt_by", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_frame_that_is_not_finite_spoils_no_other_one(
    decoder: RuGpt, prefixes: torch.Tensor, strategy: dict[str, float], spoilt_by: float, static: bool
) -> None:
    options, seeds = DecodeOptions.from_dict(strategy | {"max_new_tokens": NEW}), list(range(100))
    expected = [c.tokens for [c] in Generator(decoder).generate(prefixes, None, options, seeds)]
    spoilt = prefixes.clone()
    spoilt[::9, 2, 7] = spoilt_by
    generator = Generator(decoder, SLOTS, static=static)
    found = [candidate for [candidate] in generator.generate(spoilt, None, options, seeds)]
    assert [frame for frame, candidate in enumerate(found) if candidate.is_spoilt] == list(range(0, 100, 9))
    assert all(c.is_spoilt or c.tokens == tokens for c, tokens in zip(found, expected, strict=True))
    again = generator.generate(prefixes, None, options, seeds)
    assert [c.tokens for [c] in again] == expected, "nothing of it is left in the kept slots"


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
@pytest.mark.parametrize("strategy", STRATEGIES[:-1], ids=str)  # all searches go on to the end
def test_a_caption_that_overflows_half_way_spoils_no_other_one(
    decoder: RuGpt, prefixes: torch.Tensor, strategy: dict[str, float], static: bool
) -> None:
    options, seeds = DecodeOptions.from_dict(strategy | {"max_new_tokens": NEW}), list(range(100))
    expected = [c.tokens for [c] in Generator(decoder).generate(prefixes, None, options, seeds)]
    overflowing = copy.deepcopy(decoder)
    with torch.no_grad():
        overflowing.wpe.weight[5 + 9] = float("nan")  # read with the tenth token
    generator = Generator(overflowing, SLOTS, static=static)
    for _ in range(2):
        found = [candidate for [candidate] in generator.generate(prefixes, None, options, seeds)]
        assert 3 < sum(candidate.is_spoilt for candidate in found) < 97
        assert all(c.is_spoilt or c.tokens == tokens for c, tokens in zip(found, expected, strict=True))
        assert not any(c.is_spoilt for c, tokens in zip(found, expected, strict=True) if len(tokens) < 10)


def test_each_shape_is_captured_once_and_the_captions_are_the_same(decoder: RuGpt, prefixes: torch.Tensor) -> None:
    tape = Tape()
    generator = Generator(decoder, SLOTS, static=True, graphs=tape.graphs)
    options = DecodeOptions(max_new_tokens=NEW)
    expected = Generator(decoder).generate(prefixes, None, options)
    for _ in range(2):  # the second call finds the graphs of the first
        found = generator.generate(prefixes, None, options)
        assert [c.tokens for [c] in found] == [c.tokens for [c] in expected]
        assert 1 < len(tape.captured) <= 6


def test_few_frames_get_few_slots_and_a_larger_loop_serves_them_too(
    decoder: RuGpt, prefixes: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots: list[int] = []
    new_cache = decoder.new_cache

    def counted(count: int, length: int, memory: int) -> object:
        slots.append(count)
        return new_cache(count, length, memory)

    monkeypatch.setattr(decoder, "new_cache", counted)
    generator = Generator(decoder, SLOTS, static=True, graphs=Tape().graphs)
    for frames in (3, 30, 5):
        generator.generate(prefixes[:frames], None, DecodeOptions(max_new_tokens=NEW))
    assert slots == [16, 32]


def test_where_capturing_fails_captions_are_the_same_and_one_warning_says_so(
    decoder: RuGpt, prefixes: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    generator = Generator(decoder, SLOTS, static=True, graphs=Tape(refuses=True).graphs)
    options = DecodeOptions(max_new_tokens=NEW)
    found = generator.generate(prefixes, None, options)
    assert [c.tokens for [c] in found] == [c.tokens for [c] in Generator(decoder).generate(prefixes, None, options)]
    [warning] = [record.message for record in caplog.records]
    assert warning.startswith("a decoding step could not be captured as a CUDA graph")
    assert warning.endswith("operation not permitted when stream is capturing")


def test_no_more_shapes_are_captured_than_allowed_and_one_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tape, ran = Tape(), []
    step = tape.graphs(lambda rows, tokens: ran.append((rows, tokens)))
    shapes = [(rows, 16) for rows in range(MOST_GRAPHS + 5)]
    for _ in range(2):
        for shape in shapes:
            step(*shape)
    assert len(tape.captured) == MOST_GRAPHS
    assert ran == 2 * shapes
    assert [record.message for record in caplog.records] == [
        "64 shapes of a decoding step are captured; others run slower"
    ]
