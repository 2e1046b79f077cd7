"""Kind and sizes of a bridge, as a captioner's config.json has them.

Imports no torch. See bridge.py for the bridges.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from framecap.errors import SettingsError

KINDS = ("mlp", "linear", "transformer", "cross_attention")
FEATURES = ("pooled", "patches")
_SIZES = ("feature_size", "decoder_size", "prefix_length", "clip_length", "num_layers", "num_heads")


@dataclass(frozen=True)
class BridgeConfig:
    """Kind and sizes of a bridge.

    ``feature_size`` is the encoder's width of ``feature``, ``decoder_size`` the decoder's n_embd.
    ``clip_length``, ``num_layers`` and ``num_heads`` are of ``transformer``; ``normalize_features`` is
    ClipCap's ``--normalize_prefix``. SettingsError for an unknown kind or an impossible size.
    """

    kind: str
    feature_size: int
    decoder_size: int
    prefix_length: int = 10
    feature: str = "pooled"
    clip_length: int = 10
    num_layers: int = 8
    num_heads: int = 8
    normalize_features: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingsError(f"bridge kind {self.kind!r} is unknown; known: {', '.join(KINDS)}.")
        if self.feature not in FEATURES:
            raise SettingsError(f"bridge feature {self.feature!r} is unknown; known: {', '.join(FEATURES)}.")
        wanted = "patches" if self.kind == "cross_attention" else "pooled"
        if self.feature != wanted:
            raise SettingsError(f"a {self.kind} bridge reads {wanted!r} features, not {self.feature!r}.")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise SettingsError(f"bridge {name} is {getattr(self, name)}; it must be at least 1.")
        if self.kind == "transformer" and self.decoder_size % self.num_heads:
            raise SettingsError(f"bridge num_heads {self.num_heads} does not divide decoder_size {self.decoder_size}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> BridgeConfig:
        """Build from JSON values; SettingsError names an unknown or missing key and the known ones."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise SettingsError(f"unknown bridge key {key!r}; {hint}known: {', '.join(known)}.")
        for key in ("kind", "feature_size", "decoder_size"):
            if key not in values:
                raise SettingsError(f"the bridge's config lacks {key!r}; known: {', '.join(known)}.")
        return cls(**values)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)
