"""Which captions deserve a look first, judged from the caption shard alone.

Knows nothing of storage or pages.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

from framecap.schema import STATUS_ERROR, STATUS_TRUNCATED

FLAGS = ("error", "truncated", "repeated", "non_cyrillic", "empty")
_WORD = re.compile(r"[^\W\d_]+")


def flags(row: dict[str, Any]) -> list[str]:
    """What is suspicious about one caption row, as names from ``FLAGS``."""
    if row["caption_status"] == STATUS_ERROR:
        return ["error"]
    text = row["caption"] or ""
    found = []
    if row["caption_status"] == STATUS_TRUNCATED:
        found.append("truncated")
    if is_repeated(text):
        found.append("repeated")
    if not text.strip():
        found.append("empty")
    elif not is_cyrillic(text):
        found.append("non_cyrillic")
    return found


def is_repeated(text: str) -> bool:
    """Whether a pair of words comes twice, or one word three times; of short words («и на») alone, neither."""
    words = _WORD.findall(text.lower())
    pairs = Counter(pair for pair in pairwise(words) if len(max(pair, key=len)) > 2)
    singles = Counter(word for word in words if len(word) > 2)
    return any(count > 1 for count in pairs.values()) or any(count > 2 for count in singles.values())


def is_cyrillic(text: str) -> bool:
    """Whether at least four in five letters are Cyrillic (a brand name in Latin letters may pass)."""
    letters = [letter for letter in text if letter.isalpha()]
    return (
        bool(letters)
        and sum("а" <= letter.lower() <= "я" or letter in "ёЁ" for letter in letters) * 5 >= len(letters) * 4
    )


def doubt(row: dict[str, Any], found: list[str]) -> float:
    """How doubtful one caption is, above 0: one for each flag, and below one for the similarity.

    Without a similarity the mean token log-probability takes its place, -5 being as bad as it gets.
    """
    if row["caption_similarity"] is not None:
        unlikeness = (1 - row["caption_similarity"]) / 2
    else:
        unlikeness = min(1.0, -(row["caption_logprob"] or 0.0) / 5)
    return len(found) + 0.999 * min(1.0, max(0.0, unlikeness))
