"""One normalisation of captions and references, for all scores alike: texts that read the same are the same.

Knows nothing of scores.
"""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+(?:-\w+)*")
_HYPHENS = str.maketrans({"\u2010": "-", "\u2011": "-"})  # hyphen, non-breaking hyphen
_UNSEEN = ("Mn", "Me", "Cf")  # stress marks, soft hyphens, joiners, byte order marks


def composed(text: str) -> str:
    """``text`` in NFC, without what is not seen or only guides the voice: stress marks, soft hyphens, joiners.

    «й» and «ё» of two code points (macOS file names, NFD) become letters before marks are dropped.
    """
    text = unicodedata.normalize("NFC", text)
    return "".join(letter for letter in text if unicodedata.category(letter) not in _UNSEEN)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, «ё» written «е»; a hyphenated word («тёмно-синий») is one."""
    return _WORD.findall(composed(text.lower()).translate(_HYPHENS).replace("ё", "е"))


def plain(text: str) -> str:
    """The words of ``text`` with one space between them: what scores of whole strings compare."""
    return " ".join(words(text))
