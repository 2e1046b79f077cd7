"""Metrics against sacrebleu, hand-worked cases and their own definitions."""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF

from framecap.training import metrics
from framecap.training.wording import plain, words

VOCABULARY = ["красный", "автобус", "едет", "по", "мосту", "ночью", "слева", "растёт", "дерево", "Дом", ","]


def some_texts(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def text(shortest: int) -> str:
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(shortest, 9)))

    captions = [text(0) for _ in range(count)]
    return captions, [[text(1) for _ in range(rng.randint(1, 3))] for _ in range(count)]


def as_streams(references: list[list[str]]) -> list[list[str | None]]:
    return [[refs[k] if k < len(refs) else None for refs in references] for k in range(3)]


def test_bleu_from_frame_statistics_is_sacrebleu_corpus_bleu() -> None:
    captions, references = some_texts(60, 1)
    streams = [[text and plain(text) for text in stream] for stream in as_streams(references)]
    expected = metrics.bleu_metric().corpus_score([plain(text) for text in captions], streams).score
    assert metrics.bleu_statistics(captions, references).corpus() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chrf_from_frame_statistics_is_sacrebleu_corpus_chrf(seed: int) -> None:
    captions, references = some_texts(60, seed)
    streams = [[text and plain(text) for text in stream] for stream in as_streams(references)]
    expected = CHRF().corpus_score([plain(text) for text in captions], streams).score
    assert metrics.chrf_statistics(captions, references).corpus() == pytest.approx(expected, abs=1e-9)


def test_cider_d_of_two_frames_worked_out_by_hand() -> None:
    # |I| = 2; «дом» is in both frames' references: idf 0. «стоит», «горит», both bigrams: idf ln 2.
    # Frame 1, same words: orders 1 and 2 give cosine 1, orders 3 and 4 have no n-gram: 10·(1+1)/4 = 5.
    # Frame 2, «горит» for «дом горит»: order 1 gives 1, the rest 0, one word short: 10·1/4·exp(-1/72).
    scores = metrics.cider_d(["дом стоит", "горит"], [["дом стоит"], ["дом горит"]])
    assert scores == pytest.approx([5.0, 2.5 * math.exp(-1 / 72)])


def test_cider_d_clips_a_repeated_word_worked_out_by_hand() -> None:
    # «стоит стоит» against «дом стоит»: g(c) = 2 ln 2, g(s) = ln 2, min = ln 2:
    # cosine of order 1 = ln2·ln2 / (2 ln2 · ln2) = 1/2; equal length; 10·(1/2)/4 = 1.25.
    assert metrics.cider_d(["стоит стоит", "горит"], [["дом стоит"], ["дом горит"]])[0] == pytest.approx(1.25)


def test_cider_d_averages_over_references_worked_out_by_hand() -> None:
    # The first reference gives 5 as above; the second shares nothing: (5 + 0) / 2.
    scores = metrics.cider_d(["дом стоит", "горит"], [["дом стоит", "кот спит"], ["дом горит"]])
    assert scores[0] == pytest.approx(2.5)


def test_cider_d_and_rouge_l_are_those_of_the_coco_caption_code() -> None:
    # Values of pycocoevalcap 1.2 (Cider, Rouge), given the same words.
    captions = [
        "Ночью по мосту едет красный автобус", "Собака бежит по зелёной траве за мячом",
        "Двое детей играют играют на пляже", "Мужчина стоит у старого дома",
    ]  # fmt: skip
    references = [
        ["Ночью по мосту едет красный автобус, слева растёт дерево.", "Красный автобус на мосту ночью."],
        ["Чёрная собака бежит по траве."],
        ["Двое детей играют в мяч на пляже.", "Дети играют на пляже с мячом.", "Пляж, дети, мяч."],
        ["Женщина в синем пальто ждёт автобус у моста."],
    ]
    cider = [4.625661311886105, 3.0673677134442894, 2.0326185298332446, 0.3870004927127168]
    rouge = [77.21518987341773, 68.7323943661972, 75.87064676616916, 14.769975786924942]
    assert metrics.cider_d(captions, references) == pytest.approx(cider, abs=1e-12)
    assert metrics.rouge_l(captions, references) == pytest.approx(rouge, abs=1e-12)


def test_rouge_l_worked_out_by_hand() -> None:
    # LCS of «красный дом у реки» and «дом стоит у реки» is «дом у реки»: P = R = 3/4, so F = 75.
    assert metrics.rouge_l(["красный дом у реки"], [["Дом стоит у реки."]]) == pytest.approx([75.0])


def test_rouge_l_takes_the_best_reference() -> None:
    one = metrics.rouge_l(["кот спит"], [["кот спит"]])
    assert metrics.rouge_l(["кот спит"], [["дом горит", "кот спит"]]) == pytest.approx(one)


def test_ref_clip_score_is_the_harmonic_mean_of_its_two_parts() -> None:
    # CLIPScore of cosine 0.3 is 0.75; with reference cosine 0.5: 2·0.75·0.5 / 1.25 = 0.6.
    assert metrics.ref_clip_score(np.array([0.3, -0.1]), np.array([0.5, 0.9])) == pytest.approx([0.6, 0.0])


def test_an_empty_caption_scores_zero_everywhere() -> None:
    captions, references = ["", "кот спит"], [["дом стоит"], ["кот спит"]]
    assert metrics.rouge_l(captions, references)[0] == 0
    assert metrics.cider_d(captions, references)[0] == 0
    assert metrics.chrf_statistics(captions[:1], references[:1]).corpus() == 0


def test_words_ignore_case_punctuation_and_the_dots_of_yo() -> None:
    assert words("Ёлка, тёмно-синяя!") == ["елка", "темно-синяя"]


SEEN = ["Белая кошка сидит на траве у дома", "Чёрный йод стоит в поле", "Тёмно-синий замок"]


@pytest.mark.parametrize(
    "written",
    [
        lambda text: text,
        lambda text: text.replace("ё", "е"),
        lambda text: text + ".",
        str.upper,
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: text.replace("о", "о\u0301"),
        lambda text: text.replace("ш", "ш\u00ad"),
        lambda text: text.replace("-", "\u2011").replace(" ", "\u00a0"),
        lambda text: f"\ufeff«{text}»",
    ],
    ids=["as it is", "е for ё", "full stop", "capitals", "NFD", "stress", "soft hyphen", "no-break", "quotes"],
)
def test_what_reads_the_same_gets_full_marks_in_every_score(written: Callable[[str], str]) -> None:
    captions, references = [written(text) for text in SEEN], [[text] for text in SEEN]
    assert metrics.bleu_statistics(captions, references).corpus() == pytest.approx(100)
    assert metrics.chrf_statistics(captions, references).corpus() == pytest.approx(100)
    assert metrics.rouge_l(captions, references) == pytest.approx([100, 100, 100])
    assert metrics.cider_d(captions, references)[:2] == pytest.approx([10, 10])


def test_equal_texts_of_three_words_get_full_bleu() -> None:
    assert metrics.bleu_statistics(["кот спит дома"], [["Кот спит дома."]]).corpus() == pytest.approx(100)


def test_bootstrap_interval_holds_the_difference_and_sees_a_real_one() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=400)
    interval = metrics.paired_bootstrap(
        metrics.frame_means(noise + 0.2), metrics.frame_means(noise + rng.normal(scale=0.5, size=400))
    )
    assert interval.low < interval.difference < interval.high
    assert interval.verdict == "better"


def test_bootstrap_of_the_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(size=1000)
    nothing = metrics.frame_means(values * 0)
    interval = metrics.paired_bootstrap(metrics.frame_means(values), nothing, samples=4000)
    half = 1.96 * values.std() / math.sqrt(1000)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.06)


def test_bootstrap_of_a_run_against_itself_shows_no_difference() -> None:
    captions, references = some_texts(30, 4)
    statistics = metrics.chrf_statistics(captions, references)
    interval = metrics.paired_bootstrap(statistics, statistics, samples=50)
    assert (interval.low, interval.high, interval.verdict) == (0.0, 0.0, "no difference shown")
