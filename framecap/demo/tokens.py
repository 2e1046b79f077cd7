"""The mini captioner's two vocabularies, learnt from captions: YouTokenToMe's format and byte-level BPE."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from framecap.model.bpe import GptTokenizer
from framecap.model.yttm import WORD_START, Rule, YttmTokenizer

SPECIALS = 4
GPT_SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def train_yttm(texts: Iterable[str], vocab_size: int) -> YttmTokenizer:
    """Byte pair encoding over lower-cased words, at most ``vocab_size`` ids (Sennrich et al. 2016)."""
    words = Counter(word for text in texts for word in text.lower().split())
    letters = Counter(letter for word, count in words.items() for letter in word * count)
    alphabet = [WORD_START, *sorted(set("абвгдеёжзийклмнопрстуфхцчшщъыьэюя.,") | set(letters))]
    char2id = {letter: SPECIALS + index for index, letter in enumerate(alphabet)}
    spelt = {word: [char2id[WORD_START], *(char2id[letter] for letter in word)] for word in words}
    rules: list[Rule] = []
    while len(char2id) + SPECIALS + len(rules) < vocab_size:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, ids in spelt.items():
            for pair in itertools.pairwise(ids):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        merged = SPECIALS + len(char2id) + len(rules)
        rules.append((left, right, merged))
        spelt = {word: _merge(ids, left, right, merged) for word, ids in spelt.items()}
    return YttmTokenizer(char2id, rules)


def _merge(ids: Sequence[int], left: int, right: int, merged: int) -> list[int]:
    out: list[int] = []
    at = 0
    while at < len(ids):
        if at + 1 < len(ids) and ids[at] == left and ids[at + 1] == right:
            out.append(merged)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return out


def train_gpt_tokenizer(texts: Iterable[str], vocab_size: int) -> GptTokenizer:
    """Byte-level BPE with ruGPT3's special tokens: ``<pad>`` 0, ``<s>`` 1, ``</s>`` 2, ``<unk>`` 3."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(GPT_SPECIALS.values()),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = _merges_of(tokenizer)
    return GptTokenizer.from_vocabulary(tokenizer.get_vocab(), model, GPT_SPECIALS)


def _merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]
