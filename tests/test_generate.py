"""Captions equal those of transformers.generate on the same weights, whatever else is in the batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from framecap.errors import BridgeMismatchError, PositionLimitError
from framecap.model.generate import Candidate, DecodeOptions, FrameBatch, Generator, generate
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
from framecap.model.search import sample

FRAMES, NEW = 64, 20
# An id that the random decoder below emits early in some captions, late in some and never in others.
EOS = {"prefix": 84, "cross_attention": 30}


class Pair:
    """A random decoder, transformers' model with the same weights, and what 64 frames give them to read.

    ``static``: steps in few shapes, the host one step behind, as on a GPU; here without graphs.
    """

    def __init__(self, kind: str, static: bool) -> None:
        torch.manual_seed(1)
        self.static = static
        crosses = kind == "cross_attention"
        config = RuGptConfig(97, 64, 32, 2, 4, cross_attention=crosses, eos_token_id=EOS[kind])
        self.decoder = RuGpt.from_config(config)
        with torch.no_grad():
            for name, parameter in self.decoder.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                else:
                    parameter.mul_(30 if name == "wte.weight" else 20)
        shape = GPT2Config(**config.to_json(), add_cross_attention=crosses)
        self.reference = GPT2LMHeadModel(shape).eval()
        state = self.decoder.published_state() | {"lm_head.weight": self.decoder.wte.weight}
        self.reference.load_state_dict(state)
        self.memory = torch.randn(FRAMES, 7, 32) * 2 if crosses else None
        self.prefix = None if crosses else torch.randn(FRAMES, 5, 32)

    def ours(
        self, options: DecodeOptions, rows: slice = slice(0, FRAMES), max_rows: int | None = None
    ) -> list[list[Candidate]]:
        prefix = None if self.prefix is None else self.prefix[rows]
        memory = None if self.memory is None else self.memory[rows]
        seeds = list(range(FRAMES))[rows]
        return Generator(self.decoder, max_rows, self.static).generate(prefix, memory, options, seeds)

    def theirs(self, **options: float) -> tuple[list[list[int]], Tensor | None]:
        bos = torch.ones(FRAMES, 1, dtype=torch.long)
        prefix = self.decoder.embed(bos).detach() if self.prefix is None else self.prefix
        memory = {} if self.memory is None else {"encoder_hidden_states": self.memory}
        out = self.reference.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2]),
            do_sample=False,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            output_scores=True,
            **memory,
            **options,
        )
        eos = self.decoder.config.eos_token_id
        tokens = [row[: row.index(eos)] if eos in row else row for row in out.sequences.tolist()]
        return tokens, out.get("sequences_scores")


@pytest.fixture(scope="module", params=[False, True], ids=["exact", "static"])
def static(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture(scope="module", params=list(EOS))
def pair(request: pytest.FixtureRequest, static: bool) -> Pair:
    return Pair(request.param, static)


@pytest.fixture(scope="module")
def prefixed(static: bool) -> Pair:
    return Pair("prefix", static)


@pytest.fixture(scope="module")
def speaking(data: Path) -> RuGpt:
    return RuGpt.from_pretrained(data / "rugpt3-tiny")


def test_greedy_equals_transformers_token_for_token(pair: Pair) -> None:
    tokens, _ = pair.theirs()
    found = [candidates[0] for candidates in pair.ours(DecodeOptions(max_new_tokens=NEW))]
    assert [candidate.tokens for candidate in found] == tokens
    assert 0 < sum(candidate.truncated for candidate in found) < FRAMES


BEAMS = [
    {"num_beams": 2},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 5, "num_return_sequences": 5},
    {"num_beams": 2, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 5, "length_penalty": 0.3, "num_return_sequences": 5},
]
PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "num_return_sequences": 3},
    {"num_beams": 5, "repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", BEAMS + PENALTIES, ids=str)
def test_beams_and_penalties_equal_transformers_with_their_scores(pair: Pair, options: dict[str, float]) -> None:
    tokens, scores = pair.theirs(**options)
    found = pair.ours(DecodeOptions.from_dict(options | {"max_new_tokens": NEW}))
    flat = [candidate for candidates in found for candidate in candidates]
    assert [candidate.tokens for candidate in flat] == tokens
    if scores is not None:
        ours = torch.tensor([candidate.score for candidate in flat])
        torch.testing.assert_close(ours, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", [-18.0, -12.0])
def test_a_strongly_negative_length_penalty_gives_the_shortest_captions(pair: Pair, penalty: float) -> None:
    """transformers fills unfinished places with -1e9, above such scores, and returns those; a gentler -4 it can do."""
    tokens, _ = pair.theirs(num_beams=3, length_penalty=-4.0)
    found = pair.ours(DecodeOptions(num_beams=3, length_penalty=penalty, max_new_tokens=NEW))
    assert [candidates[0].tokens for candidates in found] == tokens


def test_beams_whose_tokens_are_all_banned_still_end_in_a_caption(prefixed: Pair) -> None:
    decoder = RuGpt.from_config(RuGptConfig(8, 32, 32, 1, 4, eos_token_id=None))
    options = DecodeOptions(num_beams=2, no_repeat_ngram_size=1, max_new_tokens=12)
    found = Generator(decoder, static=prefixed.static).generate(torch.randn(3, 2, 32), None, options)
    assert [len(candidates[0].tokens) for candidates in found] == [12, 12, 12]


STRATEGIES = [
    {},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 5, "length_penalty": 0.5, "no_repeat_ngram_size": 3},
    {"do_sample": True, "temperature": 1.5},
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "num_return_sequences": 3},
    {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_caption_is_the_same_alone_and_in_batches_of_7_and_64(pair: Pair, strategy: dict[str, float]) -> None:
    options = DecodeOptions.from_dict(strategy | {"max_new_tokens": NEW})
    together = [[c.tokens for c in found] for found in pair.ours(options)]
    for size in (1, 7):
        parts = [pair.ours(options, slice(at, at + size)) for at in range(0, FRAMES, size)]
        assert [[c.tokens for c in found] for part in parts for found in part] == together


@pytest.mark.parametrize("rows", [1, 5, 13])
@pytest.mark.parametrize("strategy", [STRATEGIES[0], STRATEGIES[2], STRATEGIES[5]], ids=str)
def test_frames_that_take_over_slots_get_the_captions_they_would_get_in_one_go(
    prefixed: Pair, strategy: dict[str, float], rows: int
) -> None:
    options = DecodeOptions.from_dict(strategy | {"max_new_tokens": NEW})
    few, many = prefixed.ours(options, max_rows=rows), prefixed.ours(options, max_rows=1000)
    assert [[c.tokens for c in found] for found in few] == [[c.tokens for c in found] for found in many]


@torch.no_grad()
def test_every_candidate_carries_the_log_probabilities_that_the_decoder_gave_its_tokens(
    prefixed: Pair,
) -> None:
    decoder, eos = prefixed.decoder, EOS["prefix"]
    assert prefixed.prefix is not None
    for strategy in ({}, {"num_beams": 3, "repetition_penalty": 1.3}, {"do_sample": True, "temperature": 2.0}):
        found = prefixed.ours(DecodeOptions.from_dict(strategy | {"max_new_tokens": NEW}), slice(0, 8))
        for row, (candidate, *_) in enumerate(found):
            tokens = torch.tensor(candidate.tokens + [eos] * (not candidate.truncated))
            read = torch.cat((prefixed.prefix[row], decoder.embed(tokens[:-1])))
            logprobs = decoder.logits(decoder.hidden_train(read[None]))[0, 4:].log_softmax(-1)
            expected = logprobs.gather(1, tokens[:, None])[:, 0]
            assert candidate.logprob == pytest.approx(expected.mean().item(), abs=1e-4)
            assert candidate.min_logprob == pytest.approx(expected.min().item(), abs=1e-4)


def test_sampling_with_a_seed_repeats_and_another_seed_differs(prefixed: Pair) -> None:
    options = DecodeOptions(do_sample=True, temperature=2.0, max_new_tokens=NEW)

    def run(seed: int) -> list[list[int]]:
        generator = Generator(prefixed.decoder, static=prefixed.static)
        found = generator.generate(prefixed.prefix, None, replace(options, seed=seed))
        return [candidates[0].tokens for candidates in found]

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_samples_of_one_frame_differ_and_the_first_does_not_depend_on_how_many_there_are(
    prefixed: Pair,
) -> None:
    options = DecodeOptions(do_sample=True, temperature=5.0, max_new_tokens=NEW)
    one, four = prefixed.ours(options), prefixed.ours(replace(options, num_return_sequences=4))
    assert [found[0].tokens for found in one] == [found[0].tokens for found in four]
    assert sum(len({tuple(c.tokens) for c in found}) > 1 for found in four) > FRAMES / 2


def test_sampling_from_one_token_is_greedy(prefixed: Pair) -> None:
    greedy = prefixed.ours(DecodeOptions(max_new_tokens=NEW))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6, "top_k": 0}):
        found = prefixed.ours(DecodeOptions(do_sample=True, max_new_tokens=NEW, **narrow))
        assert [c[0].tokens for c in found] == [c[0].tokens for c in greedy]


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (8, 1.0, 1.0), (0, 0.7, 0.8), (12, 0.9, 1.7)]
)
def test_draws_have_the_frequencies_of_the_warped_distribution(top_k: int, top_p: float, temperature: float) -> None:
    torch.manual_seed(3)
    logits = torch.randn(1, 30) * 2
    warped = logits / temperature
    if top_k:
        warped = TopKLogitsWarper(top_k)(torch.empty(1, 0), warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(torch.empty(1, 0), warped)
    options = DecodeOptions(do_sample=True, top_k=top_k, top_p=top_p, temperature=temperature)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = sample(logits.expand(20_000, -1), uniform, options)
    found = torch.bincount(drawn, minlength=30) / 20_000
    torch.testing.assert_close(found, warped.softmax(-1)[0], atol=2e-4, rtol=0)


def test_a_stop_text_ends_the_caption_and_stays_in_it(speaking: RuGpt, static: bool) -> None:
    prefix = torch.randn(16, 4, 64, generator=torch.Generator().manual_seed(0))
    free = generate(speaking, prefix, None, DecodeOptions(max_new_tokens=30))
    for frame, (whole, *_) in enumerate(free):
        stop = whole.text[len(whole.text) // 2]
        options = DecodeOptions(max_new_tokens=30, stop=(stop,))
        found = Generator(speaking, static=static).generate(prefix[frame, None], None, options)[0][0]
        assert found.text == whole.text[: whole.text.index(stop) + 1]
        assert not found.truncated
        assert found.tokens == whole.tokens[: len(found.tokens)]
        assert stop not in speaking.tokenizer.decode(found.tokens[:-1])


def test_beams_end_at_a_stop_text_too(speaking: RuGpt, static: bool) -> None:
    prefix = torch.randn(16, 4, 64, generator=torch.Generator().manual_seed(0))
    options = DecodeOptions(max_new_tokens=30, num_beams=3, num_return_sequences=3, stop=("а", "о"))
    for found in Generator(speaking, static=static).generate(prefix, None, options):
        for candidate in found:
            ended = candidate.text.endswith(("а", "о"))
            assert ended or candidate.truncated or not set("ао") & set(candidate.text)
            assert not set("ао") & set(candidate.text[:-1])


def test_a_special_token_as_stop_ends_the_caption_and_leaves_no_trace(speaking: RuGpt) -> None:
    prefix = torch.randn(8, 4, 64, generator=torch.Generator().manual_seed(0))
    plain = generate(speaking, prefix, None, DecodeOptions(max_new_tokens=30))
    named = generate(speaking, prefix, None, DecodeOptions(max_new_tokens=30, stop=("</s>",)))
    assert [found[0].text for found in plain] == [found[0].text for found in named]


def test_a_caption_cut_at_its_greatest_length_says_so(prefixed: Pair) -> None:
    short = prefixed.ours(DecodeOptions(max_new_tokens=2))
    for found in short:
        assert found[0].truncated == (len(found[0].tokens) == 2)


def test_more_new_tokens_than_positions_are_refused_with_the_numbers(prefixed: Pair) -> None:
    with pytest.raises(PositionLimitError, match=r"5 prefix .* 60 new tokens = 65.*n_positions = 64"):
        prefixed.ours(DecodeOptions(max_new_tokens=60))


def test_a_prefix_of_the_wrong_width_is_refused(prefixed: Pair) -> None:
    with pytest.raises(BridgeMismatchError, match=r"\[2, 5, 31\].*32"):
        generate(prefixed.decoder, torch.randn(2, 5, 31), None, DecodeOptions())


def test_a_memory_for_a_decoder_that_cannot_read_it_is_refused(prefixed: Pair) -> None:
    with pytest.raises(BridgeMismatchError, match="memory given: True"):
        generate(prefixed.decoder, prefixed.prefix, torch.randn(FRAMES, 3, 32), DecodeOptions())


def test_batches_run_into_each_other_and_are_fetched_only_when_slots_are_free(prefixed: Pair) -> None:
    given: list[FrameBatch] = []
    unfinished: list[int] = []
    assert prefixed.prefix is not None
    prefix = prefixed.prefix

    def batches() -> Iterator[FrameBatch]:
        for at in range(0, FRAMES, 8):
            unfinished.append(sum(batch.missing for batch in given))
            given.append(FrameBatch(prefix[at : at + 8], None, list(range(at, at + 8))))
            yield given[-1]

    options = DecodeOptions(max_new_tokens=NEW)
    done = list(Generator(prefixed.decoder, 8, prefixed.static).stream(batches(), options))
    assert sorted(map(id, done)) == sorted(map(id, given))
    found = [candidates[0].tokens for batch in given for candidates in batch.candidates]
    assert found == [c[0].tokens for c in prefixed.ours(options)]
    assert 0 < max(unfinished[2:]) < 24


def test_no_frames_give_no_captions(prefixed: Pair) -> None:
    assert generate(prefixed.decoder, torch.empty(0, 5, 32), None, DecodeOptions()) == []


PEAK = """
import resource, sys, torch
from framecap.model.generate import DecodeOptions, FrameBatch, Generator
from framecap.model.rugpt import RuGpt
from framecap.model.rugpt_config import RuGptConfig
torch.manual_seed(0)
decoder = RuGpt.from_config(RuGptConfig(500, 64, 128, 2, 4, eos_token_id=None))
def peak(frames):
    batches = (FrameBatch(torch.randn(128, 4, 128), None, [0] * 128) for _ in range(frames // 128))
    done = sum(len(b.seeds) for b in Generator(decoder).stream(batches, DecodeOptions(max_new_tokens=12)))
    assert done == frames
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak(512), peak(4096))
"""


def test_4096_frames_need_no_more_memory_than_512() -> None:
    out = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True).stdout
    few, many = map(int, out.split())
    assert many - few < 4096  # KiB
