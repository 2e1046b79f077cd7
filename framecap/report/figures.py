"""The run in figures: counts, error examples and distributions, gathered row by row in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from framecap.report.doubt import FLAGS
from framecap.schema import STATUS_ERROR

_EXAMPLES = 3
_BARS = 40


@dataclass
class Histogram:
    """Counts in ``bins`` equal bins over [low, high]; what lies outside falls into the outermost ones."""

    low: float
    high: float
    bins: int
    counts: Counter[int] = field(default_factory=Counter)
    total: float = 0.0

    def add(self, value: float) -> None:
        place = int((value - self.low) / (self.high - self.low) * self.bins)
        self.counts[min(self.bins - 1, max(0, place))] += 1
        self.total += value

    def quantile(self, share: float) -> float | None:
        """The value below which ``share`` of the rows lie, to the width of a bin."""
        wanted, seen = share * self.counts.total(), 0
        for place in sorted(self.counts):
            seen += self.counts[place]
            if seen >= wanted:
                return self.low + (place + 0.5) * (self.high - self.low) / self.bins
        return None

    def to_page(self) -> dict[str, Any]:
        """At most 40 bars over the occupied range, the range, mean and quantiles."""
        if not self.counts:
            return {"bars": []}
        first, last = min(self.counts), max(self.counts) + 1
        width = max(1, -(-(last - first) // _BARS))
        bars = [0] * -(-(last - first) // width)
        for place, count in self.counts.items():
            bars[(place - first) // width] += count
        step = (self.high - self.low) / self.bins
        return {
            "bars": bars,
            "from": self.low + first * step,
            "step": width * step,
            "mean": self.total / self.counts.total(),
            "quantiles": [self.quantile(share) for share in (0.05, 0.5, 0.95)],
        }


@dataclass
class Figures:
    """Everything the page says in numbers."""

    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    distinct: set[int] = field(default_factory=set)
    logprob: Histogram = field(default_factory=lambda: Histogram(-10, 0, 2000))
    similarity: Histogram = field(default_factory=lambda: Histogram(-1, 1, 2000))
    tokens: Histogram = field(default_factory=lambda: Histogram(0, 1024, 1024))

    def add(self, row: dict[str, Any], found: list[str], frame_id: str) -> None:
        """Count one caption row and its flags."""
        self.rows += 1
        self.statuses[row["caption_status"]] += 1
        self.flags.update(found)
        if row.get("caption_reused"):
            self.reused[row["caption_reused"]] += 1
        if row["caption_status"] == STATUS_ERROR:
            kind, _, message = (row["caption_error"] or "unknown").partition(": ")
            self.errors[kind] += 1
            examples = self.examples.setdefault(kind, [])
            if len(examples) < _EXAMPLES:
                examples.append((frame_id, message))
            return
        if len(self.distinct) < 1_000_000:
            self.distinct.add(hash(row["caption"]))
        for histogram, column in (
            (self.logprob, "caption_logprob"),
            (self.similarity, "caption_similarity"),
            (self.tokens, "caption_tokens"),
        ):
            if row[column] is not None:
                histogram.add(row[column])

    def to_page(self) -> dict[str, Any]:
        """The figures as the page's script reads them."""
        return {
            "rows": self.rows,
            "statuses": dict(self.statuses),
            "flags": {flag: self.flags[flag] for flag in FLAGS if self.flags[flag]},
            "reused": dict(self.reused),
            "distinct": len(self.distinct),
            "errors": [
                {"kind": kind, "count": count, "examples": self.examples[kind]}
                for kind, count in self.errors.most_common()
            ],
            "histograms": {
                "similarity": self.similarity.to_page(),
                "logprob": self.logprob.to_page(),
                "tokens": self.tokens.to_page(),
            },
        }


@dataclass
class Change:
    """How another run over the same frames differs."""

    compared: int = 0
    same: int = 0
    only_here: int = 0
    similarity: float = 0.0
    with_similarity: int = 0

    def add(self, row: dict[str, Any], other: dict[str, Any] | None) -> None:
        if other is None:
            self.only_here += 1
            return
        self.compared += 1
        self.same += row["caption"] == other["caption"]
        if row["caption_similarity"] is not None and other["caption_similarity"] is not None:
            self.similarity += other["caption_similarity"] - row["caption_similarity"]
            self.with_similarity += 1

    def to_page(self) -> dict[str, Any]:
        mean = self.similarity / self.with_similarity if self.with_similarity else None
        return {
            "compared": self.compared,
            "same": self.same,
            "changed": self.compared - self.same,
            "only_here": self.only_here,
            "similarity_change": mean,
        }
