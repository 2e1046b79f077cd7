"""Threads that caption with one decoder share its slots; what one does wrong costs the others nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from framecap.errors import PositionLimitError
from framecap.model.generate import Candidate, DecodeOptions, Generator
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig

OPTIONS = DecodeOptions(max_new_tokens=20)
Answers = list[list[Candidate]]


class Steps:
    """Counts steps and does something of its own at the second; records nothing."""

    def __init__(self, event: Callable[[], None] = lambda: None) -> None:
        self.taken, self.event = 0, event

    def warm_up(self, run: Callable[[], None]) -> None:
        self.taken += 1
        if self.taken == 2:
            self.event()
        run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return lambda: self.warm_up(run)


@pytest.fixture(scope="module")
def decoder() -> RuGpt:
    torch.manual_seed(2)
    model = RuGpt.from_config(RuGptConfig(97, 64, 32, 2, 4, eos_token_id=84))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30 if name == "wte.weight" else 20) if parameter.dim() > 1 else parameter.add_(0.1)
    return model


@pytest.fixture(scope="module")
def prefixes() -> Tensor:
    return torch.randn(60, 5, 32, generator=torch.Generator().manual_seed(3))


def tokens(answers: Answers) -> list[list[int]]:
    return [candidate.tokens for [candidate] in answers]


def arrive_midway(generator: Generator, steps: Steps, then: Callable[[], Answers]) -> Future[Answers]:
    """Have ``then`` called by another thread at the second step, which waits until its frames have arrived."""
    pool, called = ThreadPoolExecutor(1), Future[Answers]()

    def event() -> None:
        pool.submit(lambda: called.set_result(then()))
        deadline = time.monotonic() + 30
        while not generator._shared._arrived and time.monotonic() < deadline:
            time.sleep(0.001)

    steps.event = event
    return called


def test_frames_that_arrive_midway_take_part_and_none_drains_alone(decoder: RuGpt, prefixes: Tensor) -> None:
    alone = Steps()
    expected = [
        tokens(Generator(decoder, 32, static=True, recorder=lambda: alone).generate(part, None, OPTIONS))
        for part in (prefixes[:40], prefixes[40:])
    ]
    steps = Steps()
    generator = Generator(decoder, 32, static=True, recorder=lambda: steps)
    second = arrive_midway(generator, steps, lambda: generator.generate(prefixes[40:], None, OPTIONS))
    first = generator.generate(prefixes[:40], None, OPTIONS)
    assert [tokens(first), tokens(second.result(60))] == expected
    assert steps.taken < 0.9 * alone.taken


def test_an_error_of_the_device_ends_one_call_and_the_others_get_their_captions(
    decoder: RuGpt, prefixes: Tensor
) -> None:
    steps = Steps()
    generator = Generator(decoder, 32, static=True, recorder=lambda: steps)
    second = arrive_midway(generator, steps, lambda: generator.generate(prefixes[40:], None, OPTIONS))
    arrive = steps.event

    def fail() -> None:
        arrive()
        raise RuntimeError("CUDA out of memory")

    steps.event = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        generator.generate(prefixes[:40], None, OPTIONS)
    assert tokens(second.result(60)) == tokens(Generator(decoder).generate(prefixes[40:], None, OPTIONS))
    assert tokens(generator.generate(prefixes[:40], None, OPTIONS)) == tokens(
        Generator(decoder).generate(prefixes[:40], None, OPTIONS)
    )


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
def test_many_threads_with_different_options_get_what_they_asked_for(
    decoder: RuGpt, prefixes: Tensor, static: bool
) -> None:
    kinds = [OPTIONS, DecodeOptions(max_new_tokens=12), DecodeOptions(max_new_tokens=20, num_beams=3)]
    expected = [tokens(Generator(decoder).generate(prefixes, None, kind)) for kind in kinds]
    generator = Generator(decoder, 32, static)
    with ThreadPoolExecutor(6) as pool:
        asked = [
            (kind, at, pool.submit(generator.generate, prefixes[at : at + 10], None, kinds[kind]))
            for at in range(0, 60, 10)
            for kind in range(3)
        ]
    for kind, at, answer in asked:
        assert tokens(answer.result()) == expected[kind][at : at + 10]


def test_a_call_that_asks_for_too_much_is_refused_before_it_joins_the_others(decoder: RuGpt, prefixes: Tensor) -> None:
    generator = Generator(decoder)
    with pytest.raises(PositionLimitError):
        generator.generate(prefixes, None, DecodeOptions(max_new_tokens=60))
    assert len(generator.generate(prefixes[:3], None, OPTIONS)) == 3
