"""YouTokenToMe's ids against youtokentome 1.0.6's, and against a second, naive reading of its rules."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from framecap.errors import MissingFileError, WeightsError
from framecap.model.yttm import SpecialIds, YttmTokenizer, save_yttm

DATA = Path(__file__).parent / "data"
CHECKPOINTS = ["ruclip-vit-b32-tiny", "ruclip-vit-l14-tiny"]


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return DATA / request.param


@pytest.fixture
def tokenizer() -> YttmTokenizer:
    return YttmTokenizer.from_file(DATA / CHECKPOINTS[0] / "bpe.model")


def naive_encode(tokenizer: YttmTokenizer, word: str) -> list[int]:
    """Merge by the rule of lowest index, leftmost first, searching the whole word each time."""
    tokens = [tokenizer.char2id["▁"]]
    for char in word:
        token = tokenizer.char2id.get(char, -1)
        if token != -1 or tokens[-1] != -1:
            tokens.append(token)
    rank = {(x, y): (i, z) for i, (x, y, z) in enumerate(tokenizer.rules)}
    while True:
        found = [(rank[pair][0], at) for at, pair in enumerate(itertools.pairwise(tokens)) if pair in rank]
        if not found:
            return [tokenizer.specials.unk if token == -1 else token for token in tokens]
        _, at = min(found)
        tokens[at : at + 2] = [rank[(tokens[at], tokens[at + 1])][1]]


def test_ids_are_those_of_youtokentome_for_every_text(checkpoint: Path) -> None:
    tokenizer = YttmTokenizer.from_file(checkpoint / "bpe.model")
    texts = json.loads((checkpoint / "expected.json").read_text(encoding="utf-8"))["texts"]
    expected = np.load(checkpoint / "expected.npz")["input_ids"]
    assert len(texts) == 79
    for text, row in zip(texts, expected, strict=True):
        ids = [2, *tokenizer.encode(text.lower())[:75], 3]
        assert ids == row[: len(ids)].tolist(), text
        assert not row[len(ids) :].any(), text


def test_random_words_merge_as_the_naive_reading_of_the_rules_does(tokenizer: YttmTokenizer) -> None:
    rng = random.Random(0)
    letters = [char for char in tokenizer.char2id if char != "▁"] + list("щ🐶zz")
    for length in [1, 2, 3, 5, 8, 13, 40] * 60:
        word = "".join(rng.choices(letters, k=length))
        assert tokenizer.encode(word) == naive_encode(tokenizer, word), word
    repeated = "аоаоаоаоооааа" * 5
    assert tokenizer.encode(repeated) == naive_encode(tokenizer, repeated)


def test_a_run_of_unknown_characters_is_one_unk(tokenizer: YttmTokenizer) -> None:
    assert tokenizer.encode("🐶🐶🐶") == tokenizer.encode("🐶") == [tokenizer.char2id["▁"], 1]


def test_blank_text_has_no_ids(tokenizer: YttmTokenizer) -> None:
    assert tokenizer.encode("") == tokenizer.encode(" \t\n▁ ") == []


def test_a_no_break_space_does_not_part_words(tokenizer: YttmTokenizer) -> None:
    assert tokenizer.encode("белый\u00a0снег") != tokenizer.encode("белый снег")


def test_a_very_long_word_takes_no_quadratic_time(tokenizer: YttmTokenizer) -> None:
    assert len(tokenizer.encode("собака" * 20_000)) > 20_000


def test_of_two_rules_for_one_pair_the_later_holds() -> None:
    tokenizer = YttmTokenizer({"▁": 4, "а": 5, "б": 6}, [(5, 6, 7), (5, 6, 8)])
    assert tokenizer.encode("аб") == [4, 8]


def test_decode_gives_the_text_back(tokenizer: YttmTokenizer) -> None:
    text = "мальчик едет по дороге, рядом белый снег"
    assert tokenizer.decode([2, *tokenizer.encode(text), 3, 0, 0]) == text


def test_a_saved_model_encodes_alike(tokenizer: YttmTokenizer, tmp_path: Path) -> None:
    save_yttm(tmp_path / "bpe.model", tokenizer.char2id, tokenizer.rules, tokenizer.specials)
    again = YttmTokenizer.from_file(tmp_path / "bpe.model")
    text = "на фото видно, как собака идёт на мосту 🐶"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.specials == tokenizer.specials == SpecialIds(unk=1, pad=0, bos=2, eos=3)
    assert again.vocab_size == tokenizer.vocab_size == 700


def test_a_cut_model_file_is_an_error(tmp_path: Path) -> None:
    whole = (DATA / CHECKPOINTS[0] / "bpe.model").read_text(encoding="ascii")
    (tmp_path / "bpe.model").write_text(whole[: len(whole) // 2], encoding="ascii")
    with pytest.raises(WeightsError, match=r"42 characters and 654 rules but is cut"):
        YttmTokenizer.from_file(tmp_path / "bpe.model")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff\xfe\x00", b"1 0\n97 5\n1 0 2 3\n"])
def test_a_file_that_is_no_model_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bpe.model").write_bytes(content)
    with pytest.raises(WeightsError):
        YttmTokenizer.from_file(tmp_path / "bpe.model")


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"bpe\.model"):
        YttmTokenizer.from_file(tmp_path / "bpe.model")
