"""Captions against references: are tonight's weights better than yesterday's?

``evaluate`` reads, matches, scores and compares; ``format_table`` prints what a person wants of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import sacrebleu

from framecap.errors import EvaluationError
from framecap.storage import write_bytes_atomic
from framecap.training import metrics
from framecap.training.metrics import FrameStatistics
from framecap.training.places import reach
from framecap.training.scored_texts import ScoredTexts, read_captions, read_references
from framecap.training.settings import EvaluateSettings
from framecap.training.similarity import Cosines, measure_cosines
from framecap.training.wording import plain

REPORT_VERSION = 1
TITLES = {
    "bleu4": "BLEU-4",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "ruclip_score": "ruCLIP score",
    "ref_ruclip_score": "ref. ruCLIP score",
}


@dataclass(frozen=True)
class Scores:
    """All scores of one caption dataset, by the names in ``TITLES``."""

    texts: ScoredTexts
    statistics: dict[str, FrameStatistics]

    def corpus(self) -> dict[str, float | None]:
        """One figure a score; None where it could not be computed."""
        return {name: self.statistics[name].corpus() if name in self.statistics else None for name in TITLES}


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """The whole report as a JSON-able dict; written to ``settings.output`` if that is given.

    Raises EvaluationError when captions and references share no frame or cannot be read.
    """
    places = (settings.captions, settings.references, settings.against, settings.captioner, settings.frames)
    reach(settings.storage_options, (*places, settings.output))
    references = read_references(settings.references, settings.id_column, settings.reference_column)
    first = read_captions(settings.captions, references, settings.id_column, settings.caption_column)
    second = None
    if settings.against:
        second = read_captions(settings.against, references, settings.id_column, settings.caption_column)
    ids = [i for i in references if i in first and (second is None or i in second)]
    if not ids:
        wrong = settings.against if second is not None and not second else settings.captions
        raise EvaluationError(
            f"{wrong} and {settings.references} share no {settings.id_column}; "
            f"references are named like {next(iter(references))!r}"
        )
    scores = score(ScoredTexts.of(ids, first, references), settings)
    report = describe(scores, settings) | {"references_without_caption": len(references) - len(ids)}
    if second is not None:
        other = score(ScoredTexts.of(ids, second, references), settings)
        report["against"] = compare(scores, other, settings)
    if settings.output:
        text = json.dumps(report, ensure_ascii=False, indent=1)
        write_bytes_atomic(settings.output, (text + "\n").encode())
    return report


def score(texts: ScoredTexts, settings: EvaluateSettings) -> Scores:
    """Every score that captions, references and, if given, the captioner allow."""
    captions, references = texts.captions, texts.references
    statistics = {
        "bleu4": metrics.bleu_statistics(captions, references),
        "chrf": metrics.chrf_statistics(captions, references),
        "rouge_l": metrics.frame_means(metrics.rouge_l(captions, references)),
        "cider_d": metrics.frame_means(metrics.cider_d(captions, references)),
    }
    cosines = measure_cosines(texts, settings)
    return Scores(texts, statistics | _clip_statistics(cosines))


def _clip_statistics(cosines: Cosines) -> dict[str, FrameStatistics]:
    if cosines.image is None:
        return {}
    found = {"ruclip_score": metrics.frame_means(metrics.clip_score(cosines.image))}
    if cosines.reference is not None:
        both = metrics.ref_clip_score(cosines.image, cosines.reference)
        found["ref_ruclip_score"] = metrics.frame_means(both)
    return found


def describe(scores: Scores, settings: EvaluateSettings) -> dict[str, Any]:
    """The report on one caption dataset."""
    texts = scores.texts
    worst, best = _examples(scores, settings.examples)
    return {
        "report_version": REPORT_VERSION,
        "captions": settings.captions,
        "references": settings.references,
        "frames": len(texts.ids),
        "captions_with_error": texts.errors,
        "captions_truncated": texts.truncated,
        "scores": scores.corpus(),
        "signatures": {"bleu4": _bleu_signature(texts), "sacrebleu": sacrebleu.__version__},
        "length": metrics.length_figures(texts.captions),
        "vocabulary": metrics.vocabulary_figures(texts.captions, texts.references),
        "worst": worst,
        "best": best,
    }


def _bleu_signature(texts: ScoredTexts) -> str:
    metric = metrics.bleu_metric()
    most = max(len(refs) for refs in texts.references)
    streams = [[plain(refs[k]) if k < len(refs) else None for refs in texts.references] for k in range(most)]
    metric.corpus_score([plain(caption) for caption in texts.captions], streams)
    return str(metric.get_signature())


def _examples(scores: Scores, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The ``count`` lowest and highest frames by CIDEr-D, then chrF of the frame alone."""
    cider = scores.statistics["cider_d"].values[:, 0]
    chrf = scores.statistics["chrf"]
    alone = np.array([chrf.score(row, 1) for row in chrf.values])
    order = np.lexsort((alone, cider))

    def example(i: int) -> dict[str, Any]:
        texts = scores.texts
        return {
            "frame_id": texts.ids[i],
            "caption": texts.captions[i],
            "references": texts.references[i],
            "cider_d": round(float(cider[i]), 4),
            "chrf": round(float(alone[i]), 2),
        }

    worst = [example(i) for i in order[:count]]
    return worst, [example(i) for i in order[::-1][:count]]


def compare(first: Scores, second: Scores, settings: EvaluateSettings) -> dict[str, Any]:
    """Scores of the second dataset, and the first's gain over it with a paired bootstrap interval."""
    differences = {}
    for name in TITLES:
        if name in first.statistics and name in second.statistics:
            interval = metrics.paired_bootstrap(
                first.statistics[name],
                second.statistics[name],
                settings.bootstrap_samples,
                settings.confidence,
                settings.seed,
            )
            differences[name] = asdict(interval) | {"verdict": interval.verdict}
    return {
        "captions": settings.against,
        "captions_with_error": second.texts.errors,
        "scores": second.corpus(),
        "difference": differences,
        "bootstrap_samples": settings.bootstrap_samples,
    }


def format_table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    against = report.get("against")
    lines = [f"{report['frames']} frames of {report['captions']}"]
    if report["references_without_caption"]:
        lines.append(f"{report['references_without_caption']} references have no caption and are left out")
    if report["captions_with_error"]:
        lines.append(f"{report['captions_with_error']} captions failed and count as empty")
    header = f"{'score':<20}{'captions':>10}"
    lines += ["", header + (f"{'against':>10}{'difference':>12}   interval" if against else "")]
    for name, title in TITLES.items():
        line = f"{title:<20}{_figure(report['scores'][name]):>10}"
        if against:
            line += f"{_figure(against['scores'][name]):>10}" + _interval(against["difference"].get(name))
        lines.append(line)
    length, vocabulary = report["length"], report["vocabulary"]
    lines += [
        "",
        "words per caption    {words_mean:.1f} ({words_min:.0f} to {words_max:.0f})".format(**length),
        "distinct words       {distinct_words}".format(**vocabulary),
        "  of the references' {reference_distinct_words}: {reference_words_used:.0%}".format(**vocabulary),
        "distinct captions    {distinct_captions:.0%}".format(**vocabulary),
    ]
    for title in ("worst", "best"):
        if report[title]:
            lines += ["", f"{title} by CIDEr-D:"]
        for example in report[title]:
            caption = example["caption"] or "(empty)"
            lines.append(f"  {example['cider_d']:>6.2f}  {example['frame_id']}: {caption}")
            lines.append(f"          reference: {example['references'][0]}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return f"{'-':>12}"
    return (
        f"{difference['difference']:>+12.3f}   [{difference['low']:+.3f}, {difference['high']:+.3f}] "
        f"{difference['verdict']}"
    )
