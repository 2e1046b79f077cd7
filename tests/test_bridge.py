"""Bridges have ClipCap's arithmetic and its key names, and one contract."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from framecap.errors import SettingsError
from framecap.model.bridge import BRIDGES, build_bridge
from framecap.model.bridge_config import KINDS, BridgeConfig
from framecap.model.weights import read_state_dict


@dataclass
class FakeFeatures:
    pooled: Tensor
    patches: Tensor


def features(count: int = 3) -> FakeFeatures:
    torch.manual_seed(0)
    return FakeFeatures(torch.randn(count, 12), torch.randn(count, 5, 20))


def config(kind: str, /, **changes: object) -> BridgeConfig:
    crosses = kind == "cross_attention"
    values: dict[str, object] = {
        "kind": kind,
        "feature_size": 20 if crosses else 12,
        "feature": "patches" if crosses else "pooled",
        "decoder_size": 16,
        "prefix_length": 4,
        "clip_length": 3,
        "num_layers": 2,
        "num_heads": 2,
    }
    return BridgeConfig.from_dict(values | changes)


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer"])
def test_a_prefix_bridge_gives_a_prefix_and_no_memory(kind: str) -> None:
    prefix, memory = build_bridge(config(kind))(features())
    assert prefix.shape == (3, 4, 16)
    assert memory is None


def test_the_cross_attention_bridge_gives_a_memory_of_all_patches_and_no_prefix() -> None:
    prefix, memory = build_bridge(config("cross_attention"))(features())
    assert prefix is None
    assert memory.shape == (3, 5, 16)


def test_every_kind_that_a_config_may_name_can_be_built() -> None:
    assert tuple(BRIDGES) == KINDS


@pytest.mark.parametrize("kind", list(BRIDGES))
def test_a_frame_gets_the_same_alone_and_among_others(kind: str) -> None:
    bridge, many = build_bridge(config(kind)), features()
    alone = FakeFeatures(many.pooled[1:2], many.patches[1:2])
    together = next(part for part in bridge(many) if part is not None)
    single = next(part for part in bridge(alone) if part is not None)
    torch.testing.assert_close(single[0], together[1])


@torch.no_grad()
def test_clipcaps_own_mlp_loads_by_its_keys_and_computes_its_formula(shared: Path) -> None:
    state = read_state_dict(shared / "oracle" / "clipcap-mlp" / "clipcap.pt")
    state = {name.removeprefix("clip_project."): t for name, t in state.items() if "clip_project" in name}
    bridge = build_bridge(BridgeConfig("mlp", feature_size=48, decoder_size=64, prefix_length=10))
    bridge.load_state_dict(state)
    pooled = torch.randn(2, 48)
    hidden = (pooled @ state["model.0.weight"].t() + state["model.0.bias"]).tanh()
    expected = (hidden @ state["model.2.weight"].t() + state["model.2.bias"]).view(2, 10, 64)
    prefix, _ = bridge(FakeFeatures(pooled, torch.empty(2, 0, 0)))
    torch.testing.assert_close(prefix, expected)


@torch.no_grad()
def test_the_mapper_is_a_pre_norm_transformer_read_out_by_its_constants() -> None:
    bridge = build_bridge(config("transformer"))
    state = bridge.state_dict()
    pooled = torch.randn(3, 12)
    x = nn.functional.linear(pooled, state["linear.weight"], state["linear.bias"]).view(3, 3, 16)
    x = torch.cat((x, state["prefix_const"].expand(3, 4, 16)), 1)
    for layer in range(2):
        own = {k.split(".", 3)[3]: v for k, v in state.items() if k.startswith(f"transformer.layers.{layer}.")}
        peer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True, norm_first=True).eval()
        names = {"fc1": "linear1", "fc2": "linear2"}
        peer_state = {f"{names[n]}.{p}": own[f"mlp.{n}.{p}"] for n in names for p in ("weight", "bias")}
        peer_state |= {k: v for k, v in own.items() if k.startswith("norm")}
        peer_state["self_attn.in_proj_weight"] = torch.cat(
            (own["attn.to_queries.weight"], own["attn.to_keys_values.weight"])
        )
        peer_state["self_attn.in_proj_bias"] = torch.zeros(48)
        peer_state["self_attn.out_proj.weight"] = own["attn.project.weight"]
        peer_state["self_attn.out_proj.bias"] = own["attn.project.bias"]
        peer.load_state_dict(peer_state)
        x = peer(x)
    prefix, _ = bridge(FakeFeatures(pooled, torch.empty(3, 0, 0)))
    torch.testing.assert_close(prefix, x[:, 3:], atol=1e-5, rtol=1e-5)


def test_normalised_features_make_the_prefix_blind_to_their_length() -> None:
    bridge, given = build_bridge(config("mlp", normalize_features=True)), features()
    scaled = FakeFeatures(given.pooled * 7, given.patches)
    torch.testing.assert_close(bridge(given)[0], bridge(scaled)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "resampler"}, "'resampler' is unknown; known: mlp, linear, transformer, cross_attention"),
        ({"feature": "patches"}, "reads 'pooled' features, not 'patches'"),
        ({"feature": "tokens"}, "'tokens' is unknown; known: pooled, patches"),
        ({"prefix_length": 0}, "prefix_length is 0"),
        ({"prefix_len": 10}, "'prefix_len'; did you mean 'prefix_length'"),
        ({"num_heads": 3}, "num_heads 3 does not divide decoder_size 16"),
    ],
)
def test_a_config_that_cannot_be_names_the_value_and_what_is_known(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        config("transformer", **changes)


def test_a_config_survives_json() -> None:
    one = config("transformer", normalize_features=True)
    assert BridgeConfig.from_dict(one.to_dict()) == one
