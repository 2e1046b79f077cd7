"""How captions are decoded: one frozen object with transformers' names, checked when it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from framecap.errors import SettingsError

_INTEGERS = (
    "num_beams", "num_return_sequences", "top_k", "no_repeat_ngram_size", "max_new_tokens", "seed",
)  # fmt: skip
_NUMBERS = ("length_penalty", "temperature", "top_p", "repetition_penalty")
_SWITCHES = ("do_sample", "rerank")
# Sums of log-probabilities are divided by length ** length_penalty in float32, which ends at 3e38.
_LARGEST_NORMALISER = 1e30
_AT_LEAST = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "max_new_tokens": 1,
}


@dataclass(frozen=True)
class DecodeOptions:
    """Decoding options; names and meanings are those of transformers' GenerationConfig.

    ``temperature``, ``top_k`` (0 = off) and ``top_p`` count only with ``do_sample``, ``length_penalty`` only
    with beams. Added here: ``stop``, texts that end a caption and stay in it (a special token given there
    ends it and does not); ``seed`` of the samples; ``rerank``, candidates ordered by ruCLIP similarity.
    Raises SettingsError for values that cannot be, alone or together.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 40
    stop: tuple[str, ...] = ()
    seed: int = 0
    rerank: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise SettingsError(f"stop is {self.stop!r}; it must be texts of at least one character.")
        self._check_types()
        self._check_ranges()
        self._check_together()

    def _check_types(self) -> None:
        for name in (*_INTEGERS, *_NUMBERS, *_SWITCHES):
            value = getattr(self, name)
            wanted: tuple[type, ...] = (int, float) if name in _NUMBERS else (int,)
            if name in _SWITCHES:
                wanted = (bool,)
            if not isinstance(value, wanted) or (isinstance(value, bool) and name not in _SWITCHES):
                kind = "true or false" if name in _SWITCHES else wanted[-1].__name__
                raise SettingsError(f"{name} is {value!r}; it must be {kind}.")

    def _check_ranges(self) -> None:
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("temperature", "repetition_penalty"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not abs(self.length_penalty) < float("inf"):
            raise SettingsError(f"length_penalty is {self.length_penalty}; it must be a finite number.")

    def _check_together(self) -> None:
        limit = math.log(_LARGEST_NORMALISER) / math.log(max(self.max_new_tokens, 2))
        if abs(self.length_penalty) > limit:
            raise SettingsError(
                f"length_penalty is {self.length_penalty}; with max_new_tokens = {self.max_new_tokens} it must be "
                f"between {-math.floor(limit)} and {math.floor(limit)}, or scores leave float32."
            )
        if self.do_sample and self.num_beams > 1:
            raise SettingsError(
                f"do_sample with num_beams = {self.num_beams} is not supported; sample with num_beams = 1 "
                "and num_return_sequences, or search with do_sample = false."
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise SettingsError(
                f"num_return_sequences = {self.num_return_sequences} is more than num_beams = "
                f"{self.num_beams}; raise num_beams or set do_sample."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecodeOptions:
        """Build from plain values; SettingsError names an unknown key, the nearest one and all known ones."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise SettingsError(f"unknown decode option {key!r}; {hint}known: {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``from_dict`` takes them back."""
        return asdict(self) | {"stop": list(self.stop)}
