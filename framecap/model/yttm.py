"""YouTokenToMe's ``bpe.model`` → token ids, exactly as ``youtokentome`` 1.0.6 computes them.

Own merges rather than the ``tokenizers`` library: there a token is its string, whereas two rules of a
``bpe.model`` may spell the same string under different ids. Knows nothing of lower-casing, ``<bos>``,
``<eos>`` or lengths: that is ruCLIP's business (``ruclip.py``).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from framecap.errors import MissingFileError, WeightsError

WORD_START = "▁"
# C's isspace() in a UTF-8 locale, and the word mark itself, which youtokentome treats as a space. Python's
# own str.split() would also split at a no-break space.
_WORDS = re.compile(rf"[^ \t\n\v\f\r{WORD_START}]+")
_UNKNOWN = -1
_CACHED_WORDS = 65_536

Rule = tuple[int, int, int]


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens, in the order of the last line of ``bpe.model``; -1 where there is none."""

    unk: int = 1
    pad: int = 0
    bos: int = 2
    eos: int = 3


class YttmTokenizer:
    """Text → ids and back.

    ``char2id`` maps a character to its id (``▁``, the start of a word, included), ``rules`` holds the merges
    (left id, right id, merged id) in order of priority.
    """

    def __init__(self, char2id: Mapping[str, int], rules: Sequence[Rule], specials: SpecialIds | None = None) -> None:
        if WORD_START not in char2id:
            raise WeightsError(f"a bpe.model must give an id to {WORD_START!r} (code 9601), the start of a word.")
        self.char2id = dict(char2id)
        self.rules = list(rules)
        self.specials = specials or SpecialIds()
        # Of two rules for one pair the later holds, as in the reference.
        self._rank = {(left, right): rank for rank, (left, right, _) in enumerate(self.rules)}
        self._spelling = _spell_tokens(self.char2id, self.rules)
        self._encode_word = lru_cache(maxsize=_CACHED_WORDS)(self._merge_word)

    @classmethod
    def from_file(cls, path: str | Path) -> YttmTokenizer:
        """Read a ``bpe.model``: "characters rules", then a line each ("code id", "left right merged"), then
        "unk pad bos eos". Raises MissingFileError, or WeightsError for a file that is cut or no such file."""
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; a ruCLIP checkpoint must have its bpe.model.")
        try:
            numbers = [int(word) for word in path.read_text(encoding="ascii").split()]
        except ValueError as error:
            raise WeightsError(f"{path} is not a YouTokenToMe model ({error}); fetch it again.") from error
        chars, rules = [*numbers, 0, 0][:2]
        if len(numbers) != 2 + 2 * chars + 3 * rules + 4 or chars < 1:
            raise WeightsError(f"{path} announces {chars} characters and {rules} rules but is cut; fetch it again.")
        rules_at = 2 + 2 * chars
        specials_at = rules_at + 3 * rules
        try:
            char2id = {chr(numbers[i]): numbers[i + 1] for i in range(2, rules_at, 2)}
            merges = [(numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(rules_at, specials_at, 3)]
            if any(token < 0 for token in (*char2id.values(), *(token for rule in merges for token in rule))):
                raise ValueError("an id is negative")
            return cls(char2id, merges, SpecialIds(*numbers[specials_at:]))
        except (ValueError, OverflowError, KeyError) as error:
            raise WeightsError(f"{path} is not a YouTokenToMe model ({error!r}); fetch it again.") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids: characters, merges and special tokens."""
        specials = (self.specials.unk, self.specials.pad, self.specials.bos, self.specials.eos)
        return len(self.char2id) + len(self.rules) + sum(token >= 0 for token in specials)

    @property
    def highest_id(self) -> int:
        """The highest id that ``encode`` can give."""
        return max(*self.char2id.values(), *(merged for _, _, merged in self.rules), self.specials.unk)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without ``<bos>`` and ``<eos>``; an empty list for blank text."""
        ids: list[int] = []
        for word in _WORDS.findall(text):
            ids.extend(self._encode_word(word))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special and unknown ids are left out."""
        text = "".join(self._spelling.get(int(token), "") for token in ids)
        return text.replace(WORD_START, " ").removeprefix(" ")

    def _merge_word(self, word: str) -> tuple[int, ...]:
        """Apply the merges to one word: always the rule of highest priority, leftmost first."""
        tokens = self._characters(word)
        following = [*range(1, len(tokens)), -1]
        preceding = list(range(-1, len(tokens) - 1))
        events = [
            (self._rank[pair], at)
            for at in range(len(tokens) - 1)
            if (pair := (tokens[at], tokens[at + 1])) in self._rank
        ]
        heapq.heapify(events)
        while events:
            rank, at = heapq.heappop(events)
            left, right, merged = self.rules[rank]
            after = following[at]
            if tokens[at] != left or after < 0 or tokens[after] != right:
                continue  # the pair has gone into another merge meanwhile
            tokens[at], tokens[after] = merged, _UNKNOWN
            following[at] = following[after]
            following[after] = -1
            for start in (preceding[at], at):
                if start >= 0 and following[start] >= 0:
                    preceding[following[start]] = start
                    rule = self._rank.get((tokens[start], tokens[following[start]]))
                    if rule is not None:
                        heapq.heappush(events, (rule, start))
        return tuple(self._alive(tokens, following))

    def _characters(self, word: str) -> list[int]:
        """Ids of the word mark and the characters; a run of unknown characters counts as one."""
        tokens = [self.char2id[WORD_START]]
        for char in word:
            token = self.char2id.get(char, _UNKNOWN)
            if token != _UNKNOWN or tokens[-1] != _UNKNOWN:
                tokens.append(token)
        return tokens

    def _alive(self, tokens: list[int], following: list[int]) -> Iterable[int]:
        at = 0
        while at >= 0:
            yield self.specials.unk if tokens[at] == _UNKNOWN else tokens[at]
            at = following[at]


def save_yttm(
    path: str | Path, char2id: Mapping[str, int], rules: Sequence[Rule], specials: SpecialIds | None = None
) -> None:
    """Write a ``bpe.model`` that ``youtokentome`` 1.0.6 and ``YttmTokenizer.from_file`` read."""
    special = specials or SpecialIds()
    lines = [f"{len(char2id)} {len(rules)}"]
    lines += [f"{ord(char)} {token}" for char, token in char2id.items()]
    lines += [f"{left} {right} {merged}" for left, right, merged in rules]
    lines.append(f"{special.unk} {special.pad} {special.bos} {special.eos}")
    Path(path).write_text("\n".join(lines) + "\n", encoding="ascii")


def _spell_tokens(char2id: Mapping[str, int], rules: Iterable[Rule]) -> dict[int, str]:
    spelling = {token: char for char, token in char2id.items()}
    for left, right, merged in rules:
        spelling[merged] = spelling[left] + spelling[right]
    return spelling
