"""config.json of a captioner directory: which bridge joins encoder and decoder, and where a caption stops."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from framecap.errors import BridgeMismatchError, CaptionerError, PositionLimitError, SettingsError
from framecap.model.bridge_config import BridgeConfig
from framecap.model.decode_options import DecodeOptions
from framecap.model.json_files import read_json
from framecap.model.ruclip_layout import RuClipConfig
from framecap.model.rugpt_config import RuGptConfig

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
_KEYS = ("format_version", "bridge", "stop", "domain")


@dataclass(frozen=True)
class CaptionerConfig:
    """``stop``: strings that end a caption unless ``DecodeOptions.stop`` says otherwise (ClipCap: ".").

    ``domain``: the only pictures that the captioner knows, in words ("drawn scenes of …"); None: photographs.
    """

    bridge: BridgeConfig
    stop: tuple[str, ...] = ()
    domain: str | None = None

    @property
    def notice(self) -> str | None:
        """One line for whoever reads its captions; None if there is nothing to be said."""
        if self.domain is None:
            return None
        return (
            f"this captioner knows only {self.domain}: what it says of other pictures means nothing. For photographs "
            "give --captioner one with real weights (README.md)"
        )

    @classmethod
    def from_file(cls, path: Path) -> CaptionerConfig:
        """Read a captioner's config.json.

        Raises:
            MissingFileError, WeightsError: the file is not there or is not JSON.
            CaptionerError: a key is unknown or missing, or the format is of a later version.
        """
        values = read_json(path)
        for key in values:
            if key not in _KEYS:
                near = difflib.get_close_matches(key, _KEYS, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise CaptionerError(f"{path}: unknown key {key!r}; {hint}known: {', '.join(_KEYS)}.")
        if values.get("format_version") != FORMAT_VERSION:
            raise CaptionerError(
                f"{path}: format_version is {values.get('format_version')!r}, this framecap reads {FORMAT_VERSION}; "
                "use the framecap that wrote it, or assemble the captioner again."
            )
        bridge, stop, domain = values.get("bridge"), values.get("stop", []), values.get("domain")
        if not isinstance(bridge, dict):
            raise CaptionerError(f"{path}: 'bridge' is {bridge!r}; it must be an object with the bridge's sizes.")
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise CaptionerError(f"{path}: 'stop' is {stop!r}; it must be a list of non-empty strings.")
        if domain is not None and not (isinstance(domain, str) and domain):
            raise CaptionerError(f"{path}: 'domain' is {domain!r}; it must be a text, such as \"drawn scenes\".")
        return cls(BridgeConfig.from_dict(bridge), tuple(stop), domain)

    def write(self, path: Path) -> None:
        """Write config.json."""
        values = {"format_version": FORMAT_VERSION, "bridge": self.bridge.to_dict(), "stop": list(self.stop)}
        if self.domain is not None:
            values["domain"] = self.domain
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_fit(bridge: BridgeConfig, encoder: RuClipConfig, decoder: RuGptConfig) -> None:
    """Raise BridgeMismatchError unless the bridge reads what the encoder gives and writes what the decoder reads."""
    given = encoder.vision_width if bridge.feature == "patches" else encoder.embed_dim
    if bridge.feature_size != given:
        raise BridgeMismatchError(
            f"the {bridge.kind} bridge reads {bridge.feature} features of {bridge.feature_size}, the encoder gives "
            f"{given}; use the encoder that the bridge was trained with."
        )
    if bridge.decoder_size != decoder.n_embd:
        raise BridgeMismatchError(
            f"the {bridge.kind} bridge writes vectors of {bridge.decoder_size}, the decoder reads {decoder.n_embd}; "
            "use the decoder that the bridge was trained with."
        )


def check_options(directory: Path, options: DecodeOptions) -> None:
    """Raise what loading the captioner, or its first caption, would raise; reads config files, no weights.

    Raises:
        CaptionerError: a config is damaged, the parts do not fit, or prefix and new tokens exceed the positions.
        SettingsError: ``rerank`` without a text tower.
    """
    config = CaptionerConfig.from_file(directory / CONFIG_NAME)
    encoder = RuClipConfig.from_file(directory / "encoder" / CONFIG_NAME)
    decoder = RuGptConfig.from_json(directory / "decoder" / CONFIG_NAME)
    check_fit(config.bridge, encoder, decoder)
    read = 1 if config.bridge.kind == "cross_attention" else config.bridge.prefix_length
    if read + options.max_new_tokens > decoder.n_positions:
        raise PositionLimitError(
            f"a prefix of {read} + max_new_tokens {options.max_new_tokens} exceed the decoder's {decoder.n_positions} "
            "positions; lower max_new_tokens."
        )
    if options.rerank and not encoder.transformer_layers:
        raise SettingsError("rerank needs a ruCLIP with a text tower; this captioner's encoder has none")
