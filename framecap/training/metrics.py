"""Scores of captions against references, each kept per frame so that it can be resampled.

BLEU-4 and chrF are sacrebleu's; ROUGE-L, CIDEr-D and the two CLIP scores are written out here from their
papers. All compare the words of wording.py. Knows nothing of files, frames or models: texts and similarities in,
numbers out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from framecap.training.wording import plain, words

Texts = Sequence[str]
References = Sequence[Sequence[str]]

ROUGE_BETA = 1.2  # as in the COCO caption evaluation code
CIDER_ORDER = 4
CIDER_SIGMA = 6.0
CHRF_ORDER = 6
CHRF_BETA = 2.0
CLIP_SCORE_WEIGHT = 2.5


@dataclass(frozen=True)
class FrameStatistics:
    """What a corpus score needs of each frame: float64 ``values`` [N, K], and ``score`` of their sum [K].

    ``score`` takes the sum over any multiset of frames and its size, so a bootstrap needs no texts.
    """

    values: np.ndarray
    score: Callable[[np.ndarray, int], float]

    def corpus(self) -> float:
        """The score over all frames, once each."""
        return self.score(self.values.sum(axis=0), len(self.values))


def _mean(total: np.ndarray, count: int) -> float:
    return float(total[0] / count)


def frame_means(values: np.ndarray) -> FrameStatistics:
    """A corpus score that is the mean of per-frame ``values`` [N]."""
    return FrameStatistics(np.asarray(values, dtype=np.float64)[:, None], _mean)


# --- BLEU and chrF -------------------------------------------------------------------------------


def bleu_metric() -> BLEU:
    """sacrebleu's BLEU-4 (exponential smoothing) of `plain` texts, whose words need no tokeniser.

    Of texts that are all shorter than four words, n-grams up to the longest count: equal ones score 100.
    """
    return BLEU(tokenize="none", effective_order=True)


def bleu_statistics(captions: Texts, references: References) -> FrameStatistics:
    """BLEU-4, 0…100: per frame 4 matched n-grams, 4 totals, caption and nearest reference length [N, 10]."""
    metric = bleu_metric()
    rows = np.zeros((len(captions), 10))
    for i, (caption, refs) in enumerate(zip(captions, references, strict=True)):
        found = metric.sentence_score(plain(caption), [plain(reference) for reference in refs])
        rows[i] = [*found.counts, *found.totals, found.sys_len, found.ref_len]
    return FrameStatistics(rows, _bleu_score)


def _bleu_score(total: np.ndarray, _count: int) -> float:
    counts = [int(x) for x in total]
    lengths = counts[8], counts[9]
    bleu = BLEU.compute_bleu(counts[:4], counts[4:8], *lengths, smooth_method="exp", effective_order=True)
    return float(bleu.score)


def chrf_statistics(captions: Texts, references: References) -> FrameStatistics:
    """chrF2, 0…100 (Popović 2015), as sacrebleu counts it: of several references the best one, per frame.

    Values [N, 18]: for each of 6 orders the caption's n-grams, the reference's, and those in common.
    """
    rows = np.zeros((len(captions), 3 * CHRF_ORDER))
    for i, (caption, refs) in enumerate(zip(captions, references, strict=True)):
        candidates = [_chrf_counts(plain(caption), plain(reference)) for reference in refs]
        rows[i] = max(candidates, key=lambda counts: _chrf_score(counts, 1))
    return FrameStatistics(rows, _chrf_score)


def _chrf_counts(caption: str, reference: str) -> np.ndarray:
    left, right = ("".join(text.split()) for text in (caption, reference))
    row = []
    for n in range(1, CHRF_ORDER + 1):
        a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (left, right))
        row += [a.total() if b else 0, b.total(), (a & b).total()]
    return np.array(row, dtype=np.float64)


def _chrf_score(total: np.ndarray, _count: int) -> float:
    caption, reference, common = total.reshape(CHRF_ORDER, 3).T
    usable = (caption > 0) & (reference > 0)
    if not usable.any():
        return 0.0
    precision = float(np.mean(common[usable] / caption[usable]))
    recall = float(np.mean(common[usable] / reference[usable]))
    if precision + recall == 0:
        return 0.0
    factor = CHRF_BETA**2
    return 100 * (1 + factor) * precision * recall / (factor * precision + recall)


# --- ROUGE-L and CIDEr-D -------------------------------------------------------------------------


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of two word lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(captions: Texts, references: References) -> np.ndarray:
    """ROUGE-L per frame, 0…100, float64 [N] (Lin 2004; β = 1.2 and best precision and recall over references,
    as in the COCO caption evaluation of Chen et al. 2015).
    """
    pairs = zip(captions, references, strict=True)
    return np.array([_rouge_l(words(caption), [words(r) for r in refs]) for caption, refs in pairs])


def _rouge_l(caption: list[str], references: list[list[str]]) -> float:
    common = [(longest_common_subsequence(caption, reference), len(reference)) for reference in references]
    precision = max((n / len(caption) for n, _ in common), default=0.0) if caption else 0.0
    recall = max((n / length for n, length in common if length), default=0.0)
    if precision == 0 or recall == 0:
        return 0.0
    beta = ROUGE_BETA**2
    return 100 * (1 + beta) * precision * recall / (recall + beta * precision)


def cider_d(captions: Texts, references: References) -> np.ndarray:
    """CIDEr-D per frame, 0…10, float64 [N] (Vedantam, Zitnick, Parikh 2015, section 3 and appendix).

    With g(s) the vector of an n-gram's count times its idf log(|I| / frames whose references hold it)::

        CIDEr-D_n(c, S) = 10/m Σ_j exp(-(l(c) - l(s_j))² / 2σ²) · min(g(c), g(s_j))·g(s_j) / (‖g(c)‖ ‖g(s_j)‖)
        CIDEr-D = mean over n = 1…4,  σ = 6

    idf comes from the references given; frames whose n-grams are in every frame's references score 0.
    """
    reference_counts = [[_ngrams(words(r)) for r in refs] for refs in references]
    frames_with: Counter[tuple[str, ...]] = Counter()
    for group in reference_counts:
        frames_with.update({ngram for counts in group for ngram in counts})
    log_frames = math.log(len(captions)) if captions else 0.0

    def vector(counts: Counter[tuple[str, ...]]) -> list[dict[tuple[str, ...], float]]:
        orders: list[dict[tuple[str, ...], float]] = [{} for _ in range(CIDER_ORDER)]
        for ngram, count in counts.items():
            orders[len(ngram) - 1][ngram] = count * (log_frames - math.log(max(1, frames_with[ngram])))
        return orders

    scores = np.zeros(len(captions))
    for i, (caption, group) in enumerate(zip(captions, reference_counts, strict=True)):
        own = _ngrams(words(caption))
        own_vector, own_length = vector(own), _length(own)
        terms = [
            _cider_similarity(own_vector, vector(counts))
            * math.exp(-((own_length - _length(counts)) ** 2) / (2 * CIDER_SIGMA**2))
            for counts in group
        ]
        scores[i] = 10 * sum(terms) / len(terms) if terms else 0.0
    return scores


def _ngrams(tokens: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, CIDER_ORDER + 1) for i in range(len(tokens) - n + 1))


def _length(counts: Counter[tuple[str, ...]]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 1)


def _cider_similarity(
    caption: list[dict[tuple[str, ...], float]], reference: list[dict[tuple[str, ...], float]]
) -> float:
    total = 0.0
    for own, other in zip(caption, reference, strict=True):
        norm = math.sqrt(sum(v * v for v in own.values())) * math.sqrt(sum(v * v for v in other.values()))
        if norm:
            total += sum(min(v, other[g]) * other[g] for g, v in own.items() if g in other) / norm
    return total / CIDER_ORDER


# --- CLIP scores ---------------------------------------------------------------------------------


def clip_score(image_cosine: np.ndarray) -> np.ndarray:
    """CLIPScore per frame from cosines of frame and caption [N]: 2.5·max(cos, 0) (Hessel et al. 2021)."""
    return CLIP_SCORE_WEIGHT * np.maximum(np.asarray(image_cosine, dtype=np.float64), 0)


def ref_clip_score(image_cosine: np.ndarray, reference_cosine: np.ndarray) -> np.ndarray:
    """RefCLIPScore per frame [N]: harmonic mean of CLIPScore and the best cosine of caption and reference,
    at least 0 (Hessel et al. 2021, section 3). ``reference_cosine`` [N] is that best cosine.
    """
    image = clip_score(image_cosine)
    text = np.maximum(np.asarray(reference_cosine, dtype=np.float64), 0)
    both = image + text
    return np.divide(2 * image * text, both, out=np.zeros_like(both), where=both > 0)


# --- figures and intervals -----------------------------------------------------------------------


def length_figures(captions: Texts) -> dict[str, float]:
    """Words per caption: mean, median, shortest, longest; characters: mean."""
    lengths = np.array([len(words(c)) for c in captions])
    return {
        "words_mean": float(lengths.mean()),
        "words_median": float(np.median(lengths)),
        "words_min": float(lengths.min()),
        "words_max": float(lengths.max()),
        "characters_mean": float(np.mean([len(c) for c in captions])),
    }


def vocabulary_figures(captions: Texts, references: References) -> dict[str, float]:
    """How rich the wording is: distinct words, distinct captions, distinct-2, words the references share."""
    tokens = [words(c) for c in captions]
    used = {w for t in tokens for w in t}
    known = {w for refs in references for r in refs for w in words(r)}
    pairs = [pair for t in tokens for pair in pairwise(t)]
    return {
        "distinct_words": len(used),
        "reference_distinct_words": len(known),
        "reference_words_used": len(used & known) / len(known) if known else 0.0,
        "distinct_captions": len(set(captions)) / len(captions),
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
    }


@dataclass(frozen=True)
class Interval:
    """``difference`` (first less second) with its bootstrap interval, and whether that leaves out zero."""

    difference: float
    low: float
    high: float
    confidence: float

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``no difference shown``, of the first against the second."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def paired_bootstrap(
    first: FrameStatistics,
    second: FrameStatistics,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the score difference, the same frames drawn for both (Koehn 2004).

    Both hold the same frames in the same order; ``samples`` draws of N frames with replacement.
    """
    count = len(first.values)
    rng = np.random.default_rng(seed)
    differences = np.empty(samples)
    for i in range(samples):
        weight = np.bincount(rng.integers(count, size=count), minlength=count)
        ours, theirs = weight @ first.values, weight @ second.values
        differences[i] = first.score(ours, count) - second.score(theirs, count)
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(first.corpus() - second.corpus(), float(low), float(high), confidence)
