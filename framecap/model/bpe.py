"""ruGPT3's tokenizer: byte-level BPE read from the files beside the weights, and its special tokens.

Knows nothing of the model. Reads vocab.json + merges.txt (or tokenizer.json), added_tokens.json,
special_tokens_map.json and tokenizer_config.json, the files that transformers' GPT2Tokenizer writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from framecap.errors import CaptionerError, MissingFileError, WeightsError
from framecap.model.json_files import read_json

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
# What the role's token is called where no tokenizer file says: ruGPT3's names, then GPT-2's.
_USUAL = {
    "bos_token": ("<s>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|endoftext|>"),
    "pad_token": ("<pad>",),
    "unk_token": ("<unk>", "<|endoftext|>"),
}


class GptTokenizer:
    """Byte-level BPE with named special tokens; ``special`` maps a role (``"eos_token"``, …) to a token."""

    def __init__(self, tokenizer: Tokenizer, special: Mapping[str, str]) -> None:
        self.tokenizer = tokenizer
        self.special = dict(special)
        absent = [token for token in self.special.values() if tokenizer.token_to_id(token) is None]
        if absent:
            raise CaptionerError(
                f"special token {absent[0]!r} has no id in the vocabulary; add it to added_tokens.json."
            )
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in set(self.special.values())]
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GptTokenizer:
        """Read the tokenizer files of ``directory``.

        Raises MissingFileError when the vocabulary is not there, WeightsError when it is damaged, CaptionerError when
        the files contradict each other.
        """
        directory = Path(directory)
        options = _read_optional(directory / "tokenizer_config.json")
        tokenizer = _read_vocabulary(directory, bool(options.get("add_prefix_space", False)))
        added = _read_optional(directory / "added_tokens.json")
        for token, index in sorted(added.items(), key=lambda item: int(str(item[1]))):
            if tokenizer.token_to_id(token) is None:
                tokenizer.add_tokens([AddedToken(token, normalized=False)])
            if tokenizer.token_to_id(token) != index:
                raise CaptionerError(
                    f"{directory / 'added_tokens.json'} gives {token!r} the id {index}, which the vocabulary "
                    f"gives as {tokenizer.token_to_id(token)}; fetch the tokenizer files again."
                )
        roles = options | _read_optional(directory / "special_tokens_map.json")
        return cls(tokenizer, _special_tokens(roles, tokenizer))

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], special: Mapping[str, str]
    ) -> GptTokenizer:
        """Build from a byte-level vocabulary and its merges in order (for training one's own)."""
        return cls(_byte_level(BPE(dict(vocabulary), list(merges)), add_prefix_space=False), special)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write vocab.json, merges.txt, special_tokens_map.json, tokenizer_config.json and, where tokens were
        added to the vocabulary, added_tokens.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.model.save(str(directory))
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False)
        added = {k: v for k, v in self.tokenizer.get_vocab().items() if k not in vocabulary}
        spacing = {"add_prefix_space": self._add_prefix_space()}
        config = {"tokenizer_class": "GPT2Tokenizer"} | spacing | self.special
        for name, content in (
            ("special_tokens_map.json", self.special),
            ("tokenizer_config.json", config),
            ("added_tokens.json", added),
        ):
            if content:
                text = json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True)
                (directory / name).write_text(text + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; adds no special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special tokens are left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """``decode`` of many at once, on all of the tokenizer's threads."""
        texts: list[str] = self.tokenizer.decode_batch([list(ids) for ids in batch], skip_special_tokens=True)
        return texts

    def token_id(self, token: str) -> int | None:
        """Id of the token spelt exactly ``token`` in the vocabulary, or None."""
        index: int | None = self.tokenizer.token_to_id(token)
        return index

    def highest(self) -> tuple[str, int]:
        """The token with the highest id, and that id; ("", -1) for an empty vocabulary."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return max(vocabulary.items(), key=lambda item: item[1], default=("", -1))

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, by id; empty for special tokens and unused ids."""
        table = _byte_of_letter()
        specials = set(self.special.values())
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            if token not in specials:
                pieces[index] = b"".join(
                    bytes([table[letter]]) if letter in table else letter.encode() for letter in token
                )
        return pieces

    def special_id(self, role: str) -> int | None:
        """Id of the token in ``role`` (one of ``ROLES``), or None when the tokenizer has none."""
        return self.token_id(self.special[role]) if role in self.special else None

    def is_special(self, token: str) -> bool:
        """Whether ``token`` is one of the special tokens, which ``decode`` leaves out."""
        return token in self.special.values()

    def _add_prefix_space(self) -> bool:
        return bool(getattr(self.tokenizer.pre_tokenizer, "add_prefix_space", False))


def _read_optional(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def _read_vocabulary(directory: Path, add_prefix_space: bool) -> Tokenizer:
    vocab, merges, whole = (directory / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    try:
        if vocab.is_file() and merges.is_file():
            return _byte_level(BPE.from_file(str(vocab), str(merges)), add_prefix_space)
        if whole.is_file():
            return _encoding_alike(Tokenizer.from_file(str(whole)))
    except Exception as error:  # tokenizers raises no narrower class
        raise WeightsError(f"{directory}: its tokenizer files cannot be read ({error}); fetch them again.") from error
    raise MissingFileError(
        f"{directory} holds neither vocab.json with merges.txt nor tokenizer.json; "
        "put the decoder's tokenizer files beside its weights."
    )


def _encoding_alike(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` without what tokenizer.json keeps of the call before it was saved: padding, truncation, dropout.

    transformers, too, pads and cuts only where a call asks for it.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None  # of BPE training: it would encode a text differently each time
    return tokenizer


def _byte_level(model: BPE, add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def _special_tokens(roles: Mapping[str, object], tokenizer: Tokenizer) -> dict[str, str]:
    special = {}
    for role in ROLES:
        named = roles.get(role)
        token = named.get("content") if isinstance(named, dict) else named
        if isinstance(token, str):
            special[role] = token
            continue
        usual = next((name for name in _USUAL[role] if tokenizer.token_to_id(name) is not None), None)
        if usual is not None:
            special[role] = usual
    return special


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's spelling of bytes as letters: printable ones stand for themselves, the rest from U+0100 on.

    Source: openai/gpt-2, encoder.py, ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}
